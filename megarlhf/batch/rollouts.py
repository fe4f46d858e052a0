"""Prompts, what was sampled from them, and what the optimiser learns from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megarlhf.batch.base import (
    Batch,
    SequenceCounts,
    SequenceMask,
    Texts,
    TokenNumbers,
    Tokens,
    response_labels,
)


@dataclass(frozen=True, eq=False)
class Prompts(Batch):
    """Conditioning text to roll out.

    Shapes:   tokens [P, L] int64 right-padded; lengths [P] int64 in 1..L; ids [P] int64; answers: P strings.
    Raises:   ValueError naming the field and both shapes.
    """

    tokens: Tokens
    lengths: SequenceCounts
    ids: SequenceCounts
    """Row of the data set: with the sample's index it seeds the rollout, whatever the batch it is in."""
    answers: Texts
    """Expected answers for verifiers, "" where unknown."""

    def repeat(self, group_size: int) -> Prompts:
        """Each prompt `group_size` times, copies adjacent."""
        count = len(self)
        return self.rows(torch.arange(count, device=self.tokens.device).repeat_interleave(group_size))


@dataclass(frozen=True, eq=False)
class Rollout(Batch):
    """Prompts with one response each, and what the sampler said about it.

    Shapes:   tokens [B, T+1] int64, prompt directly followed by response, right-padded; prompt_lengths, lengths,
              prompt_ids [B] int64; terminated [B] bool; sampler_logprobs [B, T] fp32; answers: B strings.
    Units:    sampler_logprobs in nats, 0 where there is no response token.
    Raises:   ValueError naming the field and both shapes, or lengths outside 1 <= prompt <= length <= T+1.
    """

    tokens: Tokens
    prompt_lengths: SequenceCounts
    lengths: SequenceCounts
    """Prompt plus response, EOS included."""
    terminated: SequenceMask
    """True when the response ended with EOS, False when it was cut at the token limit."""
    sampler_logprobs: TokenNumbers
    prompt_ids: SequenceCounts
    answers: Texts

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_range("prompt_lengths", self.prompt_lengths, 1, self.lengths)

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool: True where the label is a response token (EOS in, prompt and padding out)."""
        return response_labels(self.tokens, self.prompt_lengths, self.lengths)

    @property
    def response_lengths(self) -> Tensor:
        """[B] int64."""
        return self.lengths - self.prompt_lengths


@dataclass(frozen=True, eq=False)
class LearnerRows(Batch):
    """Rollouts with what one learner needs of them besides: one type a learner, not an algorithm.

    Shapes:   every field [B, T] fp32, as `rollout.labels`. Raises: ValueError naming the field and both shapes.
    """

    rollout: Rollout

    @property
    def tokens(self) -> Tensor:
        """[B, T+1]: the rollout's."""
        return self.rollout.tokens

    @property
    def lengths(self) -> Tensor:
        """[B]: the rollout's."""
        return self.rollout.lengths

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool: the rollout's."""
        return self.rollout.response_mask

    def mini_batches(self, size: int, generator: torch.Generator) -> Iterator[Self]:
        """Every row once: a permutation from `generator` (a CPU one), cut into consecutive chunks of `size`.

        Raises:   ValueError if `size` does not divide the rows, since a short last chunk would weigh its rows more.
        """
        count = len(self)
        if size < 1 or count % size:
            raise ValueError(f"mini_batches: {count} rows do not divide into chunks of {size}; choose a divisor.")
        order = torch.randperm(count, generator=generator).to(self.tokens.device)
        for first in range(0, count, size):
            yield self.rows(order[first : first + size])


@dataclass(frozen=True, eq=False)
class PolicyRows(LearnerRows):
    """What a policy learns from."""

    logprobs: TokenNumbers
    """When the rollout was made, in nats."""
    advantages: TokenNumbers

    @classmethod
    def random(cls, rollout: Rollout, logprobs: Tensor, generator: torch.Generator) -> Self:
        """Rows of a rollout whose log-probs are known [B, T], with normal random advantages: what a loss is checked on.

        Equal in every layout.
        """
        return cls(rollout, logprobs, _normal(logprobs, generator))


@dataclass(frozen=True, eq=False)
class Anchored(PolicyRows):
    """And what it is kept near by a term of its loss."""

    ref_logprobs: TokenNumbers
    """The reference's, in nats; the policy's own where nothing keeps it near another."""

    @classmethod
    def random(cls, rollout: Rollout, logprobs: Tensor, generator: torch.Generator) -> Self:
        """And with a reference that is near: farther than 20 nats from it a KL would be all that is seen."""
        return cls(rollout, logprobs, _normal(logprobs, generator), logprobs + _normal(logprobs, generator))


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator).to(like.device)


@dataclass(frozen=True, eq=False)
class ValueRows(LearnerRows):
    """What a critic learns from, in reward."""

    values: TokenNumbers
    """When the rollout was made."""
    returns: TokenNumbers
