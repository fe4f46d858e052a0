"""What every batch is: rows, and fields whose types say their axes.

B rows, T predicted positions (padded length - 1). Rows are right-padded, and every per-token tensor is [B, T], where
index t is about token t + 1: the shift from tokens to labels happens here and nowhere else.

A batch checks itself when it is built, which on a GPU waits for the device once. What is made from a checked batch
(rows, padded, trimmed, moved, joined) is not checked again.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Annotated, ClassVar, NamedTuple, Protocol, Self, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

ROW, SEQUENCE, TOKENS, TOKEN = "row", "sequence", "tokens", "token"
"""Axes whose sizes the tokens [sequences, T+1] of a batch decide: B; B, or 2B where a row is a pair; T + 1; T. An axis
by another name is as long as its first field says, and padding never touches it."""


class Axes(NamedTuple):
    """What the type of a field says of it."""

    dtype: torch.dtype
    names: tuple[str, ...]


Tokens = Annotated[Tensor, Axes(torch.int64, (SEQUENCE, TOKENS))]
"""[B, T+1] int64, right-padded."""
TokensMask = Annotated[Tensor, Axes(torch.bool, (SEQUENCE, TOKENS))]
"""[B, T+1] bool, as the tokens."""
TokensNumbers = Annotated[Tensor, Axes(torch.float32, (SEQUENCE, TOKENS))]
"""[B, T+1] fp32, as the tokens."""
TokenNumbers = Annotated[Tensor, Axes(torch.float32, (SEQUENCE, TOKEN))]
"""[B, T] fp32."""
TokenMask = Annotated[Tensor, Axes(torch.bool, (SEQUENCE, TOKEN))]
"""[B, T] bool."""
SequenceCounts = Annotated[Tensor, Axes(torch.int64, (SEQUENCE,))]
"""[B] int64, [2B] where a row is a pair."""
SequenceNumbers = Annotated[Tensor, Axes(torch.float32, (SEQUENCE,))]
"""[B] fp32, [2B] where a row is a pair."""
SequenceMask = Annotated[Tensor, Axes(torch.bool, (SEQUENCE,))]
"""[B] bool, [2B] where a row is a pair."""
RowNumbers = Annotated[Tensor, Axes(torch.float32, (ROW,))]
"""[B] fp32."""
Texts = tuple[str, ...]
"""One a row."""

Value: TypeAlias = "Tensor | Texts | Batch"
"""What a field holds; another batch is one of the same rows."""


@dataclass(frozen=True, eq=False)
class Batch:
    """What every stage can do: move to a device, select rows, add and drop padding.

    A field's type is one of those above (or `Annotated` with other `Axes`), `Texts`, or another batch.

    Raises:   ValueError naming the field and both shapes.
    """

    sequences_per_row: ClassVar[int] = 1
    """2 where a row is a pair, in sequences 2i and 2i + 1."""

    def __post_init__(self) -> None:
        tokens = cast(TokenRows, self).tokens
        if tokens.dtype != torch.int64 or tokens.ndim != 2 or tokens.shape[1] < 1:
            got = f"{tokens.dtype} {list(tokens.shape)}"
            raise ValueError(f"{type(self).__name__}.tokens: got {got}; must be torch.int64 [rows, 1 or more tokens].")
        sequences, width = tokens.shape
        rows, odd = divmod(sequences, self.sequences_per_row)
        if odd:
            each = self.sequences_per_row
            raise ValueError(f"{type(self).__name__}.tokens: {sequences} sequences; there must be {each} a row.")
        sizes = {ROW: rows, SEQUENCE: sequences, TOKENS: width, TOKEN: width - 1}
        for name, value in vars(self).items():
            _check(f"{type(self).__name__}.{name}", _kinds(type(self))[name], value, sizes)
        if "lengths" in vars(self):
            self._check_range("lengths", cast(TokenRows, self).lengths, 1, width)

    def __len__(self) -> int:
        return cast(TokenRows, self).tokens.shape[0] // self.sequences_per_row

    @property
    def inputs(self) -> Tensor:
        """[B, T]: what the model reads; position t sees tokens 0..t."""
        return cast(TokenRows, self).tokens[:, :-1]

    @property
    def labels(self) -> Tensor:
        """[B, T]: what it predicts; labels[:, t] is token t + 1."""
        return cast(TokenRows, self).tokens[:, 1:]

    def to(self, device: torch.device | str) -> Self:
        """The same rows with every tensor on `device`."""

        def move(value: Value, _: Axes | None) -> Value:
            return value if isinstance(value, tuple) else value.to(device)

        return self._derived(move)

    def rows(self, index: Tensor | slice) -> Self:
        """The rows that `index` (int64 [n], or a slice) selects, in its order."""
        sequences = _sequences(index, len(self), self.sequences_per_row)

        def take(value: Value, kind: Axes | None) -> Value:
            if isinstance(value, Batch):
                return value.rows(index)
            if isinstance(value, tuple):
                return value[index] if isinstance(index, slice) else tuple(value[i] for i in _numbers(index))
            return value[sequences if kind is not None and kind.names[0] == SEQUENCE else index]

        return self._derived(take)

    def padded_to(self, positions: int) -> Self:
        """The same rows with T = `positions`, no less than now. New tokens are 0: no mask ever reads them."""
        width = cast(TokenRows, self).tokens.shape[1]
        if positions + 1 < width:
            raise ValueError(f"padded_to: tokens has width {width}, asked for {positions + 1}; padding cannot shorten.")
        return self._resized(positions)

    def trimmed(self, positions: int) -> Self:
        """The same rows with T = `positions`, no more than now, which must reach every row's last token."""
        return self._resized(positions)

    def _resized(self, positions: int) -> Self:
        widths = {TOKENS: positions + 1, TOKEN: positions}

        def resize(value: Value, kind: Axes | None) -> Value:
            if isinstance(value, Batch):
                return value._resized(positions)
            axis = next((axis for axis, name in enumerate(kind.names) if name in widths), None) if kind else None
            if kind is None or axis is None or isinstance(value, tuple):
                return value
            return _to_width(value, axis, widths[kind.names[axis]])

        return self._derived(resize)

    def _derived(self, change: Callable[[Value, Axes | None], Value]) -> Self:
        """Every field changed, and nothing checked: what holds for these rows holds for what is made from them."""
        kinds = _kinds(type(self))
        return type(self).unchecked({name: change(value, kinds[name]) for name, value in vars(self).items()})

    @classmethod
    def unchecked(cls, fields: dict[str, Value]) -> Self:
        """A batch of these fields, which are known to be right."""
        made = object.__new__(cls)
        vars(made).update(fields)
        return made

    def _check_range(self, field: str, value: Tensor, low: int, high: Tensor | int) -> None:
        outside = (value < low) | (value > high)
        if outside.any():
            row = int(outside.nonzero()[0])
            top = int(high[row]) if isinstance(high, Tensor) else high
            raise ValueError(f"{type(self).__name__}.{field}: row {row} is {int(value[row])}; must be in {low}..{top}.")


