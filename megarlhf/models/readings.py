"""What is read of a model's final hidden states: log-probs, values, scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megarlhf.models.transformer import LlamaModel


class Reading(Protocol):
    """What scoring a batch with a role means."""

    per_token: bool
    """Whether it gives one number a position ([b, T]) or one a row ([b])."""

    def reads(self, rows: Any) -> Tensor:
        """[b, s] bool: the inputs whose final hidden states are read; s = T + 1 where the last token itself may be."""
        ...

    def __call__(self, model: LlamaModel, hidden: Tensor, rows: Any) -> Tensor:
        """Read hidden states [b, s, H]."""
        ...


@dataclass(frozen=True)
class LabelLogprobs:
    """Log-prob of every response token under the model, temperature applied. 0 elsewhere."""

    temperature: float
    per_token = True

    def reads(self, rows: Any) -> Tensor:
        """[b, T]."""
        return rows.response_mask

    def __call__(self, model: LlamaModel, hidden: Tensor, rows: Any) -> Tensor:
        """[b, T]."""
        return model.label_logprobs(
            hidden, rows.labels, rows.response_mask, temperature=self.temperature, with_entropy=False
        )[0]


@dataclass(frozen=True)
class PositionValues:
    """(scalar head - offset) / scale at each position that predicts a response token: the state before it. 0 elsewhere.

    A critic that starts from a normalised reward model keeps its normalisation, or its first values would be off by it.
    """

    offset: float = 0.0
    scale: float = 1.0
    per_token = True

    def reads(self, rows: Any) -> Tensor:
        """[b, T]."""
        return rows.response_mask

    def __call__(self, model: LlamaModel, hidden: Tensor, rows: Any) -> Tensor:
        """[b, T]."""
        mask = rows.response_mask
        values = (model.scalars(hidden)[:, : mask.shape[1]] - self.offset) / self.scale
        return values.masked_fill(~mask, 0.0)


@dataclass(frozen=True)
class SequenceScores:
    """(scalar head at each row's last token - offset) / scale: one score for the whole text."""

    offset: float = 0.0
    scale: float = 1.0
    per_token = False

    def reads(self, rows: Any) -> Tensor:
        """[b, T + 1]: one a row."""
        return torch.arange(rows.tokens.shape[1], device=rows.tokens.device) == (rows.lengths - 1)[:, None]

    def __call__(self, model: LlamaModel, hidden: Tensor, rows: Any) -> Tensor:
        """[b]."""
        last = rows.lengths - 1
        raw = model.scalars(hidden[torch.arange(len(last), device=last.device), last])
        return (raw - self.offset) / self.scale
