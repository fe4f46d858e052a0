"""Process reward models: responses judged step by step, beside pairs and judged responses where there are some.

The scalar head at the token that ends a step says whether it is right so far. Pairs and judged responses are read at
their last token, the last step's end, as `reward` has it:

    L = step_weight * mean over labelled steps of BCE(r at the step's end, label) + the loss of `reward`

Each mean is over the whole step, whatever its split. sigmoid(r) is a probability, and stays one while nothing is
normalised.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field

from megarlhf.batch.base import cat
from megarlhf.batch.supervised import Couples, JudgedSteps, SteppedCouples
from megarlhf.checkpoint.model_directory import Card
from megarlhf.config.base import FreeToChange
from megarlhf.data.judged_steps import WRONG_BELOW, StepData
from megarlhf.data.rows import DataConfig
from megarlhf.errors import ConfigError
from megarlhf.eval.reward_model import Truth
from megarlhf.models.readings import SequenceScores, StepScores
from megarlhf.models.role import Role, TrainableRole
from megarlhf.observe.metrics import Metrics
from megarlhf.ops.preference_loss import pointwise_loss
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
from megarlhf.trainers.reward_measures import OF_FIRST_ERRORS, OF_STEPS, measure_steps
from megarlhf.trainers.summary import as_estimate, as_share, plainly
from megarlhf.trainers.trainer import Learner, Pupil, Trainer


class ProcessRewardConfig(JudgedConfig):
    """`megarlhf process_reward`: a reward model of steps, and of pairs and judged responses where there are some."""

    first: ClassVar[tuple[str, ...]] = (
        *("run_dir", "model", "steps.source", "heldout_steps.source", "steps.separator", "epochs", "optim.lr"),
        *("steps_batch", "pairs.source", "labelled.source", "micro_batch", "layout.data", "layout.tensor"),
    )
    needed: ClassVar[tuple[str, ...]] = ("model",)

    steps: StepData = StepData()
    """Responses judged step by step: columns prompt, steps, labels (0 to 1, or null for a step that nobody judged)."""
    heldout_steps: Annotated[StepData | None, FreeToChange(said=True)] = None
    """Judged steps to measure loss, accuracy, calibration and first errors on, as eval_every says."""
    steps_batch: int = Field(default=128, ge=2)
    """Responses judged step by step per optimiser step, an even number, over all data ranks."""
    step_weight: float = Field(default=1.0, gt=0)
    """Weight of the mean over labelled steps, beside that of pairs (1) and pointwise_weight. Source: none; 1 weighs the
    terms equally."""
    normalise: Literal["none", "centre", "standardise"] = "none"
    """What is done to scores, of steps too, as in `reward`. Anything but none makes sigmoid(score) something else than
    the probability that a step is right, and needs pairs, labelled or heldout to measure."""

    @property
    def learnt(self) -> dict[str, tuple[DataConfig | None, int]]:
        """Rows that are learnt from, by their setting, and how many of them a step takes."""
        return {"steps": (self.steps, self.steps_batch), **super().learnt}

    @property
    def held(self) -> dict[str, DataConfig | None]:
        """Rows that are measured, by their setting."""
        return {"heldout_steps": self.heldout_steps, **super().held}


def prepare(cfg: ProcessRewardConfig) -> JudgedInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    cfg.check_run_dir()
    if cfg.normalise != "none" and not (cfg.pairs or cfg.labelled or cfg.heldout):
        raise ConfigError(
            f"normalise={cfg.normalise} measures the scores of whole responses, and there are none; set "
            "heldout.source, pairs.source or labelled.source, or normalise=none."
        )
    held = "set heldout_steps.source, heldout_pairs.source, or heldout.source for judged responses"
    check_measuring(cfg, logged(cfg) | {"reward/step_loss", "reward/step_accuracy"}, _measured(cfg), held)
    inputs = read_inputs(cfg)
    if inputs.heldout_steps is not None and cfg.keep_best.removeprefix("-") in OF_FIRST_ERRORS:
        truth = Truth.of(inputs.heldout_steps.labels)
        if not truth.wrong or not truth.right:
            raise ConfigError(
                f"keep_best={cfg.keep_best} is not measured: of the solutions of heldout_steps whose first error is "
                f"known {truth.wrong} have one and {truth.right} have none; hold out both kinds, or choose another "
                "metric."
            )
    joints = {name: data.joint for name, data in inputs.data.items() if isinstance(data, StepData)}
    if len(set(joints.values())) > 1:
        said = " and ".join(f"{name}.separator={joint!r}" for name, joint in joints.items())
        raise ConfigError(f"steps are joined differently: {said}; set both alike, for a model knows one.")
    return inputs


def step_batch(drawn: Mapping[str, Any], cfg: ProcessRewardConfig) -> SteppedCouples:
    """One optimiser step's batch, its weights scaled so that the mean over couples is the loss of this module's head.

    drawn: the rows of each set, by its setting.
    """
    judged, pairs, labelled = drawn["steps"], drawn.get("pairs"), drawn.get("labelled")
    beside = (len(pairs) if pairs else 0) + (len(labelled) // 2 if labelled else 0)
    parts = [_of_steps(judged, len(judged) // 2 + beside, cfg.step_weight)]
    if pairs or labelled:
        parts.append(_of_outcomes(couple(pairs, labelled, cfg.pointwise_weight, beside=len(judged) // 2)))
    return cat(parts)


def _of_steps(judged: JudgedSteps, couples: int, step_weight: float) -> SteppedCouples:
    weight = judged.step_weight * (step_weight * couples / float(judged.step_weight.sum()))
    unjudged = torch.zeros(len(judged))
    return SteppedCouples(
        judged.tokens,
        judged.lengths,
        torch.zeros(len(judged) // 2),
        unjudged,
        unjudged,
        judged.step_ends,
        judged.step_labels,
        weight,
    )


def _of_outcomes(rows: Couples) -> SteppedCouples:
    """Read at the last token alone, where no step is judged."""
    none = torch.zeros(rows.tokens.shape)
    ends = SequenceScores().at(rows)
    return SteppedCouples(
        rows.tokens, rows.lengths, rows.pair_weight, rows.correct, rows.point_weight, ends, none, none
    )


def step_loss(role: TrainableRole, cfg: ProcessRewardConfig) -> Loss[SteppedCouples]:
    """The loss over steps, and over outcomes where there are some."""

    def loss(states: States, rows: SteppedCouples) -> LossSums:
        scores = role.reading(role.model, states, rows)
        last = states.position == rows.lengths[states.row] - 1
        total, metrics = outcome_loss(scores[last], rows, cfg)
        labels, weight = states.of(rows.step_labels), states.of(rows.step_weight)
        of_steps, _ = pointwise_loss(scores, labels, weight)
        agree = (scores.detach() >= 0) == (labels >= WRONG_BELOW)  # as first errors are counted, where a half is right
        # The weights carry step_weight; the metrics are reported without it.
        metrics["reward/step_loss"] = of_steps.detach() / cfg.step_weight
        metrics["reward/step_accuracy"] = (weight * agree).sum() / cfg.step_weight
        return LossSums(total + of_steps, len(rows), metrics, len(rows))

    return loss


def _measured(cfg: ProcessRewardConfig) -> set[str]:
    """Metrics of held-out data, as eval_every says."""
    return measured(cfg) | (set(OF_STEPS) if cfg.heldout_steps else set())


def measure_heldout(role: Role, cfg: ProcessRewardConfig, inputs: JudgedInputs) -> Metrics:
    """What is held out, as `_measured` lists it. Collective; equal on every rank."""
    of_steps = measure_steps(role, inputs.heldout_steps) if inputs.heldout_steps else {}
    return {**of_steps, **measure_outcomes(role, cfg, inputs)}


def train(cfg: ProcessRewardConfig, inputs: JudgedInputs, pupil: Pupil, argv: Sequence[str], mesh: Mesh) -> Metrics:
    """Train, measure and save. Collective; returns the last metrics."""
    steps = cast(StepData, inputs.data["steps"])
    course = Course(
        title="process reward model",
        batch=partial(step_batch, cfg=cfg),
        loss=step_loss(pupil.role, cfg),
        measure=partial(measure_heldout, pupil.role, cfg, inputs) if _measured(cfg) else None,
        card=Card(inputs.tokenizer, steps, cfg.model, step_separator=steps.joint),
    )
    return take(course, pupil, cfg, inputs, argv, mesh)


def models(cfg: ProcessRewardConfig, inputs: JudgedInputs, mesh: Mesh) -> Pupil:
    """The model, ready to learn. Collective."""
    body = Model("model", cfg.model, inputs.model)
    return Pupil(learner("reward", body, StepScores(), cfg.optim, inputs.steps, cfg, mesh, cfg.lora))


def _summary(cfg: ProcessRewardConfig, metrics: Metrics) -> list[str]:
    wrong, correct = (metrics.get(f"reward/heldout_{kind}_solutions", 0) for kind in ("wrong", "correct"))
    return [
        *plainly(metrics, "reward/loss", "reward/step_accuracy"),
        *as_estimate(metrics, "reward/heldout_step_accuracy", 0.0, 1.0),
        *plainly(metrics, "reward/heldout_step_calibration_error"),
        *as_share(metrics, "reward/heldout_error_accuracy", wrong),
        *as_share(metrics, "reward/heldout_correct_accuracy", correct),
        *as_estimate(metrics, "reward/heldout_first_error_f1", 0.0, 1.0),
        *outcomes_said(cfg, metrics),
    ]


def _following(cfg: ProcessRewardConfig) -> tuple[str, ...]:
    return (f"megarlhf eval reward model={shlex.quote(str(cfg.model_dir))} steps.source=FILE",)


TRAINER = Trainer(
    config=ProcessRewardConfig,
    prepare=prepare,
    models=models,
    learners={"reward": Learner(SteppedCouples, step_loss)},
    workload=judged_workload,
    train=train,
    summary=_summary,
    following=_following,
)
