"""How the tokens of a batch lie in memory: in rows of similar length, micro-batch by micro-batch.

This file alone knows. A reading names the positions whose final hidden states it wants, and is handed those states,
[n, H]; a loss likewise. Where they came from, and what padding was computed beside them, is nobody else's business.

All shapes are decided on the host, from one copy of the positions: a micro-batch never waits for a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megarlhf.batch.base import RowsT, TokenRows
from megarlhf.parallel.layout import FP8_MULTIPLE, ParallelLayout

RowsT_contra = TypeVar("RowsT_contra", bound=TokenRows, contravariant=True)


@dataclass(frozen=True)
class States:
    """Final hidden states at the positions that a reading named, row by row.

    Shapes:   hidden [n, H]; row, position [n] int64: state i is that of token `position[i]` of sequence `row[i]`, which
              predicts token `position[i] + 1`.
    """

    hidden: Tensor
    row: Tensor
    position: Tensor

    @property
    def count(self) -> int:
        """n: how many states there are."""
        return self.row.shape[0]

    def of(self, values: Tensor) -> Tensor:
        """[n, ...]: of `values` [b, T, ...], or [b, T + 1, ...], those at the positions of the states."""
        return values[self.row, self.position]


@dataclass(frozen=True)
class LossSums:
    """A loss over some states: sums, to be divided once by the counts over the whole batch."""

    total: Tensor
    """The loss, with its gradient."""
    count: int
    """What the loss is divided by, summed over the batch: tokens, or rows."""
    metrics: dict[str, Tensor]
    """Sums over the states, without gradient."""
    metric_count: int
    """What those are divided by, summed over the batch."""


class Loss(Protocol[RowsT_contra]):
    """Called on the last stage with the states that the role's reading named, and their rows."""

    def __call__(self, states: States, rows: RowsT_contra, /) -> LossSums:
        """Sums over the states."""
        ...


class Read(Protocol[RowsT_contra]):
    """Likewise: what a role reads off the states."""

    def __call__(self, states: States, rows: RowsT_contra, /) -> Tensor:
        """[n] fp32."""
        ...


@dataclass(frozen=True)
class MicroBatch(Generic[RowsT]):
    """Some rows of a batch as a model gets them, on its device.

    Shapes:   inputs [b, s] int64, and `read` [b, s] bool, the positions that are read; row, position, sequence [n]:
              where those are in the micro-batch, and of which sequence of the batch.
    """

    rows: RowsT
    inputs: Tensor
    read: Tensor
    row: Tensor
    position: Tensor
    sequence: Tensor

    def forward(self, model: Any) -> Tensor:
        """Final hidden states [b, s, H] on the last stage; on the others, what is sent to the next."""
        positions = torch.arange(self.inputs.shape[1], device=self.inputs.device).expand_as(self.inputs)
        # "Padding" is what Megatron calls positions that need no work.
        return model(self.inputs, positions, None, padding_mask=~self.read)

    def states(self, hidden: Tensor) -> States:
        """Those states of `hidden` [b, s, H] that are read."""
        return States(hidden[self.row, self.position], self.row, self.position)

    def place(self, numbers: Tensor, out: Tensor) -> None:
        """Put `numbers` [n] where they belong in `out` [sequences of the batch, T + 1]."""
        out[self.sequence, self.position] = numbers


class Shapes(NamedTuple):
    """What decides how a batch is cut."""

    micro_batch: int
    """Rows of a micro-batch."""
    layout: ParallelLayout
    fp8: bool
    device: torch.device


def split(batch: RowsT, at: Tensor, shapes: Shapes, *, may_repeat: bool) -> list[MicroBatch[RowsT]]:
    """Rows ordered by where their last read position is, in micro-batches: neighbours are alike, so little is padding.

    Tokens after the last position that is read are left out: nothing that is read can see them.

    Shapes:   at [sequences, T + 1] bool: the positions to read.
    Raises:   ValueError when interleaved stages would get unequal parts and no row `may_repeat` to even them out.
    """
    reads = cast(NDArray[np.bool_], np.asarray(at.cpu()))
    ends: NDArray[np.int64] = np.max(ends_of(reads).reshape(len(batch), -1), axis=1)
    order = np.argsort(-ends, kind="stable")
    interleaved = shapes.layout.virtual_pipeline > 1
    if interleaved:
        missing = -len(batch) % (shapes.micro_batch * shapes.layout.pipeline)
        if missing and not may_repeat:
            raise ValueError(
                f"{len(batch)} rows are not a multiple of micro_batch={shapes.micro_batch} x "
                f"pipeline={shapes.layout.pipeline}, which interleaved stages need; change micro_batch."
            )
        order = np.concatenate([order, order[-1:].repeat(missing)])
    chunks = [order[first : first + shapes.micro_batch] for first in range(0, len(order), shapes.micro_batch)]
    return [
        _micro_batch(batch, reads, rows, int(ends.max() if interleaved else ends[rows].max()), shapes)
        for rows in chunks
    ]


def ends_of(reads: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[sequences]: how many tokens of each a model must see; at least one. reads [sequences, T + 1]: which are read."""
    after = cast(NDArray[np.int64], np.arange(1, reads.shape[1] + 1))
    return np.max(np.where(reads, after, 1), axis=1)


def _micro_batch(
    batch: RowsT, reads: NDArray[np.bool_], chosen: NDArray[np.int64], end: int, shapes: Shapes
) -> MicroBatch[RowsT]:
    """The rows `chosen`, none of whose tokens from `end` on are read."""
    each, width = len(reads) // len(batch), reads.shape[1]
    rows = batch.rows(_tensor(chosen)).trimmed(min(end, width - 1)).to(shapes.device)
    sequences = (chosen[:, None] * each + np.arange(each)).reshape(-1)
    read = reads[sequences, :end]
    row, position = read.nonzero()

    def placed(numbers: NDArray[Any]) -> Tensor:
        return _tensor(numbers).to(shapes.device, non_blocking=True)

    missing = -end % sequence_multiple(len(sequences), shapes.layout, fp8=shapes.fp8)
    return MicroBatch(
        rows=rows,
        inputs=torch.nn.functional.pad(rows.tokens[:, :end], (0, missing)),
        read=placed(np.pad(read, ((0, 0), (0, missing)))),
        row=placed(row),
        position=placed(position),
        sequence=placed(sequences[row]),
    )


def _tensor(numbers: NDArray[Any]) -> Tensor:
    return torch.from_numpy(numbers)  # pyright: ignore[reportUnknownMemberType]


def sequence_multiple(rows: int, layout: ParallelLayout, *, fp8: bool) -> int:
    """Of what the padded length of `rows` rows must be a multiple: tensor ranks hold equal slices of the sequence under
    sequence parallelism, and what a rank holds, b x s positions, goes into FP8 products."""
    slices = layout.tensor if layout.sequence_parallel else 1
    return slices * (FP8_MULTIPLE // math.gcd(FP8_MULTIPLE, rows) if fp8 else 1)
