"""The floor that the pages of reinforcement learning stand on: the cast, the turns, passes over rollouts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from megarlhf.batch.rollouts import LearnerRows, PolicyRows, Prompts, Rollout
from megarlhf.checkpoint.model_directory import Card, save_model
from megarlhf.data.loader import Loader
from megarlhf.data.reasoning_gym import ReasoningGymConfig, is_task
from megarlhf.data.rows import BUILT_IN, PROGRAMS
from megarlhf.gates.cheap import Lesson, cheap_gates, gate_prompts
from megarlhf.gates.gate import check_gates
from megarlhf.judges.panel import Court, Judgement, Panel, build_panel
from megarlhf.judges.process_model import rewarding_steps
from megarlhf.judges.shaping import Shaper
from megarlhf.judges.texts import Reader
from megarlhf.judges.verifiers import verifier_remark
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole, Role, TrainableRole, Update
from megarlhf.models.unadapted import UnadaptedRole
from megarlhf.observe.about import About
from megarlhf.observe.clock import Clock
from megarlhf.observe.metrics import Metrics
from megarlhf.observe.writers import RunWriter, read_metrics
from megarlhf.parallel.collectives import broadcast_object
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Loss
from megarlhf.parallel.rng import derive_seed, generator
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import SamplingConfig
from megarlhf.runs.guard import StepGuard
from megarlhf.runs.loop import Run, run_steps
from megarlhf.runs.measuring import Measuring
from megarlhf.runs.opening import open_run
from megarlhf.runtime.about import about, leave_about
from megarlhf.runtime.policy_models import PolicyModels
from megarlhf.runtime.roles import (
    away,
    frozen,
    learner,
    print_choices,
    print_dropped,
    print_memory_plan,
    print_remark,
)
from megarlhf.runtime.said import DataSet, ends, remarks, say, say_data
from megarlhf.trainers.heldout import measure_policy
from megarlhf.trainers.kl_coefficient import KLCoefficient
from megarlhf.trainers.policy_config import PolicyConfig, PolicyInputs, prepare
from megarlhf.trainers.policy_metrics import accuracy_metric, sample_rows
from megarlhf.trainers.policy_work import policy_workload
from megarlhf.trainers.shadow import shadow_metrics
from megarlhf.trainers.summary import as_mean, as_share, plainly
from megarlhf.trainers.trainer import Learner, Trainer
from megarlhf.trainers.watch import Watch

SHOWN = ("rollout/score_mean", "rollout/accuracy")
"""Metrics beside the progress bar."""


@dataclass(frozen=True, kw_only=True)
class Cast(PolicyModels):
    """What a page is handed; an algorithm with more models adds them to `every` and to `learners`."""

    panel: Panel
    """Who says what responses are worth."""
    shaper: Shaper
    """What makes of that what is learnt from."""
    kl: KLCoefficient
    """What a nat of distance to the reference costs."""

    @property
    def every(self) -> tuple[Role, ...]:
        """All models, those of judges too."""
        return (*super().every, *self.panel.roles)


CastT = TypeVar("CastT", bound=Cast)
Cfg = TypeVar("Cfg", bound=PolicyConfig)


@dataclass(frozen=True)
class Turn:
    """One iteration of a run, as its page is handed it."""

    number: int
    """Of the iteration, from 0."""
    run_seed: int
    clock: Clock
    guard: StepGuard
    more: Callable[[int], Prompts]
    """So many prompts more, those that come next, where an iteration draws more than once. Equal on every rank."""

    def seed(self, purpose: str, *which: int) -> int:
        """Of what is drawn in this iteration for `purpose`; `which` of several, where there are."""
        return derive_seed(self.run_seed, purpose, self.number, *which)

    def due(self, every: int) -> bool:
        """Whether what is done every so many iterations is done in this one, as in the first; 0 is never."""
        return every > 0 and self.number % every == 0


@dataclass(frozen=True)
class Iteration:
    """What one iteration made, and its metrics; equal on every rank."""

    rollout: Rollout
    judgement: Judgement
    metrics: Metrics


def optimise(role: TrainableRole, loss: Loss, rows: LearnerRows, turn: Turn, cfg: PolicyConfig) -> list[Update]:
    """The settings' passes over the rows in their mini-batches, the same for every learner of the iteration."""
    updates: list[Update] = []
    # On the host, where its rows are cut without waiting for the device, and take none of its memory.
    waiting = rows.to("cpu")
    with role.resident(*role.parts):
        for epoch in range(cfg.passes):
            order = generator(turn.run_seed, "mini_batches", turn.number, epoch)
            for batch in waiting.mini_batches(cfg.rollouts_per_step, order):
                updates.append(role.update(batch, loss))
                turn.guard.check(role, updates[-1], turn.number)
    return updates


