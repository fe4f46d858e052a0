"""Reward models from preference pairs, from labelled responses, or from both.

Pairwise (Bradley-Terry), pointwise (binary correctness), or both in one model with a weight:

    L = mean over pairs of -log sigmoid(r(chosen) - r(rejected))
        + pointwise_weight * mean over responses of BCE(r, correct)

Both means are over the whole step, whatever its split: a step is one batch of couples of sequences, each carrying the
weights that make the mean over couples the formula above.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from megarlhf.batch.base import cat
from megarlhf.batch.supervised import Couples, LabelledResponses, PreferencePairs
from megarlhf.checkpoint.model_directory import Card, ModelDescription, save_model
from megarlhf.config.base import FreeToChange
from megarlhf.data.loader import Loader
from megarlhf.data.preferences import LabelledData, LabelledSet, PreferenceSet, load_labelled, load_preferences
from megarlhf.data.rows import DataConfig
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import SequenceScores
from megarlhf.models.role import Role, TrainableRole
from megarlhf.observe.about import About
from megarlhf.observe.clock import Clock
from megarlhf.observe.metrics import Metrics, names_of
from megarlhf.ops.preference_loss import bradley_terry_loss, pointwise_loss
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Loss, LossSums, States
from megarlhf.runs.guard import StepGuard
from megarlhf.runs.loop import Run, run_steps
from megarlhf.runs.measuring import Measuring, check_measuring
from megarlhf.runs.opening import open_run
from megarlhf.runs.settings import RunConfig
from megarlhf.runtime.about import about, leave_about
from megarlhf.runtime.checks import (
    Model,
    check_batch,
    check_longest,
    check_rows,
    check_tokenizer,
    checked_model,
    resolve_tokenizer,
)
from megarlhf.runtime.roles import learner, print_choices, print_dropped, print_memory_plan, print_remark
from megarlhf.runtime.said import DataSet, remarks, say, say_data
from megarlhf.runtime.texts import check_apart, check_one_day, chosen_data, chosen_heldout
from megarlhf.trainers.reward_measures import measure_pairs, measure_scores
from megarlhf.trainers.summary import as_estimate, as_share, plainly
from megarlhf.trainers.trainer import Learner, Pupil, Trainer

MEASURED = 1024
"""Training responses of a kind that stand in for held-out ones."""


class RewardConfig(RunConfig):
    """`megarlhf reward`: a reward model from pairs, from judged responses, or from both."""

    first: ClassVar[tuple[str, ...]] = (
        *("run_dir", "model", "pairs.source", "labelled.source", "heldout.source", "epochs", "optim.lr"),
        *("pairs_batch", "labelled_batch", "micro_batch", "layout.data", "layout.tensor"),
    )
    needed: ClassVar[tuple[str, ...]] = ("model",)

    model: str = ""
    """Where the body starts: a model directory (usually the SFT model), or a preset drawn from `seed`."""
    tokenizer: str = ""
    """Tokenizer directory, `arithmetic` or `programs` for a built-in one, or empty for the model's own."""
    pairs: DataConfig | None = None
    """Preference pairs: columns prompt, chosen, rejected, and optionally margin."""
    labelled: LabelledData | None = None
    """Judged responses: columns prompt, response, correct (0 to 1, or to `labelled.scale`)."""
    heldout: LabelledData | None = None
    """Judged responses to measure AUC on, and to normalise the scores by; without them it is done by training rows."""
    heldout_pairs: Annotated[DataConfig | None, FreeToChange(said=True)] = None
    """Pairs to measure order, margin and calibration on, as eval_every says, by the scores before `normalise`."""
    pointwise_weight: float = Field(default=1.0, gt=0)
    """Weight of the pointwise term. Source: the paper gives none; 1 weighs the terms equally."""
    pairs_batch: int = Field(default=64, ge=1)
    """Pairs per optimiser step, over all data ranks; used where `pairs` is set."""
    labelled_batch: int = Field(default=128, ge=2)
    """Judged responses per optimiser step, an even number; used where `labelled` is set."""
    normalise: Literal["none", "centre", "standardise"] = "centre"
    """What is done to scores: shift their mean to 0, and divide by their spread too. Both are measured on `heldout`,
    and where that is unset on up to 1024 responses of the training data (a pair has two).
    Source: centre is Huang et al. 2024; standardise is Ziegler et al. 2019."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
    """Optimiser."""
    epochs: Annotated[float, FreeToChange(said=True, ends=True)] = Field(default=1.0, gt=0)
    """Passes over the larger of the two data sets; more tend to over-fit. Source: Huang et al. 2024 use 1.
    A run that is done goes on with more."""


def couple(pairs: PreferencePairs | None, labelled: LabelledResponses | None, pointwise_weight: float) -> Couples:
    """One step's batch, its weights scaled so that the mean over couples is the loss of this module's head."""
    if pairs is not None and labelled is None:
        return _from_pairs(pairs, len(pairs))
    if labelled is not None and pairs is None:
        return _from_labelled(labelled, len(labelled) // 2, pointwise_weight)
    if pairs is None or labelled is None:
        raise ValueError("couple: neither pairs nor labelled responses; give at least one.")
    count = len(pairs) + len(labelled) // 2
    return cat([_from_pairs(pairs, count), _from_labelled(labelled, count, pointwise_weight)])


def _from_pairs(pairs: PreferencePairs, couples: int) -> Couples:
    unjudged = torch.zeros(2 * len(pairs))
    weight = pairs.weight * (couples / float(pairs.weight.sum()))
    return Couples(pairs.tokens, pairs.lengths, weight, unjudged, unjudged)


def _from_labelled(labelled: LabelledResponses, couples: int, pointwise_weight: float) -> Couples:
    weight = labelled.weight * (pointwise_weight * couples / float(labelled.weight.sum()))
    return Couples(labelled.tokens, labelled.lengths, torch.zeros(len(labelled) // 2), labelled.correct, weight)


def judgement_loss(role: TrainableRole, cfg: RewardConfig) -> Loss[Couples]:
    """Pairwise plus pointwise loss over couples."""

    def loss(states: States, rows: Couples) -> LossSums:
        scores = role.reading(role.model, states, rows)
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
        return LossSums(total, len(rows), metrics, len(rows))

    return loss


@dataclass(frozen=True)
class RewardInputs:
    """Everything that was read and checked before a model is built."""

    model: ModelDescription
    tokenizer: Tokenizer
    data: Mapping[str, DataConfig]
    """Of each set that there is."""
    pairs: PreferenceSet | None
    labelled: LabelledSet | None
    heldout: LabelledSet | None
    heldout_pairs: PreferenceSet | None
    shared: Sequence[str]
    """What is to be said of rows that are held out, and learnt from."""
    steps: int


def _logged(cfg: RewardConfig) -> set[str]:
    """Metrics of every step."""
    pairwise = {"reward/pairwise_loss", "reward/pair_accuracy", "reward/margin_mean"} if cfg.pairs else set()
    pointwise = {"reward/pointwise_loss", "reward/accuracy"} if cfg.labelled else set()
    return {"reward/loss", "reward/grad_norm", "reward/learning_rate", *pairwise, *pointwise}


def _measured(cfg: RewardConfig) -> set[str]:
    """Metrics of held-out data, as eval_every says. Without it the AUC comes with the numbers that normalise scores."""
    of_pairs = {name for name in names_of("reward") if "heldout" in name} if cfg.heldout_pairs else set[str]()
    return of_pairs | ({"reward/auc"} if cfg.heldout and cfg.eval_every else set())


def prepare(cfg: RewardConfig) -> RewardInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    cfg.check_run_dir()
    if cfg.pairs is None and cfg.labelled is None:
        raise ConfigError(
            "reward model without data: pairs and labelled are both unset; set pairs.source or labelled.source."
        )
    check_measuring(
        cfg, _logged(cfg), _measured(cfg), "set heldout_pairs.source, or heldout.source for judged responses"
    )
    if cfg.labelled_batch % 2:
        raise ConfigError(
            f"labelled_batch={cfg.labelled_batch} is odd; responses travel two by two, use an even number."
        )
    model = checked_model(cfg.model, cfg.layout, "model")
    start_from = Model("model", cfg.model, model)
    tokenizer = resolve_tokenizer(cfg.tokenizer, start_from, cfg.pinned_date)
    check_tokenizer(tokenizer, model.spec, "model")
    data = {name: _chosen(name, rows, start_from) for name, rows in _given(cfg).items()}
    compared = {name: load_preferences(rows, tokenizer, name) for name, rows in data.items() if name in PAIRS}
    judged = {
        name: load_labelled(rows, tokenizer, name, rows.scale)
        for name, rows in data.items()
        if isinstance(rows, LabelledData)
    }
    pairs, labelled = compared.get("pairs"), judged.get("labelled")
    couples = (cfg.pairs_batch if pairs else 0) + (cfg.labelled_batch // 2 if labelled else 0)
    check_batch("pairs_batch + labelled_batch / 2", couples, cfg.layout, cfg.micro_batch)
    for name, rows in {**compared, **judged}.items():
        check_longest(name, rows.longest, model.spec)
    steps = 1
    for name, rows, batch in (("pairs", pairs, cfg.pairs_batch), ("labelled", labelled, cfg.labelled_batch)):
        if rows is not None:
            check_rows(f"{name}_batch", batch, name, len(rows))
            steps = max(steps, round(cfg.epochs * len(rows) / batch))
    heldout, heldout_pairs = judged.get("heldout"), compared.get("heldout_pairs")
    shared = []
    if heldout is not None and labelled is not None:
        shared.append(check_apart("heldout", heldout.tokens, {"labelled": labelled.tokens}))
    if heldout_pairs is not None and pairs is not None:
        shared.append(check_apart("heldout_pairs", heldout_pairs.sides, {"pairs": pairs.sides}))
    cfg.optim.check(steps, "optim")
    cfg.check_more(steps, f"epochs={cfg.epochs:g}")
    return RewardInputs(model, tokenizer, data, pairs, labelled, heldout, heldout_pairs, shared, steps)


PAIRS = ("pairs", "heldout_pairs")
"""Settings of pairs; the others are of judged responses."""


def _given(cfg: RewardConfig) -> dict[str, DataConfig]:
    """Of each set that there is, in the order in which they are said."""
    learnt = {"pairs": cfg.pairs, "labelled": cfg.labelled}
    every = {**learnt, "heldout": cfg.heldout, "heldout_pairs": cfg.heldout_pairs}
    return {name: rows for name, rows in every.items() if rows}


def _chosen(name: str, rows: DataConfig, start_from: Model) -> DataConfig:
    return chosen_heldout(rows, name, start_from) if "heldout" in name else chosen_data(rows, name, start_from)


def train(cfg: RewardConfig, inputs: RewardInputs, argv: Sequence[str], mesh: Mesh) -> Metrics:
    """Train, measure, normalise and save. Collective; returns the last metrics."""
    check_one_day(inputs.tokenizer, mesh)
    responses = responses_to_measure(inputs)
    pupil = models(cfg, inputs, mesh)
    role = pupil.role
    print_choices(role.settings.compute.choices, mesh)
    print_memory_plan([role], mesh)
    pairs, labelled = inputs.pairs, inputs.labelled
    facts = _say_start(cfg, inputs, mesh)
    if inputs.heldout is None and cfg.normalise != "none":
        used = f"{len(responses)} training responses"
        print_remark(f"heldout is unset: normalise={cfg.normalise} measures the scores of {used}", mesh)
    pair_loader = Loader(len(pairs), cfg.pairs_batch, seed=cfg.seed) if pairs else None
    point_loader = Loader(len(labelled), cfg.labelled_batch, seed=cfg.seed) if labelled else None
    guard = StepGuard(cfg.run_dir, cfg.max_skipped_steps, mesh)
    loaders = {name: loader for name, loader in (("pairs", pair_loader), ("labelled", point_loader)) if loader}
    card = Card(inputs.tokenizer, next(iter(inputs.data.values())), cfg.model)
    run = Run(cfg, pupil.learners, {role.name: card}, loaders, guard, mesh)
    clock = Clock(mesh.device, mesh.trail, mesh.work)
    measure = partial(measure_heldout, role, cfg, inputs) if _measured(cfg) else None
    measuring = Measuring(cfg, inputs.steps, measure, clock, mesh)

    def step(index: int) -> Metrics:
        with clock("train"):
            batch = couple(
                pairs.batch(next(pair_loader)) if pairs and pair_loader else None,
                labelled.batch(next(point_loader)) if labelled and point_loader else None,
                cfg.pointwise_weight,
            )
            update = role.update(batch, judgement_loss(role, cfg))
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
            "reward model",
            step,
            ("reward/loss",),
            run=run,
            writer=writer,
            ready=lambda first: measuring.begin(first, writer),
            enough=lambda _: measuring.ends(),
        )
        found = measure_scores(role, responses, heldout=inputs.heldout is not None)
        metrics = {**metrics, **found}
        if writer is not None:
            writer.log(found, measuring.steps)
    measuring.conclude()
    offset = 0.0 if cfg.normalise == "none" else metrics["reward/centre"]
    scale = metrics["reward/score_std"] if cfg.normalise == "standardise" else 1.0
    wrong = metrics.get("reward/score_wrong_mean")
    scored = None if wrong is None else (wrong - offset) / scale
    save_model(role, cfg.model_dir, replace(card, score_offset=offset, score_scale=scale, score_wrong=scored))
    return metrics


def _say_start(cfg: RewardConfig, inputs: RewardInputs, mesh: Mesh) -> About:
    given = {
        "pairs": (inputs.pairs, cfg.pairs_batch),
        "labelled": (inputs.labelled, cfg.labelled_batch),
        "heldout": (inputs.heldout, 0),
        "heldout_pairs": (inputs.heldout_pairs, 0),
    }
    for name, (rows, _) in given.items():
        if rows is not None:
            print_dropped(name, rows.dropped, rows.origin.distinct(len(rows)), mesh)
    asked = _given(cfg)
    sets = [DataSet(name, asked[name], inputs.data[name], rows) for name, (rows, _) in given.items() if rows]
    learnt = {name: (batch, rows) for name, (rows, batch) in given.items() if batch and rows}
    epochs = {name: inputs.steps * batch / len(rows) for name, (batch, rows) in learnt.items()}
    say_data(sets, inputs.tokenizer, mesh, epochs=epochs)
    start_from = Model("model", cfg.model, inputs.model)
    found = remarks(sets, inputs.tokenizer, start_from)
    say([*found, *filter(None, inputs.shared)], mesh)
    templates = {each.name: each.data.rendering for each in sets}
    if len(set(templates.values())) > 1:
        used = ", ".join(f"{name}.template={template}" for name, template in templates.items())
        say([f"prompts are rendered differently ({used}); the model is said to be of the first"], mesh)
    batches = " and ".join(f"{batch:,} rows of {name}" for name, (batch, _) in learnt.items())
    say([f"steps: {inputs.steps:,}, each of {batches}"], mesh)
    return about(cfg, {"model": start_from}, sets, mesh, epochs=epochs, steps=inputs.steps)


def models(cfg: RewardConfig, inputs: RewardInputs, mesh: Mesh) -> Pupil:
    """The model, ready to learn. Collective."""
    body = Model("model", cfg.model, inputs.model)
    return Pupil(learner("reward", body, SequenceScores(), cfg.optim, inputs.steps, cfg, mesh))


def responses_to_measure(inputs: RewardInputs) -> LabelledResponses:
    """All held-out responses; without any, training responses evenly from the data, a chosen one right, its twin wrong.

    Without held-out ones the mean is still that of the responses the scores are for, while the spread is flattered.
    """
    if inputs.heldout is not None:
        return inputs.heldout.batch(torch.arange(len(inputs.heldout)))
    parts = []
    if inputs.pairs is not None:
        pairs = inputs.pairs.batch(_evenly(len(inputs.pairs), MEASURED // 2))
        right = torch.tensor([1.0, 0.0]).repeat(len(pairs))
        parts.append(LabelledResponses(pairs.tokens, pairs.lengths, right, torch.ones_like(right)))
    if inputs.labelled is not None:
        parts.append(inputs.labelled.batch(_evenly(len(inputs.labelled), MEASURED)))
    return cat(parts)


def _evenly(rows: int, most: int) -> Tensor:
    return torch.arange(rows)[:: -(-rows // most)]


def measure_heldout(role: Role, cfg: RewardConfig, inputs: RewardInputs) -> Metrics:
    """What is held out, as `_measured` lists it. Collective; equal on every rank."""
    found = measure_pairs(role, inputs.heldout_pairs) if inputs.heldout_pairs else {}
    if inputs.heldout is None or not cfg.eval_every:
        return found
    of_responses = measure_scores(role, responses_to_measure(inputs), heldout=True)
    return {**found, **{name: value for name, value in of_responses.items() if name.startswith("reward/auc")}}


def _summary(cfg: RewardConfig, metrics: Metrics) -> list[str]:
    return [
        *plainly(metrics, "reward/loss"),
        *as_share(metrics, "reward/pair_accuracy", cfg.pairs_batch),
        *as_share(metrics, "reward/heldout_pair_accuracy", metrics.get("reward/heldout_pairs", 0)),
        *as_estimate(metrics, "reward/auc", 0.0, 1.0),
    ]


def _following(cfg: RewardConfig) -> tuple[str, ...]:
    actor, model = shlex.quote(cfg.model), shlex.quote(str(cfg.model_dir))
    return (f"megarlhf ppo actor.init={actor} reward.init={model} prompts.source=FILE",)


TRAINER = Trainer(
    config=RewardConfig,
    prepare=prepare,
    models=models,
    learners={"reward": Learner(Couples, judgement_loss)},
    train=train,
    summary=_summary,
    following=_following,
)
