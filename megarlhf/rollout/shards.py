"""Which part of each weight a rank has in a layout, and what must go from whom to whom to have it in another.

Megatron-Core has a planner for this. In 0.16.1 it refuses a vocabulary that two layouts pad to different sizes, sees
one model chunk a rank, and lets the first copy of a model feed all ranks, also those that have the weights themselves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers to read numbers of so many bytes as."""


class Cut(NamedTuple):
    """How a weight is split over tensor ranks."""

    dim: int
    """Along this dimension."""
    pieces: int = 1
    """Each of so many parts of it by itself: the gate and what it lets through lie one after the other."""


_CUTS: dict[str, Cut | None] = {
    "embedding.word_embeddings": Cut(0),
    "output_layer": Cut(0),
    "self_attention.linear_qkv": Cut(0),
    "self_attention.linear_proj": Cut(1),
    "mlp.linear_fc1": Cut(0, pieces=2),
    "mlp.linear_fc2": Cut(1),
    "input_layernorm": None,
    "pre_mlp_layernorm": None,
    "decoder.final_layernorm": None,
}
"""By what a language model's weights are called in Megatron-Core, without the number of their layer."""


def cut_of(name: str) -> Cut | None:
    """How the weight `name` is split; None of one that every tensor rank has whole.

    Of an adapter, .lora.b is split as the outputs of its weight are, and .lora.a as the inputs.

    Raises:   KeyError for a name that no language model of ours has.
    """
    weight, dot, part = re.sub(r"^decoder\.layers\.\d+\.", "", name).removesuffix(".weight").partition(".lora.")
    cut = _CUTS[weight]
    return None if dot and (cut is None or cut.dim != {"a": 1, "b": 0}[part]) else cut


class Span(NamedTuple):
    """Neighbouring rows (of a weight that is cut along dimension 1: columns) that a rank has."""

    first: int
    """In the whole weight."""
    last: int
    """One past the end."""
    at: int
    """Where they begin in the rank's part."""


def spans(rows: int, pieces: int, part: int, parts: int) -> list[Span]:
    """What the `part`-th of `parts` tensor ranks has of `rows`; padding, which is past the end, left out."""
    block = -(-rows // (pieces * parts))
    firsts = [((piece * parts + part) * block, piece * block) for piece in range(pieces)]
    return [Span(first, min(first + block, rows), at) for first, at in firsts if first < rows]


class Move(NamedTuple):
    """Rows of a weight that one rank has and another needs."""

    name: str
    source: int
    target: int
    dim: int
    start: int
    """In the source's part."""
    to: int
    """In the target's part."""
    length: int


@dataclass(frozen=True)
class Places:
    """Who has what of a model in one layout."""

    parts: int
    """Tensor ranks."""
    part_of: Sequence[int]
    """Each rank's place among them."""
    names: Sequence[Sequence[str]]
    """Of the weights of which each rank has its part."""

    def holders(self) -> dict[str, list[list[int]]]:
        """Of each weight, for each part, the ranks that have it."""
        found: dict[str, list[list[int]]] = {}
        for rank, names in enumerate(self.names):
            for name in names:
                found.setdefault(name, [[] for _ in range(self.parts)])[self.part_of[rank]].append(rank)
        return found


def moves_of(rank: int, rows: Mapping[str, int], here: Places, there: Places) -> Iterator[Move]:
    """What `rank` sends, receives or keeps when weights that are `here` are wanted `there`, too.

    Of what two ranks send each other the order is the same for both: by name, then by place. A rank that has what it
    needs takes it from itself; else the copies of a model take turns.
    rows: of each whole weight, without padding.
    """
    holders = here.holders()
    for name, total in rows.items():
        cut, having = cut_of(name), holders[name]
        for target, part in enumerate(there.part_of):
            if cut is None:
                source = _source([each for ranks in having for each in ranks], target)
                if rank in (source, target):
                    yield Move(name, source, target, 0, 0, 0, total)
                continue
            for theirs, ranks in enumerate(having):
                source = _source(ranks, target)
                if rank in (source, target):
                    yield from _between(name, total, cut, (source, theirs, here.parts), (target, part, there.parts))


def _source(ranks: Sequence[int], target: int) -> int:
    return target if target in ranks else ranks[target % len(ranks)]


def _between(
    name: str, rows: int, cut: Cut, source: tuple[int, int, int], target: tuple[int, int, int]
) -> Iterator[Move]:
    """What the rank `target` needs of what `source` has; each a rank, its part, and of how many."""
    for wanted in spans(rows, cut.pieces, target[1], target[2]):
        for has in spans(rows, cut.pieces, source[1], source[2]):
            first, last = max(wanted.first, has.first), min(wanted.last, has.last)
            if first < last:
                start, to = first - has.first + has.at, first - wanted.first + wanted.at
                yield Move(name, source[0], target[0], cut.dim, start, to, last - first)


def numbers_a_word(name: str, weight: Tensor, rows: int, parts: Sequence[int]) -> int:
    """How many numbers are read as one integer: as many as 8 bytes hold, unless a part ends between them.

    Adding integers of 64 bits costs a CPU a tenth of what adding shorter ones to them does.
    weight: a rank's part; parts: tensor ranks of every layout in which it is read.
    """
    cut = cut_of(name)
    lengths = [weight.shape[-1]]
    if cut is not None and cut.dim == weight.ndim - 1:
        lengths = [rows // count for count in parts]
    most = 8 // weight.element_size()
    return next(count for count in (8, 4, 2, 1) if count <= most and all(length % count == 0 for length in lengths))


def checksum(name: str, weight: Tensor, rows: int, part: int, parts: int, *, together: int) -> Tensor:
    """A number of the bits of this rank's part, which summed over the parts does not depend on how many there are.

        sum over r of (2 r + 1) bits_r   modulo 2^64,   bits_r the sum of row (or column) r's words, read as integers

    So a single other bit shows, and so do parts of a weight in the wrong place.
    together: of `numbers_a_word`.
    Shapes:   returns [] int64.
    """
    cut, weight = cut_of(name), weight.detach()
    along = 0 if cut is None else cut.dim
    if weight.storage_offset() % together:
        weight = weight.clone()  # words lie on borders of words
    words = weight.view(WORDS[weight.element_size() * together])
    others = [dim for dim in range(words.ndim) if dim != along]
    sums = words.sum(others, dtype=torch.int64) if others else words.long()
    unit = together if along == words.ndim - 1 else 1
    mine = spans(rows, 1, 0, 1) if cut is None else spans(rows, cut.pieces, part, parts)
    total = sums.new_zeros(())
    for first, last, at in mine:
        odd = torch.arange(first // unit, last // unit, device=sums.device) * 2 + 1
        total += (odd * sums[at // unit : at // unit + len(odd)]).sum()
    return total
