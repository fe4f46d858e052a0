"""What a judge is: it says of every rollout, one number a token, what that is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.config import Config
from megarlhf.ops.masked import last_true

NAME = "[a-z][a-z0-9_]*"
"""What a judge may be called: its metrics and its files are named after it."""


class JudgeConfig(Config):
    """What every judge has."""

    weight: float = 1.0
    """What its scores are multiplied by before those of all judges are added; 0 only logs them."""


@dataclass(frozen=True)
class Verdict:
    """What one judge says of a batch, equal on every rank."""

    token_scores: Tensor
    """[B, T] fp32 where the token is that earned them: an outcome at the last response token; elsewhere 0."""
    parts: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """[B] each: what the score is made of, where a judge says so."""
    correct: Sequence[bool | None] = ()
    """Whether each response is right, where a judge knows; None where it cannot say."""
    failed: Sequence[bool] = ()
    """Whether each response could not be judged as meant; of a judge that cannot fail so, nothing."""
    steps: Sequence[Sequence[float]] = ()
    """What each step of each response is worth, in order; of a judge of whole responses, nothing."""
    earned: Sequence[Sequence[float]] = ()
    """What each step earned, where steps earn; elsewhere what it is worth."""

    @property
    def scores(self) -> Tensor:
        """[B] fp32."""
        return self.token_scores.sum(1)

    def rows(self, chosen: Sequence[int]) -> Verdict:
        """Of the chosen rows."""
        return Verdict(
            self.token_scores[torch.tensor(chosen, device=self.token_scores.device)],
            {name: values[torch.tensor(chosen)] for name, values in self.parts.items()},
            [self.correct[row] for row in chosen] if self.correct else (),
            [self.failed[row] for row in chosen] if self.failed else (),
            [self.steps[row] for row in chosen] if self.steps else (),
            [self.earned[row] for row in chosen] if self.earned else (),
        )


def joined_verdicts(parts: Sequence[Verdict]) -> Verdict:
    """What one judge says of several batches, as of one; a part of a score that it did not name counts as 0."""
    names = sorted({name for part in parts for name in part.parts})
    return Verdict(
        padded_cat([part.token_scores for part in parts]),
        {
            name: torch.cat([part.parts.get(name, torch.zeros(len(part.token_scores))) for part in parts])
            for name in names
        },
        [right for part in parts for right in part.correct],
        [failed for part in parts for failed in part.failed],
        [steps for part in parts for steps in part.steps],
        [earned for part in parts for earned in part.earned],
    )


def padded_cat(parts: Sequence[Tensor]) -> Tensor:
    """[sum of B, largest T]: numbers of tokens [B, T] of several batches, 0 beyond a batch's own T."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1])) for part in parts])


class Judge(Protocol):
    """A source of scores. A new one is a file beside this, and a name in the union of judges/__init__.py."""

    @property
    def name(self) -> str:
        """The user's."""
        ...

    @property
    def weight(self) -> float:
        """Of its scores in the sum."""
        ...

    @property
    def wrong_score(self) -> float:
        """Mean score that it gives to wrong responses; inf where nobody knows."""
        ...

    def judge(self, rollout: Rollout) -> Verdict:
        """Judge every row. Collective: each rank calls it with the same global batch."""
        ...


UNKNOWN = math.inf
"""The wrong score of a judge of whom nobody measured it."""


def outcome(scores: Tensor, rollout: Rollout) -> Tensor:
    """Scores of whole responses where they belong: at the last response token.

    Shapes:   scores [B] fp32. Returns [B, T].
    """
    return torch.where(last_true(rollout.response_mask), scores[:, None], 0.0)
