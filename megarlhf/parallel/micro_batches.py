"""How the tokens of a batch lie in memory: in rows of similar length, or end to end, micro-batch by micro-batch.

This file alone knows. A reading names the positions whose final hidden states it wants, and is handed those states,
[n, H]; a loss likewise. Where they came from, and what padding was computed beside them, is nobody else's business.
Context ranks have the same micro-batches, each its own columns of them (`parallel/context.py`), and all of the states.

Data ranks may have different numbers of micro-batches: nothing is summed over them before the last. Stages that are
interleaved have a multiple of the pipeline's, all of one shape (`parallel/pipeline.py`).

All shapes are decided on the host, from one copy of the positions: a micro-batch never waits for a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from megarlhf.batch.base import RowsT, TokenRows
from megarlhf.parallel.context import Spread, chunks, own_columns, whole_states
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.packing import Index, first_fit, in_multiples

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


@dataclass
class Documents(PackedSeqParams):
    """Sequences that lie end to end, as attention must know them; Megatron's name for it is `thd`.

    Shapes:   positions [N / c] int64: of each token that this of c context ranks has, in its own document; lengths: of
              every document over all of them, N together.
    """

    positions: Tensor = field(default_factory=lambda: torch.empty(0))
    lengths: tuple[int, ...] = ()

    @classmethod
    def of(cls, lengths: Index, device: torch.device, columns: Index) -> Documents:
        """Documents of these lengths, one after another, of which this rank has `columns`."""
        starts = np.pad(np.cumsum(lengths), (1, 0)).astype(np.int32)
        ends, longest = _tensor(starts).to(device, non_blocking=True), int(lengths.max())
        positions = _within(lengths)[columns]
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            positions=_tensor(positions).to(device, non_blocking=True),
            lengths=tuple(map(int, lengths)),
        )


@dataclass(frozen=True)
class MicroBatch(Generic[RowsT]):
    """Some rows of a batch as a model gets them, on its device: each in a line of its own, or all in one.

    Shapes:   inputs [b, s] int64, or [1, N] of documents, of c context ranks s / c or N / c; places [s]: of what is in
              inputs, in its text; `read`, as inputs, bool: the positions that are read; line, column: where those are
              in inputs, of the n_r that this rank has; row, position, sequence [n]: where each of all n is in the rows
              of the micro-batch, and of which sequence of the batch.
    """

    rows: RowsT
    inputs: Tensor
    places: Tensor
    documents: Documents | None
    """None: each row has its line."""
    read: Tensor
    line: Tensor
    column: Tensor
    row: Tensor
    position: Tensor
    sequence: Tensor
    gathered: Gathered | None
    """How the states are put together; None where this rank has them all."""

    def forward(self, model: Any) -> Tensor:
        """Final hidden states [b, s, H] on the last stage; on the others, what is sent to the next."""
        # "Padding" is what Megatron calls positions that need no work.
        return model(
            self.inputs,
            self.places.expand_as(self.inputs),
            None,
            padding_mask=~self.read,
            packed_seq_params=self.documents,
        )

    def states(self, hidden: Tensor, context: ProcessGroup | None = None) -> States:
        """Those states of `hidden` [b, s, H] that are read; context: the ranks that share the sequences."""
        found = hidden[self.line, self.column]
        if self.gathered is not None and context is not None:
            found = whole_states(found, self.gathered.place, self.gathered.most, context)
        return States(found, self.row, self.position)

    def place(self, numbers: Tensor, out: Tensor) -> None:
        """Put `numbers` [n] where they belong in `out` [sequences of the batch, T + 1]."""
        out[self.sequence, self.position] = numbers


class Gathered(NamedTuple):
    """As in `Spread`."""

    place: Tensor
    most: int


class InRows(NamedTuple):
    """Micro-batches of so many rows, padded to the longest."""

    rows: int

    def __str__(self) -> str:
        """The setting."""
        return f"micro_batch={self.rows}"


class InTokens(NamedTuple):
    """Micro-batches of whole rows end to end, so many tokens at most."""

    tokens: int

    def __str__(self) -> str:
        """The setting."""
        return f"micro_batch_tokens={self.tokens}"


Cut = InRows | InTokens
"""How much one forward on one data rank takes."""


class Shapes(NamedTuple):
    """What decides how a batch is cut."""

    cut: Cut
    layout: ParallelLayout
    fp8_multiple: int
    """Of `layout.fp8_multiple`."""
    device: torch.device
    context_rank: int = 0

    @property
    def interleaved(self) -> bool:
        """Whether all micro-batches must be of one shape, and a multiple of the pipeline's stages."""
        return self.layout.virtual_pipeline > 1