class TokenRows(Protocol):
    """Any batch whose rows are sequences of tokens: what the pipeline driver and the collectives ask for."""

    @property
    def tokens(self) -> Tensor:
        """[B, T+1]."""
        ...

    @property
    def lengths(self) -> Tensor:
        """[B], or [2B] where a row is a pair of sequences."""
        ...

    def __len__(self) -> int: ...
    def to(self, device: torch.device | str) -> Self:
        """Move to a device."""
        ...

    def rows(self, index: Tensor | slice) -> Self:
        """Select rows."""
        ...

    def trimmed(self, positions: int) -> Self:
        """Drop padding."""
        ...

    def padded_to(self, positions: int) -> Self:
        """Add padding."""
        ...


RowsT = TypeVar("RowsT", bound=TokenRows)


def response_labels(tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """[B, T] bool of tokens [B, T+1]: True where the label is a response token (EOS in, prompt and padding out)."""
    token = torch.arange(1, tokens.shape[1], device=tokens.device)
    return (token >= prompt_lengths[:, None]) & (token < lengths[:, None])


def cat(parts: Sequence[RowsT]) -> RowsT:
    """All rows of batches of one type, in order, padded to the longest T."""
    longest = max(part.tokens.shape[1] for part in parts) - 1
    return cast(RowsT, _join([cast(Batch, part.padded_to(longest)) for part in parts]))


def _join(values: Sequence[Value]) -> Value:
    first = values[0]
    if isinstance(first, Batch):
        columns = {name: [cast(Value, vars(value)[name]) for value in values] for name in vars(first)}
        return type(first).unchecked({name: _join(column) for name, column in columns.items()})
    if isinstance(first, tuple):
        return tuple(chain.from_iterable(cast(Sequence[Texts], values)))
    return torch.cat(cast(list[Tensor], values))


@cache
def _kinds(batch: type[Batch]) -> dict[str, Axes | None]:
    """The axes of each tensor; None for texts and for a batch within."""
    return {
        name: next((extra for extra in typing.get_args(hint)[1:] if isinstance(extra, Axes)), None)
        for name, hint in typing.get_type_hints(batch, include_extras=True).items()
    }


def _check(field: str, kind: Axes | None, value: Value, sizes: dict[str, int]) -> None:
    """Raise ValueError unless the value has its type's dtype and axes; an axis not yet in `sizes` enters it."""
    if kind is not None and isinstance(value, Tensor):
        known = value.shape if value.ndim == len(kind.names) else (-1,) * len(kind.names)
        shape = [sizes.setdefault(name, size) for name, size in zip(kind.names, known, strict=True)]
        if value.dtype != kind.dtype or list(value.shape) != shape:
            raise ValueError(f"{field}: got {value.dtype} {list(value.shape)}; must be {kind.dtype} {shape}.")
    elif isinstance(value, Batch):
        if len(value) != sizes[ROW]:
            raise ValueError(f"{field}: got {len(value)} rows; must be {sizes[ROW]}.")
    elif not isinstance(value, tuple) or len(value) != sizes[ROW]:
        got = f"{type(value).__name__} of {len(value)}"
        raise ValueError(f'{field}: got {got}; must be a tuple of {sizes[ROW]} strings ("" unknown).')


def _numbers(index: Tensor) -> list[int]:
    return cast(list[int], index.tolist())  # pyright: ignore[reportUnknownMemberType]


def _sequences(index: Tensor | slice, rows: int, per_row: int) -> Tensor | slice:
    """Which sequences the rows at `index` have."""
    if per_row == 1:
        return index
    chosen = torch.arange(rows)[index] if isinstance(index, slice) else index
    return (chosen[:, None] * per_row + torch.arange(per_row, device=chosen.device)).flatten()


def _to_width(value: Tensor, axis: int, width: int) -> Tensor:
    missing = width - value.shape[axis]
    if missing <= 0:
        return value.narrow(axis, 0, width)
    return torch.cat([value, value.new_zeros((*value.shape[:axis], missing, *value.shape[axis + 1 :]))], dim=axis)
