"""What is read of a model's final hidden states: log-probs, values, scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megarlhf.batch.base import TokenRows
from megarlhf.models.transformer import HeadKind, LlamaModel
from megarlhf.parallel.micro_batches import RowsT_contra, States


class ResponseRows(TokenRows, Protocol):
    """Rows of which some tokens are responses, or supervised."""

    @property
    def labels(self) -> Tensor:
        """[B, T]: token t + 1 at index t."""
        ...

    @property
    def response_mask(self) -> Tensor:
        """[B, T] bool."""
        ...


class SteppedRows(TokenRows, Protocol):
    """Rows of which some tokens end steps."""

    @property
    def step_ends(self) -> Tensor:
        """[B, T + 1] bool."""
        ...


class Reading(Protocol[RowsT_contra]):
    """What scoring a batch with a role means."""

    def at(self, rows: RowsT_contra) -> Tensor:
        """[B, T + 1] bool: the tokens whose final hidden states are read, of every sequence."""
        ...

    def __call__(self, model: LlamaModel, states: States, rows: RowsT_contra) -> Tensor:
        """[n] fp32: one number a state."""
        ...

    def scores(self, numbers: Tensor, rows: RowsT_contra) -> Tensor:
        """What scoring returns: `numbers` [B, T + 1], 0 where nothing was read, in the shape that fits the reading."""
        ...


class BeforeResponses:
    """Reads the state before each response token, and nothing elsewhere."""

    def at(self, rows: ResponseRows) -> Tensor:
        """[B, T + 1]: label t is predicted after token t."""
        return torch.nn.functional.pad(rows.response_mask, (0, 1))

    def scores(self, numbers: Tensor, rows: ResponseRows) -> Tensor:
        """[B, T], 0 outside of responses."""
        return numbers[:, :-1]


@dataclass(frozen=True)
class _Scalars:
    """(scalar head - offset) / scale."""

    offset: float = 0.0
    scale: float = 1.0
    head: ClassVar[HeadKind] = "scalar"

    def __call__(self, model: LlamaModel, states: States, rows: TokenRows) -> Tensor:
        """[n] fp32."""
        return (model.scalars(states.hidden) - self.offset) / self.scale


@dataclass(frozen=True)
class LabelLogprobs(BeforeResponses):
    """Log-prob of every response token under the model, temperature applied. 0 elsewhere."""

    temperature: float
    head: ClassVar[HeadKind] = "language"

    def __call__(self, model: LlamaModel, states: States, rows: ResponseRows) -> Tensor:
        """[n] fp32."""
        labels = states.of(rows.labels)
        return model.label_logprobs(states.hidden, labels, temperature=self.temperature, with_entropy=False)[0]


class PositionValues(_Scalars, BeforeResponses):
    """(scalar head - offset) / scale at each position that predicts a response token: the state before it. 0 elsewhere.

    A critic that starts from a normalised reward model keeps its normalisation, or its first values would be off by it.
    """


class SequenceScores(_Scalars):
    """(scalar head at each sequence's last token - offset) / scale: one score for the whole text."""

    def at(self, rows: TokenRows) -> Tensor:
        """[B, T + 1]: one a sequence."""
        return torch.arange(rows.tokens.shape[1], device=rows.tokens.device) == (rows.lengths - 1)[:, None]

    def scores(self, numbers: Tensor, rows: TokenRows) -> Tensor:
        """[B]."""
        last = rows.lengths.to(numbers.device) - 1
        return numbers.gather(1, last[:, None])[:, 0]


class StepScores(_Scalars):
    """(scalar head at the last token of each step - offset) / scale. 0 elsewhere."""

    def at(self, rows: SteppedRows) -> Tensor:
        """[B, T + 1]: one a step."""
        return rows.step_ends

    def scores(self, numbers: Tensor, rows: SteppedRows) -> Tensor:
        """[B, T], where index t is about token t + 1, as labels are."""
        return numbers[:, 1:]


HeadReading = LabelLogprobs | PositionValues | SequenceScores | StepScores
"""A reading of one kind of head, which it names."""