def split(batch: RowsT, at: Tensor, shapes: Shapes, *, may_repeat: bool) -> list[MicroBatch[RowsT]]:
    """The micro-batches of a data rank's rows.

    Tokens after the last position that is read are left out: nothing that is read can see them.

    Shapes:   at [sequences, T + 1] bool: the positions to read.
    Raises:   ValueError when interleaved stages would get unequal parts and no row `may_repeat` to even them out, and
              where a row exceeds a budget of tokens.
    """
    reads = cast(NDArray[np.bool_], np.asarray(at.cpu()))
    ends = ends_of(reads).reshape(len(batch), -1)
    match shapes.cut:
        case InRows(count):
            return _lines(batch, reads, ends.max(axis=1), count, shapes, may_repeat=may_repeat)
        case InTokens(budget):
            return _packs(batch, reads, ends, budget, shapes, may_repeat=may_repeat)


def ends_of(reads: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[sequences]: how many tokens of each a model must see; at least one. reads [sequences, T + 1]: which are read."""
    after = cast(NDArray[np.int64], np.arange(1, reads.shape[1] + 1))
    return np.max(np.where(reads, after, 1), axis=1)


def _lines(
    batch: RowsT, reads: NDArray[np.bool_], ends: Index, count: int, shapes: Shapes, *, may_repeat: bool
) -> list[MicroBatch[RowsT]]:
    """Rows ordered by where their last read position is, `count` together: neighbours are alike, so little is padding.

    ends [rows]: tokens that a model must see of each.
    """
    order = np.argsort(-ends, kind="stable")
    if shapes.interleaved:
        missing = -len(batch) % (count * shapes.layout.pipeline)
        if missing and not may_repeat:
            raise ValueError(
                f"{len(batch)} rows are not a multiple of micro_batch={count} x "
                f"pipeline={shapes.layout.pipeline}, which interleaved stages need; change micro_batch."
            )
        order = np.concatenate([order, order[-1:].repeat(missing)])
    chunks = [order[first : first + count] for first in range(0, len(order), count)]
    return [
        _padded(batch, reads, rows, int(ends.max() if shapes.interleaved else ends[rows].max()), shapes)
        for rows in chunks
    ]


def _padded(batch: RowsT, reads: NDArray[np.bool_], chosen: Index, end: int, shapes: Shapes) -> MicroBatch[RowsT]:
    """The rows `chosen`, none of whose tokens from `end` on are read, each in a line of its own."""
    rows, sequences = _chosen(batch, reads, chosen, end, shapes)
    read = reads[sequences, :end]
    missing = -end % sequence_multiple(len(sequences), shapes.layout, shapes.fp8_multiple)
    tokens = torch.nn.functional.pad(rows.tokens[:, :end], (0, missing))
    line, column = read.nonzero()
    found = _Found(line, column, row=line, position=column, sequence=sequences[line])
    lengths = np.array([end + missing])
    return _placed_on(rows, tokens, np.pad(read, ((0, 0), (0, missing))), found, lengths, shapes, packed=False)


def _packs(
    batch: RowsT, reads: NDArray[np.bool_], ends: Index, budget: int, shapes: Shapes, *, may_repeat: bool
) -> list[MicroBatch[RowsT]]:
    """Rows end to end, as many together as the budget takes. ends [rows, sequences of one]: as for `_lines`."""
    packs = first_fit(ends.sum(axis=1), budget)
    if shapes.interleaved and may_repeat:
        packs += packs[-1:] * (-len(packs) % shapes.layout.pipeline)
    elif shapes.interleaved:
        packs = in_multiples(packs, shapes.layout.pipeline)
    multiple = sequence_multiple(1, shapes.layout, shapes.fp8_multiple)
    laid = _rounded(ends, chunks(shapes.layout.context))
    sizes = [-(-int(laid[rows].sum()) // multiple) * multiple for rows in packs]
    if shapes.interleaved:
        sizes = [max(sizes)] * len(sizes)
    return [_packed(batch, reads, ends, rows, size, shapes) for rows, size in zip(packs, sizes, strict=True)]


def _packed(
    batch: RowsT, reads: NDArray[np.bool_], ends: Index, chosen: Index, size: int, shapes: Shapes
) -> MicroBatch[RowsT]:
    """The sequences of the rows `chosen` end to end, each filled up to what context ranks can share, and all to `size`.

    What fills a text up counts as part of it: it stands behind the text, where nothing that is read sees it.
    """
    lengths = ends[chosen].reshape(-1)
    laid = _rounded(lengths, chunks(shapes.layout.context))
    longest, filled = int(laid.max()), int(laid.sum())
    rows, sequences = _chosen(batch, reads, chosen, int(lengths.max()), shapes)
    # What fills up is documents too, none longer than the others: whatever reads the pack need not know of them.
    filler = [min(longest, size - first) for first in range(filled, size, longest)]
    starts = np.cumsum(laid) - laid
    line, place = np.repeat(np.arange(len(lengths)), lengths), _within(lengths)
    at = starts[line] + place
    tokens = rows.tokens.new_zeros(1, size)
    tokens[0, _placed(at, shapes)] = rows.tokens[_placed(line, shapes), _placed(place, shapes)]
    read = np.zeros((1, size), dtype=np.bool_)
    read[0, at] = reads[sequences[line], place]
    row, position = reads[sequences, : int(lengths.max())].nonzero()
    found = _Found(np.zeros_like(row), starts[row] + position, row, position, sequences[row])
    every = np.concatenate([laid, np.array(filler, dtype=np.int64)])
    return _placed_on(rows, tokens, read, found, every, shapes, packed=True)


class _Found(NamedTuple):
    """[n] each: where the states that are read are, in the lines of all context ranks, in the rows and in the batch."""

    line: Index
    column: Index
    row: Index
    position: Index
    sequence: Index


def _placed_on(
    rows: RowsT,
    tokens: Tensor,
    read: NDArray[np.bool_],
    found: _Found,
    lengths: Index,
    shapes: Shapes,
    *,
    packed: bool,
) -> MicroBatch[RowsT]:
    """The columns that this context rank has of `tokens` [b, s], which are texts of these lengths in each line."""
    context, rank = shapes.layout.context, shapes.context_rank
    line, column, gathered = found.line, found.column, None
    own = own_columns(lengths, rank, context)
    if context > 1:
        spread = Spread.of(column, lengths, rank, context)
        line, column = line[spread.own], spread.columns
        gathered = Gathered(_placed(spread.place, shapes), spread.most)
        tokens, read = tokens[:, _placed(own, shapes)], read[:, own]
    documents = Documents.of(lengths, shapes.device, own) if packed else None
    return MicroBatch(
        rows=rows,
        inputs=tokens,
        places=_placed(own, shapes) if documents is None else documents.positions,
        documents=documents,
        read=_placed(read, shapes),
        line=_placed(line, shapes),
        column=_placed(column, shapes),
        row=_placed(found.row, shapes),
        position=_placed(found.position, shapes),
        sequence=_placed(found.sequence, shapes),
        gathered=gathered,
    )


def _chosen(batch: RowsT, reads: NDArray[np.bool_], chosen: Index, end: int, shapes: Shapes) -> tuple[RowsT, Index]:
    """The rows `chosen` on the device, cut after `end` tokens, and which sequences of the batch they are."""
    each, width = len(reads) // len(batch), reads.shape[1]
    rows = batch.rows(_tensor(chosen)).trimmed(min(end, width - 1)).to(shapes.device)
    return rows, (chosen[:, None] * each + np.arange(each)).reshape(-1)


def _rounded(numbers: Index, multiple: int) -> Index:
    """Up to a multiple, each."""
    return numbers + -numbers % multiple


def _within(lengths: Index) -> Index:
    """[N]: of each token of documents end to end, how many of its own document stand before it."""
    starts = np.cumsum(lengths) - lengths
    return cast(Index, np.arange(lengths.sum()) - np.repeat(starts, lengths))


def _placed(numbers: NDArray[Any], shapes: Shapes) -> Tensor:
    return _tensor(numbers).to(shapes.device, non_blocking=True)


def _tensor(numbers: NDArray[Any]) -> Tensor:
    return torch.from_numpy(numbers)  # pyright: ignore[reportUnknownMemberType]


def sequence_multiple(rows: int, layout: ParallelLayout, fp8_multiple: int) -> int:
    """Of what the padded length of `rows` rows must be a multiple: tensor ranks hold equal slices of the sequence under
    sequence parallelism, context ranks two equal chunks of it, and what a rank holds, b x s positions, goes into FP8
    products."""
    slices = layout.tensor if layout.sequence_parallel else 1
    own = slices * (fp8_multiple // math.gcd(fp8_multiple, rows))
    return math.lcm(chunks(layout.context), layout.context * own)