def old_logprobs(actor: Role, rollout: Rollout, cfg: PolicyConfig) -> Tensor:
    """[B, T]: what ratio and KL start from, recomputed by the trainer's forward or the sampler's own. Collective."""
    return rollout.sampler_logprobs if cfg.old_logprobs == "sampler" else actor.score(rollout)


def build_cast(cfg: PolicyConfig, inputs: PolicyInputs, mesh: Mesh) -> Cast:
    """Load the models one after another, each moved off the device before the next arrives. Collective."""
    logprobs = LabelLogprobs(cfg.sampling.temperature)
    court = Court(inputs.models, Reader(inputs.prompts, inputs.tokenizer, mesh, cfg.timeout_s), cfg)
    start, learns = inputs.models["actor"], cfg.actor
    actor = away(learner("actor", start, logprobs, learns.optim, cfg.actor_steps, cfg, mesh, learns.lora))
    panel = build_panel(cfg.panel, inputs.verifier, court)
    longest = inputs.prompts.longest + cfg.sampling.max_new_tokens
    reference = build_reference(cfg, inputs, actor)
    return Cast(
        actor=actor,
        sampler=RolloutEngine.of(actor, inputs.tokenizer, longest, cfg.rollout),
        reference=reference,
        panel=panel,
        shaper=Shaper(
            cfg.shaping,
            cfg.group_size,
            cfg.sampling.max_new_tokens,
            panel.wrong_score,
            by_step=bool(rewarding_steps(cfg.panel)),
        ),
        kl=cfg.kl_coefficient,
    )


def build_reference(cfg: PolicyConfig, inputs: PolicyInputs, actor: TrainableRole) -> FrozenRole | None:
    """What the actor is kept near, where anything is: a model, or the actor's own weights where adapters learn."""
    model = inputs.models.get("reference")
    if model is None:
        return None
    if cfg.reads_actor_as_reference:
        return UnadaptedRole("reference", actor)
    return away(frozen("reference", model, LabelLogprobs(cfg.sampling.temperature), cfg, actor.mesh))


def policy_trainer(
    config: type[Cfg],
    iteration: Callable[[CastT, Prompts, Cfg, Turn], Iteration],
    *,
    models: Callable[[Cfg, PolicyInputs, Mesh], CastT],
    learners: Mapping[str, Learner[Cfg, Any]],
) -> Trainer[Cfg, PolicyInputs, CastT]:
    """What a module of an algorithm exports as TRAINER: its settings, its page, and who learns what.

    models: `build_cast`, or what adds to it. learners: by role, the actor's among them, who learns from PolicyRows, or
    what derives from them, by a loss that reports ratio, clip_fraction, approx_kl and entropy: gates measure it, and
    `policy_metrics` logs it.
    Raises:   ValueError where the actor learns from other rows.
    """
    if not issubclass(learners["actor"].rows, PolicyRows):
        raise ValueError(f"the actor learns from {learners['actor'].rows.__name__}; gates need it to be PolicyRows.")

    def train(cfg: Cfg, inputs: PolicyInputs, cast: CastT, argv: Sequence[str], _: Mesh) -> Metrics:
        lesson = Lesson(learners["actor"].rows, learners["actor"].loss(cast.actor, cfg))
        return _train(cast, partial(iteration, cast), lesson, cfg, inputs, argv)

    return Trainer(
        config=config,
        prepare=prepare,
        models=models,
        learners=learners,
        workload=lambda cfg: policy_workload(cfg, learners),
        train=train,
        summary=_summary,
        following=_following,
    )


