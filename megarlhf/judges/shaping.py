"""What a policy learns from: scores of whole responses, transformed in a fixed order, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.checkpoint.number_bits import bits_of, float_of
from megarlhf.config import Config
from megarlhf.errors import CheckpointError, ConfigError
from megarlhf.ops.rewards import Earned, where_earned
from megarlhf.ops.scores import EPS, group_moments, marked_down, normalised, overlong_penalty, shrunk


class ShapingConfig(Config):
    """In this order."""

    clip: float | None = Field(default=None, gt=0)
    """1. Scores are clipped to +- this, in reward; null clips nothing."""
    normalise: Literal["none", "group", "batch", "running"] = "none"
    """2. Their mean is taken off and they are divided by their standard deviation + 1e-6: those of the responses to one
    prompt (`group`, divided by their number less one), of what the iteration learns from (`batch`), or of all that was
    learnt from so far (`running`)."""
    positive: float = Field(default=1.0, ge=0)
    """3. Scores above 0 are multiplied by this. Source: arXiv 2412.06000, which does not say how much."""
    negative: float = Field(default=1.0, ge=0)
    """Scores below 0 are multiplied by this, in the same step."""
    missing_eos: float | Literal["auto"] | None = "auto"
    """4. Score of a response cut at the token limit. `auto`: the judges', but never more than a wrong response gets
    (where every judge is known for that) nor than any that ended in the batch; null keeps the judges'.
    Source: Huang et al. 2024 give -1, which is low only if wrong responses score higher."""
    overlong_buffer: Annotated[int, Field(ge=0)] | Literal["fifth"] = 0
    """5. Last tokens before sampling.max_new_tokens over which a response loses up to overlong_penalty, linearly; 0: no
    such loss; `fifth`: a fifth of the limit. Source: DAPO, 4,096 of 20,480."""
    overlong_penalty: float = Field(default=1.0, ge=0)
    """Score that a response at the limit loses so."""

    def overlong_tokens(self, limit: int) -> int:
        """The buffer in tokens, at least one of a fifth."""
        return max(1, limit // 5) if self.overlong_buffer == "fifth" else self.overlong_buffer

    @property
    def transforms(self) -> list[str]:
        """Settings with their values, of those in force that make another score of any, and do not only take off."""
        usual = {"clip": None, "normalise": "none", "positive": 1.0, "negative": 1.0}
        given = {name: value for name, value in dict(self).items() if name in usual and value != usual[name]}
        return [f"shaping.{name}={value}" for name, value in given.items()]

    def check(self, group_size: int, limit: int) -> None:
        """Raise ConfigError where a step means nothing for groups of this size and this limit of tokens."""
        if self.normalise == "group" and group_size == 1:
            raise ConfigError(
                "shaping.normalise=group with group_size=1: one response less its own mean is 0; raise group_size, or "
                "normalise over the batch."
            )
        if self.overlong_tokens(limit) > limit:
            raise ConfigError(
                f"shaping.overlong_buffer={self.overlong_buffer} is more than sampling.max_new_tokens={limit}; lower "
                "it."
            )


@dataclass
class RunningMoments:
    """Of all scores so far. A part of the run's state."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of (score - mean)^2."""

    @property
    def std(self) -> float:
        """Divided by the count."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def add(self, scores: Tensor) -> None:
        """Take in the finite scores of one batch, the same on every rank.

        Source:   Chan, Golub and LeVeque 1979: the batch's moments are joined, in fp64.
        """
        scores = scores[scores.isfinite()]  # one that is not skips the step, and must not be remembered
        if not len(scores):
            return
        count, mean = len(scores), float(scores.double().mean())
        squares = float((scores.double() - mean).square().sum())
        total, gap = self.count + count, mean - self.mean
        self.squares += squares + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    def state(self) -> dict[str, int]:
        """Everything needed to go on from here."""
        return {"count": self.count, "mean": bits_of(self.mean), "squares": bits_of(self.squares)}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from `state`. Raises CheckpointError where it is of something else."""
        floats = [float_of(state.get(name, -1)) for name in ("mean", "squares")]
        if state.keys() != self.state().keys() or not all(map(math.isfinite, floats)):
            raise CheckpointError(f"moments of scores are damaged ({dict(state)}); resume from another state.")
        self.count, (self.mean, self.squares) = state["count"], floats


@dataclass(frozen=True)
class Shaper:
    """Does what the settings say, and remembers what it must."""

    cfg: ShapingConfig
    group_size: int
    limit: int
    """Response tokens at most."""
    wrong_score: float
    """Mean score of wrong responses, as the judges give it; inf where nobody knows."""
    by_step: bool = False
    """Whether judges reward other tokens than the last."""
    moments: RunningMoments = field(default_factory=RunningMoments)

    @property
    def parts(self) -> dict[str, RunningMoments]:
        """What survives a stop, by name."""
        return {"scores": self.moments} if self.cfg.normalise == "running" else {}

    def earned(self, token_scores: Tensor, rollout: Rollout) -> Earned:
        """What is learnt from scores of tokens [B, T] of the global batch, and where; once an iteration."""
        shaped = self.shape(token_scores.sum(1), rollout)
        return where_earned(shaped, token_scores, rollout.response_mask) if self.by_step else Earned(shaped, None)

    def shape(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """What is learnt from scores [B] of the global batch, once an iteration. Returns [B]."""
        cfg, wrong = self.cfg, scores.new_tensor([self.wrong_score])
        if cfg.clip is not None:
            scores = scores.clamp(-cfg.clip, cfg.clip)
            wrong = wrong.clamp(-cfg.clip, cfg.clip)  # one that nobody knows is then clip, which caps nothing
        scores, wrong = self._normalised(scores, wrong)
        scores, wrong = (shrunk(each, positive=cfg.positive, negative=cfg.negative) for each in (scores, wrong))
        # 0 times inf is no number: nobody knows, still.
        scores = marked_down(scores, rollout.terminated, cfg.missing_eos, float(wrong.nan_to_num(nan=math.inf)))
        buffer = cfg.overlong_tokens(self.limit)
        if not buffer:
            return scores
        lost = overlong_penalty(rollout.response_lengths, limit=self.limit, buffer=buffer)
        return scores + cfg.overlong_penalty * lost

    def _normalised(self, scores: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
        match self.cfg.normalise:
            case "none":
                return scores, wrong
            case "group":  # in which a wrong response can score anything
                return normalised(scores, *group_moments(scores, self.group_size)), torch.full_like(wrong, math.inf)
            case "batch":
                moments = RunningMoments()
            case "running":
                moments = self.moments
        moments.add(scores)
        # Where scores have no spread, nothing can be said of one that is not among them.
        known = wrong if moments.std > EPS else torch.full_like(wrong, math.inf)
        return normalised(scores, moments.mean, moments.std), normalised(known, moments.mean, moments.std)
