"""Reward models from preference pairs, from labelled responses, or from both.

Pairwise (Bradley-Terry), pointwise (binary correctness), or both in one model with a weight:

    L = mean over pairs of -log sigmoid(r(chosen) - r(rejected))
        + pointwise_weight * mean over responses of BCE(r, correct)

Both means are over the whole step, whatever its split: a step is one batch of couples of sequences, each carrying the
weights that make the mean over couples the formula above.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

from megarlhf.batch.supervised import Couples
from megarlhf.checkpoint.model_directory import Card
from megarlhf.errors import ConfigError
from megarlhf.models.readings import SequenceScores
from megarlhf.models.role import TrainableRole
from megarlhf.models.workload import Workload
from megarlhf.observe.metrics import Metrics
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Loss, LossSums, States
from megarlhf.runs.measuring import check_measuring
from megarlhf.runtime.checks import Model
from megarlhf.runtime.roles import learner
from megarlhf.trainers.couples import (
    Course,
    couple,
    logged,
    measure_outcomes,
    measured,
    outcome_loss,
    outcomes_said,
    take,
)
from megarlhf.trainers.judged import JudgedConfig, JudgedInputs, judged_workload, read_inputs
from megarlhf.trainers.summary import plainly
from megarlhf.trainers.trainer import Learner, Pupil, Trainer


class RewardConfig(JudgedConfig):
    """`megarlhf reward`: a reward model from pairs, from judged responses, or from both."""

    first: ClassVar[tuple[str, ...]] = (
        *("run_dir", "model", "pairs.source", "labelled.source", "heldout.source", "epochs", "optim.lr"),
        *("pairs_batch", "labelled_batch", "micro_batch", "layout.data", "layout.tensor"),
    )
    needed: ClassVar[tuple[str, ...]] = ("model",)


def judgement_loss(role: TrainableRole, cfg: JudgedConfig) -> Loss[Couples]:
    """Pairwise plus pointwise loss over couples."""

    def loss(states: States, rows: Couples) -> LossSums:
        total, metrics = outcome_loss(role.reading(role.model, states, rows), rows, cfg)
        return LossSums(total, len(rows), metrics, len(rows))

    return loss


def prepare(cfg: RewardConfig) -> JudgedInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    cfg.check_run_dir()
    _check_data(cfg)
    check_measuring(cfg, logged(cfg), measured(cfg), "set heldout_pairs.source, or heldout.source for judged responses")
    return read_inputs(cfg)


def _check_data(cfg: RewardConfig) -> None:
    if cfg.pairs is None and cfg.labelled is None:
        raise ConfigError(
            "reward model without data: pairs and labelled are both unset; set pairs.source or labelled.source."
        )


def workload(cfg: RewardConfig) -> Workload:
    """What a step does, in numbers. Raises ConfigError where there are no rows."""
    _check_data(cfg)
    return judged_workload(cfg)


def train(cfg: RewardConfig, inputs: JudgedInputs, pupil: Pupil, argv: Sequence[str], mesh: Mesh) -> Metrics:
    """Train, measure, normalise and save. Collective; returns the last metrics."""
    course = Course(
        title="reward model",
        batch=lambda drawn: couple(drawn.get("pairs"), drawn.get("labelled"), cfg.pointwise_weight),
        loss=judgement_loss(pupil.role, cfg),
        measure=partial(measure_outcomes, pupil.role, cfg, inputs) if measured(cfg) else None,
        card=Card(inputs.tokenizer, next(iter(inputs.data.values())), cfg.model),
    )
    return take(course, pupil, cfg, inputs, argv, mesh)


def models(cfg: RewardConfig, inputs: JudgedInputs, mesh: Mesh) -> Pupil:
    """The model, ready to learn. Collective."""
    body = Model("model", cfg.model, inputs.model)
    return Pupil(learner("reward", body, SequenceScores(), cfg.optim, inputs.steps, cfg, mesh, cfg.lora))


def _summary(cfg: RewardConfig, metrics: Metrics) -> list[str]:
    return [*plainly(metrics, "reward/loss"), *outcomes_said(cfg, metrics)]


def _following(cfg: RewardConfig) -> tuple[str, ...]:
    actor, model = shlex.quote(cfg.model), shlex.quote(str(cfg.model_dir))
    return (f"megarlhf ppo actor.init={actor} reward.init={model} prompts.source=FILE",)


TRAINER = Trainer(
    config=RewardConfig,
    prepare=prepare,
    models=models,
    learners={"reward": Learner(Couples, judgement_loss)},
    workload=workload,
    train=train,
    summary=_summary,
    following=_following,
)
