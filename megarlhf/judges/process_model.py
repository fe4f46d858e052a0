"""A judge that is a process reward model: it says what each step of a response is worth.

v_k is what its head says at the last token of step k (data/steps.py says where steps end): that number, or its sigmoid.
What a response earns by them:

    sum        v_k at the end of each step                                  Math-Shepherd (arXiv 2312.08935)
    soft_min   v_k softmax(-v / 0.1)_k at the end of each, in sum about the least      PURE (arXiv 2504.15275)
    min, product, mean, last      of all v, at the last token               ops/step_scores.py

Sums reward many steps. PURE's own rewards are 2 v - 1 of a probability, of which its softmax is twice as sharp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.batch.supervised import SteppedResponses
from megarlhf.data.steps import ends_in
from megarlhf.errors import ConfigError
from megarlhf.judges.judge import UNKNOWN, JudgeConfig, Verdict, outcome
from megarlhf.judges.reward_model import ScalarModelConfig
from megarlhf.judges.texts import Reader
from megarlhf.models.readings import StepScores
from megarlhf.models.role import FrozenRole
from megarlhf.ops.step_scores import Aggregate, aggregated, soft_min
from megarlhf.runtime.checks import Model
from megarlhf.runtime.roles import away, frozen
from megarlhf.runtime.settings import RanksConfig

TEMPERATURE = 0.1
"""Of soft_min. Source: PURE."""


class ProcessJudgeConfig(ScalarModelConfig):
    """A process reward model."""

    kind: Literal["process"]
    """`process`: a model directory with a scalar head that is read at the end of every step of a response."""
    separator: str | None = Field(default=None, min_length=1)
    """What parts the steps of responses; null: what the model says that it was trained with."""
    value: Literal["probability", "logit"] = "probability"
    """What a step is worth: the probability that it is right, the sigmoid of what the head says there, or that number,
    offset and scale applied."""
    reward: Literal["sum", "soft_min"] | Aggregate = "min"
    """What a response earns by its steps. At the end of each (ppo, and reinforce with baseline none or token): its
    value (`sum`), or that by softmax(-value / 0.1) over the steps (`soft_min`). At the last token: the `min`, `product`
    or `mean` of all values, or the `last`. Source: sum Math-Shepherd, soft_min PURE."""

    @model_validator(mode="after")
    def _multiplies_probabilities(self) -> ProcessJudgeConfig:
        if self.reward == "product" and self.value == "logit":
            raise ValueError(
                "reward=product with value=logit: two steps below 0 would make a good response; set value=probability, "
                "or reward to min, mean or last."
            )
        return self

    @property
    def by_step(self) -> bool:
        """Whether it rewards other tokens than the last."""
        return self.reward in ("sum", "soft_min")

    def separator_of(self, setting: str, model: Model) -> str:
        """What parts steps. `setting`: where this judge is configured, such as judges.steps.

        Raises:   ConfigError where neither the setting nor the model says it.
        """
        found = self.separator or model.description.step_separator
        if found is None:
            raise ConfigError(
                f"{setting}.separator is null, and {model} says no separator of steps, as process reward models do; "
                "name one of those, or say what parts the steps of responses: on a command line "
                f"{setting}.separator='\"\\n\\n\"' for empty lines."
            )
        return found


@dataclass(frozen=True)
class ProcessJudge:
    """The role that scores steps, and how they are found and counted."""

    name: str
    cfg: ProcessJudgeConfig
    separator: str
    role: FrozenRole
    reader: Reader

    @property
    def weight(self) -> float:
        """Of its scores in the sum."""
        return self.cfg.weight

    @property
    def wrong_score(self) -> float:
        """Nobody measured it of steps."""
        return UNKNOWN

    def judge(self, rollout: Rollout) -> Verdict:
        """Judge every step of every row by one forward pass. Collective."""
        found = self.reader.spread_rows(rollout, lambda rows: ends_in(rows, self.separator, self.reader.tokenizer))
        ends = _marked(found, rollout.tokens)
        values, at = self.role.score(SteppedResponses(rollout.tokens, rollout.lengths, ends)), ends[:, 1:]
        if self.cfg.value == "probability":
            values = torch.where(at, values.sigmoid(), 0.0)
        scores, steps = self._earned(values, at, rollout), _by_step(values, found)
        return Verdict(scores, steps=steps, earned=_by_step(scores, found) if self.cfg.by_step else steps)

    def _earned(self, values: Tensor, ends: Tensor, rollout: Rollout) -> Tensor:
        """[B, T], of what steps are worth where they end."""
        match self.cfg.reward:
            case "sum":
                return torch.where(ends, values, 0.0)
            case "soft_min":
                return soft_min(values, ends, temperature=TEMPERATURE)
            case how:
                return outcome(aggregated(values, ends, how), rollout)


def process_judge(name: str, cfg: ProcessJudgeConfig, model: Model, ranks: RanksConfig, reader: Reader) -> ProcessJudge:
    """Load it, and move it off the device until it is wanted. Collective."""
    separator = cfg.separator_of(f"judges.{name}", model)
    # A score that was shifted or scaled is no logit.
    reading = StepScores() if cfg.value == "probability" else model.description.step_scores()
    role = away(frozen(name, model, reading, ranks, reader.mesh))
    return ProcessJudge(name, cfg, separator, role, reader)


def rewarding_steps(judges: Mapping[str, JudgeConfig]) -> dict[str, ProcessJudgeConfig]:
    """Those of the judges that count and reward other tokens than the last, by name."""
    found = {name: judge for name, judge in judges.items() if isinstance(judge, ProcessJudgeConfig)}
    return {name: judge for name, judge in found.items() if judge.weight and judge.by_step}


def _by_step(values: Tensor, ends: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of [B, T], whose index t is about token t + 1: those of the last tokens of each row's steps."""
    values = values.cpu()
    return [[float(values[row, end - 1]) for end in own] for row, own in enumerate(ends)]


def _marked(places: Sequence[Sequence[int]], tokens: Tensor) -> Tensor:
    """[B, T + 1] bool: True at the places in each row of tokens [B, T + 1]."""
    marked = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, own in zip(marked, places, strict=True):
        row[list(own)] = True
    return marked.to(tokens.device)
