"""How reward models and process reward models learn: couples of sequences, step by step, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

import torch
from torch import Tensor

from megarlhf.batch.base import RowsT, cat
from megarlhf.batch.supervised import Couples, LabelledResponses, PreferencePairs
from megarlhf.checkpoint.model_directory import Card, save_model
from megarlhf.data.loader import Loader
from megarlhf.models.role import Role
from megarlhf.observe.clock import Clock
from megarlhf.observe.metrics import Metrics
from megarlhf.ops.preference_loss import bradley_terry_loss, pointwise_loss
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Loss
from megarlhf.runs.guard import StepGuard
from megarlhf.runs.loop import Run, run_steps
from megarlhf.runs.measuring import Measuring
from megarlhf.runs.opening import open_run
from megarlhf.runtime.about import leave_about
from megarlhf.runtime.roles import print_choices, print_memory_plan, print_remark
from megarlhf.trainers.judged import JudgedConfig, JudgedInputs, responses_to_measure, say_start
from megarlhf.trainers.reward_measures import OF_PAIRS, measure_pairs, measure_scores
from megarlhf.trainers.summary import as_estimate, as_share
from megarlhf.trainers.trainer import Pupil


def couple(
    pairs: PreferencePairs | None, labelled: LabelledResponses | None, pointwise_weight: float, *, beside: int = 0
) -> Couples:
    """One step's batch, its weights scaled so that the mean over couples is the loss of trainers/reward.py's head.

    beside: couples of other rows that the step has.
    """
    if pairs is None and labelled is None:
        raise ValueError("couple: neither pairs nor labelled responses; give at least one.")
    count = (len(pairs) if pairs else 0) + (len(labelled) // 2 if labelled else 0) + beside
    parts = [_from_pairs(pairs, count)] if pairs else []
    return cat([*parts, _from_labelled(labelled, count, pointwise_weight)] if labelled else parts)


def _from_pairs(pairs: PreferencePairs, couples: int) -> Couples:
    unjudged = torch.zeros(2 * len(pairs))
    weight = pairs.weight * (couples / float(pairs.weight.sum()))
    return Couples(pairs.tokens, pairs.lengths, weight, unjudged, unjudged)


def _from_labelled(labelled: LabelledResponses, couples: int, pointwise_weight: float) -> Couples:
    weight = labelled.weight * (pointwise_weight * couples / float(labelled.weight.sum()))
    return Couples(labelled.tokens, labelled.lengths, torch.zeros(len(labelled) // 2), labelled.correct, weight)


def outcome_loss(scores: Tensor, rows: Couples, cfg: JudgedConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Pairwise plus pointwise loss over couples, summed, and the sums of its metrics.

    scores: [2C], at the last tokens.
    """
    metrics: dict[str, Tensor] = {}
    total = scores.new_zeros(())
    if cfg.pairs is not None:
        pairwise, seen = bradley_terry_loss(scores[0::2], scores[1::2], rows.pair_weight)
        total = total + pairwise
        metrics["reward/pairwise_loss"] = pairwise.detach()
        metrics["reward/pair_accuracy"] = seen["accuracy"]
        metrics["reward/margin_mean"] = seen["score_gap"]
    if cfg.labelled is not None:
        # The weights carry pointwise_weight; the metrics are reported without it.
        pointwise, seen = pointwise_loss(scores, rows.correct, rows.point_weight)
        total = total + pointwise
        metrics["reward/pointwise_loss"] = pointwise.detach() / cfg.pointwise_weight
        metrics["reward/accuracy"] = seen["accuracy"] / cfg.pointwise_weight
    return total, metrics


def logged(cfg: JudgedConfig) -> set[str]:
    """Metrics of every step."""
    pairwise = {"reward/pairwise_loss", "reward/pair_accuracy", "reward/margin_mean"} if cfg.pairs else set()
    pointwise = {"reward/pointwise_loss", "reward/accuracy"} if cfg.labelled else set()
    return {"reward/loss", "reward/grad_norm", "reward/learning_rate", *pairwise, *pointwise}


def measured(cfg: JudgedConfig) -> set[str]:
    """Metrics of held-out data, as eval_every says. Without it the AUC comes with the numbers that normalise scores."""
    return (set(OF_PAIRS) if cfg.heldout_pairs else set()) | (
        {"reward/auc"} if cfg.heldout and cfg.eval_every else set()
    )


