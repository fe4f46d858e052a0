"""Proximal policy optimisation against a reward model (Schulman et al. 2017; details of Huang et al. 2024)."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from megarlhf.batch.rollouts import PolicyRows, Prompts, ValueRows
from megarlhf.checkpoint.model_directory import save_model
from megarlhf.data.loader import Loader
from megarlhf.gates.cheap import cheap_gates, gate_prompts
from megarlhf.gates.gate import check_gates
from megarlhf.judges.rules import verifier_remark
from megarlhf.models.readings import LabelLogprobs, PositionValues, SequenceScores
from megarlhf.models.role import TrainableRole
from megarlhf.models.roles import Roles
from megarlhf.observe.clock import Clock
from megarlhf.observe.metrics import Metrics
from megarlhf.observe.writers import RunWriter, read_metrics
from megarlhf.ops.advantages import Advantages
from megarlhf.ops.value_loss import clipped_value_loss
from megarlhf.parallel.collectives import broadcast_object
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Loss, LossSums, States
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.runs.ending import conclude
from megarlhf.runs.guard import StepGuard
from megarlhf.runs.loop import Run, open_run, run_steps, sole_run
from megarlhf.runs.stopping import stopping_at_start
from megarlhf.runtime.command import on_ranks
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
from megarlhf.runtime.texts import check_one_day
from megarlhf.trainers.policy_loop import Turn, optimise
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo_config import PPOConfig, PPOInputs, cut_score_remark, prepare
from megarlhf.trainers.ppo_estimate import Scored, estimated
from megarlhf.trainers.ppo_metrics import (
    accuracy_metric,
    experience_metrics,
    judged_rollouts,
    learner_metrics,
)
from megarlhf.trainers.watch import Watch

__all__ = ["PPOConfig", "main", "ppo_iteration", "train"]


@dataclass(frozen=True)
class Iteration:
    """What one iteration made, and its metrics; equal on every rank."""

    scored: Scored
    estimate: Advantages
    metrics: Metrics


def ppo_iteration(
    roles: Roles,
    engine: RolloutEngine,
    prompts: Prompts,
    cfg: PPOConfig,
    turn: Turn,
) -> Iteration:
    """Roll out, score, estimate, optimise: once. Collective: every rank calls it with the same prompts."""
    # 1. Roll out. Only the actor is resident, so the KV cache may have the rest of the memory.
    with turn.clock("rollout"), roles.actor.resident("weights"):
        rollout = engine.generate(prompts, cfg.sampling, seed=turn.seed("rollout"), group_size=cfg.group_size)

    # 2. Score. Forward only, one model resident at a time.
    with turn.clock("score"):
        scored = Scored(
            rollout,
            logprobs=roles.actor.score(rollout),
            ref_logprobs=roles.reference.score(rollout),
            values=roles.critic.score(rollout),
            scores=roles.reward.score(rollout),
        )

    # 3. Estimate. fp32, pure, over the global batch, identical on every rank.
    with turn.clock("estimate"):
        estimate = estimated(scored, cfg, wrong_score=roles.wrong_score)
        metrics = experience_metrics(scored, estimate, kl_coef=cfg.kl_coef)
        lessons = PolicyRows(rollout, scored.logprobs, estimate.whitened)
        targets = ValueRows(rollout, scored.values, estimate.returns)

    # 4. Optimise. Each learner sees the same mini-batches; one of them is resident at a time.
    with turn.clock("optimise"):
        passes = {"epochs": cfg.ppo_epochs, "global_batch": cfg.global_batch}
        actor = []
        if turn.number >= cfg.value_warmup_iterations:
            actor = optimise(roles.actor, policy_loss(roles.actor, cfg), lessons, turn, **passes)
        critic = optimise(roles.critic, value_loss(roles.critic, cfg), targets, turn, **passes)

    learning = {**learner_metrics(actor, critic), "train/skipped_steps": turn.guard.skipped}
    return Iteration(scored, estimate, {**metrics, **learning, **turn.clock.metrics()})


def value_loss(critic: TrainableRole, cfg: PPOConfig) -> Loss[ValueRows]:
    """The clipped regression on returns, summed over response tokens."""

    def loss(states: States, rows: ValueRows) -> LossSums:
        total, metrics = clipped_value_loss(
            critic.reading(critic.model, states, rows),
            states.of(rows.values),
            states.of(rows.returns),
            value_clip_range=cfg.value_clip_range,
        )
        return LossSums(total, states.count, metrics)

    return loss


def build_roles(cfg: PPOConfig, inputs: PPOInputs, mesh: Mesh) -> Roles:
    """Load all four, one after another, each moved off the device before the next arrives."""
    logprobs = LabelLogprobs(cfg.sampling.temperature)
    values = PositionValues(inputs.critic.score_offset, inputs.critic.score_scale)
    scores = SequenceScores(inputs.reward.score_offset, inputs.reward.score_scale)
    steps = cfg.iterations * cfg.steps_per_iteration
    actor_steps = steps - cfg.value_warmup_iterations * cfg.steps_per_iteration
    of = inputs.by_role(cfg)
    actor = away(learner("actor", of["actor"], logprobs, cfg.actor.optim, actor_steps, cfg, mesh))
    critic = away(learner("critic", of["critic"], values, cfg.critic.optim, steps, cfg, mesh))
    reference = away(frozen("reference", of["reference"], logprobs, cfg, mesh))
    reward = away(frozen("reward", of["reward"], scores, cfg, mesh))
    wrong_score = inputs.reward.score_wrong
    return Roles(actor, critic, reference, reward, math.inf if wrong_score is None else wrong_score)


def build_engine(cfg: PPOConfig, inputs: PPOInputs, actor: TrainableRole) -> RolloutEngine:
    """The inference engine over the actor's own weights."""
    return RolloutEngine.of(actor, inputs.tokenizer, inputs.prompts.longest + cfg.sampling.max_new_tokens)