def _train(
    cast: Cast,
    iteration: Callable[[Prompts, Cfg, Turn], Iteration],
    lesson: Lesson,
    cfg: Cfg,
    inputs: PolicyInputs,
    argv: Sequence[str],
) -> Metrics:
    """Run every iteration and save the actor; `lesson` is the actor's, for the gates."""
    mesh = cast.actor.mesh
    facts = _say_start(cast, cfg, inputs, mesh)
    loader = Loader(len(inputs.prompts), cfg.prompts_per_iteration, seed=cfg.seed)
    guard = StepGuard(cfg.run_dir, cfg.max_skipped_steps, mesh)
    cards = {
        name: Card(
            inputs.tokenizer,
            inputs.data,
            model.init,
            score_offset=model.description.score_offset,
            score_scale=model.description.score_scale,
        )
        for name, model in inputs.models.items()
        if name in cast.learners
    }
    run = Run(cfg, cast.learners, cards, {"prompts": loader, **cast.shaper.parts, **cast.kl.parts}, guard, mesh)
    clock, watch = Clock(mesh.device, mesh.trail, mesh.work), Watch(cfg)
    measuring = Measuring(cfg, cfg.iterations, _measure(cast, cfg, inputs), clock, mesh)

    def step(number: int, writer: RunWriter | None) -> Metrics:
        turn = Turn(number, cfg.seed, clock, guard, more=lambda count: inputs.prompts.batch(loader.take(count)))
        done = iteration(inputs.prompts.batch(next(loader)), cfg, turn)
        metrics = {**done.metrics, **accuracy_metric(done.judgement.correct), "train/skipped_steps": guard.skipped}
        metrics |= cast.sampler.refits() | shadow_metrics(cast.actor, done.rollout, cfg.compute, number)
        warnings, said = watch.look(metrics)
        print_remark("\n".join(said), mesh)
        measured = measuring.after(number + 1, ending=watch.ends())
        timed = clock.metrics()  # without what follows, which is for the reader
        if writer is not None and turn.due(cfg.samples_every):
            rows = sample_rows(done.rollout, done.judgement, cfg.samples, inputs.tokenizer, inputs.prompts)
            writer.samples(rows, number + 1)
        return {**metrics, **timed, **warnings, **measured}

    def ready(first: int) -> None:
        steps = [row for row in read_metrics(cfg.run_dir).rows if row["step"]] if mesh.is_main else []
        watch.restore(broadcast_object(steps[:first], mesh, "world"))
        if cfg.gates == "on":
            prompts = gate_prompts(inputs.prompts, mesh)
            same = cfg.reference_init == cfg.actor.init and first <= cfg.first_iteration
            check_gates(cheap_gates(cast, prompts, lesson, cfg.sampling, seed=cfg.seed, reference_is_actor=same))
            cast.sampler.refits()  # for the gates' responses: none of the first iteration's
        measuring.begin(first, writer)

    with open_run(cfg.pinned(inputs.tokenizer.date), argv, run) as writer:
        leave_about(cfg.run_dir, facts, mesh)
        metrics = run_steps(
            cfg.iterations,
            _title(type(cfg)),
            lambda number: step(number, writer),
            SHOWN,
            run=run,
            writer=writer,
            ready=ready,
            enough=lambda _: watch.ends() or measuring.ends(),
        )
    if watch.ends():
        print_remark(watch.conclusion(), mesh)
    measuring.conclude()
    save_model(cast.actor, cfg.model_dir, cards["actor"])
    return metrics


def _measure(cast: Cast, cfg: PolicyConfig, inputs: PolicyInputs) -> Callable[[], Metrics] | None:
    """What measures the actor on the held-out prompts; None where there are none."""
    if inputs.heldout is None:
        return None
    reader = Reader(inputs.heldout.prompts, inputs.tokenizer, cast.actor.mesh, cfg.timeout_s)
    panel = cast.panel.reading(reader)
    return partial(measure_policy, cast, panel, reader, cfg.sampling, rollout=cfg.rollout, seed=cfg.seed)


def _title(config: type[PolicyConfig]) -> str:
    """Of an algorithm: its settings' name."""
    return config.__name__.removesuffix("Config")