def measure_outcomes(role: Role, cfg: JudgedConfig, inputs: JudgedInputs) -> Metrics:
    """What is held out, as `measured` lists it. Collective; equal on every rank."""
    found = measure_pairs(role, inputs.heldout_pairs) if inputs.heldout_pairs else {}
    if inputs.heldout is None or not cfg.eval_every:
        return found
    responses = inputs.heldout.batch(torch.arange(len(inputs.heldout)))
    of_responses = measure_scores(role, responses, heldout=True)
    return {**found, **{name: value for name, value in of_responses.items() if name.startswith("reward/auc")}}


def outcomes_said(cfg: JudgedConfig, metrics: Metrics) -> list[str]:
    """What is said at the end of outcomes, of the last metrics."""
    return [
        *as_share(metrics, "reward/pair_accuracy", cfg.pairs_batch),
        *as_share(metrics, "reward/heldout_pair_accuracy", metrics.get("reward/heldout_pairs", 0)),
        *as_estimate(metrics, "reward/auc", 0.0, 1.0),
    ]


@dataclass(frozen=True)
class Course(Generic[RowsT]):
    """What a model learns, and how it is measured meanwhile."""

    title: str
    batch: Callable[[Mapping[str, Any]], RowsT]
    """A step's batch, of the rows that were drawn of each set, by its setting."""
    loss: Loss[RowsT]
    measure: Callable[[], Metrics] | None
    """Of what is held out; None where nothing is."""
    card: Card
    """What the model's directory says of it, beside its scores."""


def take(
    course: Course[RowsT], pupil: Pupil, cfg: JudgedConfig, inputs: JudgedInputs, argv: Sequence[str], mesh: Mesh
) -> Metrics:
    """Train, measure, normalise and save. Collective; returns the last metrics."""
    responses = responses_to_measure(inputs)
    role = pupil.role
    print_choices(role.settings.compute.choices, mesh)
    print_memory_plan([role], mesh)
    facts = say_start(cfg, inputs, mesh)
    if responses is not None and inputs.heldout is None and cfg.normalise != "none":
        used = f"{len(responses)} training responses"
        print_remark(f"heldout is unset: normalise={cfg.normalise} measures the scores of {used}", mesh)
    learnt = {name: inputs.sets[name] for name in cfg.batches}
    loaders = {name: Loader(len(learnt[name]), batch, seed=cfg.seed) for name, batch in cfg.batches.items()}
    guard = StepGuard(cfg.run_dir, cfg.max_skipped_steps, mesh)
    run = Run(cfg, pupil.learners, {role.name: course.card}, loaders, guard, mesh)
    clock = Clock(mesh.device, mesh.trail, mesh.work)
    measuring = Measuring(cfg, inputs.steps, course.measure, clock, mesh)

    def step(index: int) -> Metrics:
        with clock("train"):
            drawn = {name: rows.batch(next(loaders[name])) for name, rows in learnt.items()}
            update = role.update(course.batch(drawn), course.loss)
        guard.check(role, update, index)
        found = measuring.after(index + 1)
        return {
            "reward/loss": update.means.loss,
            **update.means.metrics,
            "reward/grad_norm": update.grad_norm,
            "reward/learning_rate": update.learning_rate,
            "train/skipped_steps": guard.skipped,
            **found,
            **clock.metrics(),
        }

    with open_run(cfg.pinned(inputs.tokenizer.date), argv, run) as writer:
        leave_about(cfg.run_dir, facts, mesh)
        metrics = run_steps(
            inputs.steps,
            course.title,
            step,
            ("reward/loss",),
            run=run,
            writer=writer,
            ready=lambda first: measuring.begin(first, writer),
            enough=lambda _: measuring.ends(),
        )
        found = measure_scores(role, responses, heldout=inputs.heldout is not None) if responses is not None else {}
        metrics = {**metrics, **found}
        if writer is not None and found:
            writer.log(found, measuring.steps)
    measuring.conclude()
    save_model(role, cfg.model_dir, scored(course.card, cfg, metrics))
    return metrics


def scored(card: Card, cfg: JudgedConfig, metrics: Metrics) -> Card:
    """The card with what normalises the scores."""
    offset = 0.0 if cfg.normalise == "none" else metrics["reward/centre"]
    scale = metrics["reward/score_std"] if cfg.normalise == "standardise" else 1.0
    wrong = metrics.get("reward/score_wrong_mean")
    told = None if wrong is None else (wrong - offset) / scale
    return replace(card, score_offset=offset, score_scale=scale, score_wrong=told)