def train(cfg: PPOConfig, inputs: PPOInputs, argv: Sequence[str], *, mesh: Mesh) -> Metrics:
    """Run every iteration and save the actor to `cfg.model_dir`. Collective; returns the last iteration's metrics."""
    check_one_day(inputs.tokenizer, mesh)
    roles = build_roles(cfg, inputs, mesh)
    print_choices([*roles.actor.settings.compute.choices, cfg.policy_loss_choice], mesh)
    print_memory_plan(roles.every, mesh)
    print_dropped("prompts", inputs.prompts.dropped, len(inputs.prompts), mesh)
    _say_start(cfg, inputs, mesh)
    print_remark(cut_score_remark(cfg, inputs.reward), mesh)
    engine = build_engine(cfg, inputs, roles.actor)
    loader = Loader(len(inputs.prompts), cfg.prompts_per_iteration, seed=cfg.seed)
    guard = StepGuard(cfg.run_dir, cfg.max_skipped_steps, mesh)
    run = Run(cfg, {"actor": roles.actor, "critic": roles.critic}, {"prompts": loader}, guard, mesh)
    clock, watch = Clock(mesh.device, mesh.trail, mesh.work), Watch(cfg)

    def step(iteration: int, writer: RunWriter | None) -> Metrics:
        prompts = inputs.prompts.batch(next(loader))
        done = ppo_iteration(roles, engine, prompts, cfg, Turn(iteration, cfg.seed, clock, guard))
        scored = done.scored
        judged = judged_rollouts(scored.rollout, scored.scores, inputs.tokenizer, inputs.verifier, inputs.prompts)
        if writer is not None and iteration % cfg.samples_every == 0:
            writer.samples(judged[: cfg.samples], iteration + 1)
        metrics = {**done.metrics, **accuracy_metric(judged)}
        warnings, said = watch.look(metrics)
        print_remark("\n".join(said), mesh)
        return {**metrics, **warnings}

    def ready(first: int) -> None:
        watch.restore(broadcast_object(read_metrics(cfg.run_dir).rows[:first] if mesh.is_main else [], mesh, "world"))
        if cfg.gates == "on":
            prompts, loss = gate_prompts(inputs.prompts, mesh), policy_loss(roles.actor, cfg)
            same = cfg.reference_init == cfg.actor.init and first <= cfg.value_warmup_iterations
            check_gates(cheap_gates(roles, engine, prompts, loss, cfg.sampling, seed=cfg.seed, reference_is_actor=same))

    with open_run(cfg.pinned(inputs.tokenizer.date), argv, mesh) as writer:
        metrics = run_steps(
            *(cfg.iterations, "PPO", lambda i: step(i, writer), ("rollout/score_mean", "rollout/accuracy")),
            run=run,
            writer=writer,
            ready=ready,
            enough=watch.ends,
        )
    if watch.ends(metrics):
        print_remark(watch.conclusion(), mesh)
    save_model(roles.actor, cfg.model_dir, inputs.tokenizer, data=inputs.data, origin=cfg.actor.init)
    return metrics


def _say_start(cfg: PPOConfig, inputs: PPOInputs, mesh: Mesh) -> None:
    sets = [DataSet("prompts", cfg.prompts, inputs.data, inputs.prompts)]
    epochs = cfg.iterations * cfg.prompts_per_iteration / len(inputs.prompts)
    say_data(sets, inputs.tokenizer, mesh, epochs={"prompts": epochs})
    actor, *others = inputs.models(cfg)
    say([*remarks(sets, inputs.tokenizer, actor, others), ends(inputs.tokenizer)], mesh)
    say([verifier_remark(inputs.verifier, inputs.prompts), *filter(None, [inputs.doubts])], mesh)
    each = f"{cfg.rollout_batch:,} rollouts and {cfg.steps_per_iteration:,} optimiser steps of each learner"
    say([f"iterations: {cfg.iterations:,}, each of {each}"], mesh)


def main(cfg: PPOConfig, argv: Sequence[str]) -> int:
    """`megarlhf ppo`."""
    with stopping_at_start():
        return on_ranks(cfg, argv, prepare, lambda cfg, inputs, mesh: _run(cfg, inputs, argv, mesh))


def _run(cfg: PPOConfig, inputs: PPOInputs, argv: Sequence[str], mesh: Mesh) -> None:
    with sole_run(cfg, mesh):
        metrics = train(cfg, inputs, argv, mesh=mesh)
        model = shlex.quote(str(cfg.model_dir))
        following = (
            f"megarlhf eval model={model} prompts.source=FILE verifier=maths",
            f"python tools/convert_hf.py to-hf {model} OUT --verify",
        )
        conclude(cfg.run_dir, metrics, ("rollout/score_mean", "rollout/accuracy"), following, mesh)