def _say_start(cast: Cast, cfg: PolicyConfig, inputs: PolicyInputs, mesh: Mesh) -> About:
    print_choices([*cast.actor.settings.compute.choices, cfg.policy_loss_choice], mesh)
    print_memory_plan(cast.every, mesh, copies=cast.sampler.copies)
    sets = [DataSet("prompts", cfg.prompts, inputs.data, inputs.prompts)]
    heldout = inputs.heldout
    if heldout is not None:
        sets.append(DataSet("heldout", heldout.asked, heldout.data, heldout.prompts))
    for each in sets:
        print_dropped(each.name, each.rows.dropped, each.rows.origin.distinct(len(each.rows)), mesh)
    epochs = {"prompts": cfg.iterations * cfg.prompts_per_iteration / len(inputs.prompts)}
    say_data(sets, inputs.tokenizer, mesh, epochs=epochs)
    actor, *others = inputs.distinct
    say([*remarks(sets, inputs.tokenizer, actor, others), ends(inputs.tokenizer)], mesh)
    doubts = [inputs.doubts, heldout.shared if heldout else ""]
    say([verifier_remark(inputs.verifier, inputs.prompts), *filter(None, doubts)], mesh)
    each = f"{cfg.rollouts_per_iteration:,} rollouts and {cfg.steps_per_iteration:,} optimiser steps of each learner"
    say([f"iterations: {cfg.iterations:,}, each of {each}"], mesh)
    print_remark("\n".join(filter(None, [*cfg.remarks, cut_score_remark(cfg, cast.panel.wrong_score)])), mesh)
    return about(cfg, inputs.models, sets, mesh, epochs=epochs, steps=cfg.iterations, unit="iterations")


def cut_score_remark(cfg: PolicyConfig, wrong: float) -> str:
    """Whether the score that was set for cut responses is above the mean score of wrong ones; empty where it is not."""
    score = cfg.shaping.missing_eos if cfg.shaping.normalise == "none" else None  # which moves what wrong ones get
    if score is None or score == "auto" or score <= wrong:
        return ""
    return (
        f"shaping.missing_eos={score:g} is more than {wrong:.2f}, what {', '.join(cfg.panel)} gives wrong responses on "
        "average: being cut will pay more than being wrong; leave it at auto, or set it lower."
    )


def _summary(cfg: PolicyConfig, metrics: Metrics) -> list[str]:
    """Responses to one prompt are alike: the prompts are what is independent."""
    prompts = metrics.get("rollout/verified", 0) // cfg.group_size
    score = as_mean(metrics, "rollout/score_mean", "rollout/score_std", cfg.prompts_per_iteration)
    return [
        *score,
        *as_share(metrics, "rollout/accuracy", prompts),
        *plainly(metrics, "kl/reference_mean"),
        *as_mean(metrics, "eval/score_mean", "eval/score_std", metrics.get("eval/prompts", 0)),
        *as_share(metrics, "eval/accuracy", metrics.get("eval/verified", 0)),
    ]


def _following(cfg: PolicyConfig) -> tuple[str, ...]:
    model = shlex.quote(str(cfg.model_dir))
    drawn = dict(cfg.sampling).items() - dict(SamplingConfig(temperature=1.0)).items()  # which is eval's
    asked = shlex.join([*_held_out(cfg), *(f"sampling.{name}={value}" for name, value in sorted(drawn))])
    return (f"megarlhf eval model={model} {asked}", f"megarlhf convert model={model} output=OUT to=hf verify=true")


def _held_out(cfg: PolicyConfig) -> list[str]:
    """The settings of `megarlhf eval` for problems like those of the run; FILE where only the reader knows them."""
    data, usual = cfg.prompts, ReasoningGymConfig()
    if is_task(data.source):
        settings = {name: dict(data.reasoning_gym)[name] for name in ("parameters", "instruction")}
        changed = {name: value for name, value in settings.items() if value != dict(usual)[name]}
        of_task = [f"prompts.reasoning_gym.{name}={json.dumps(value)}" for name, value in changed.items()]
        return [f"prompts.source={data.source}", *of_task]
    if data.named in ("", BUILT_IN):
        return [f"prompts.source={BUILT_IN}", f"prompts.arithmetic.level={data.arithmetic.level}"]
    if data.source == PROGRAMS:
        return [f"prompts.source={PROGRAMS}"]
    columns = [f"prompts.columns.{name}={theirs}" for name, theirs in data.columns.items()]
    verifier = cfg.verifier if cfg.verifier not in ("auto", "none") else (*cfg.deciders, "maths")[0]
    return ["prompts.source=FILE", *columns, f"verifier={verifier}"]
