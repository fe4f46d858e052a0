"""How the tensors of a Megatron checkpoint and of a Hugging Face directory are cut into pieces that fit each other.

A checkpoint stacks the layers: `decoder.layers.mlp.linear_fc1.weight` is [layers, 2 F, H].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlhf.checkpoint.hf_files import Part
from megarlhf.checkpoint.hf_names import LAYER, Source, shape_of, source_of
from megarlhf.models.spec import ModelSpec
from megarlhf.models.transformer import HeadKind


@dataclass(frozen=True)
class Piece:
    """A box of a Megatron tensor, layers stacked, and the parts of Hugging Face tensors it is made of."""

    key: str
    """Name in the checkpoint."""
    size: tuple[int, ...]
    """Shape of the whole tensor, vocabulary not padded."""
    offset: tuple[int, ...]
    """Where the box begins."""
    shape: tuple[int, ...]
    """Shape of the box; a tensor of the layers has 1 in front."""
    parts: tuple[Part, ...]
    """One, or queries, keys and values of `groups` query groups."""
    groups: int = 0

    def join(self, tensors: list[Tensor]) -> Tensor:
        """The box made of its parts."""
        if not self.groups:
            return tensors[0].reshape(self.shape)
        # Each key-value head follows the query heads that read it.
        return torch.cat([tensor.unflatten(0, (self.groups, -1)) for tensor in tensors], dim=1).view(self.shape)

    def split(self, box: Tensor) -> list[Tensor]:
        """The parts the box is made of."""
        if not self.groups:
            return [box.view(self.parts[0].shape)]
        rows = [part.shape[0] // self.groups for part in self.parts]
        pieces = box.view(self.groups, sum(rows), -1).split(rows, dim=1)
        return [piece.reshape(part.shape) for piece, part in zip(pieces, self.parts, strict=True)]


def pieces_of(spec: ModelSpec, head: HeadKind, *, layer_cuts: int, vocabulary_cuts: int) -> list[list[Piece]]:
    """The whole model: embedding, each layer, final norm and head.

    layer_cuts: pieces of each layer's matrices, along the axis that tensor ranks share; 1 keeps rows whole.
    vocabulary_cuts: pieces of embedding and vocabulary projection.
    """
    tail = ["decoder.final_layernorm.weight"]
    if head == "scalar" or not spec.tie_embeddings:
        tail.append("output_layer.weight")

    def cut(parameter: str, layer: int | None = None) -> list[Piece]:
        source = source_of(parameter, spec, head)
        cuts = vocabulary_cuts if source.cut == "vocabulary" else layer_cuts
        key = parameter if layer is None else parameter.replace(f".{layer}.", ".", 1)
        return list(_pieces(key, source, layer, spec, cuts))

    layers = [[piece for name in LAYER for piece in cut(f"decoder.layers.{i}.{name}", i)] for i in range(spec.layers)]
    return [cut("embedding.word_embeddings.weight"), *layers, [piece for name in tail for piece in cut(name)]]


def sizes_of(spec: ModelSpec, head: HeadKind) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a checkpoint, vocabulary not padded, by its key."""
    one = pieces_of(spec.model_copy(update={"layers": 1}), head, layer_cuts=1, vocabulary_cuts=1)
    sizes = {piece.key: piece.size for group in one for piece in group}
    return {key: (spec.layers, *size[1:]) if key.startswith("decoder.layers.") else size for key, size in sizes.items()}


def _pieces(key: str, source: Source, layer: int | None, spec: ModelSpec, cuts: int) -> Iterator[Piece]:
    shapes = [shape_of(name, spec) for name in source.names]
    inner: tuple[int, ...] = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    size = inner if layer is None else (spec.layers, *inner)
    width = inner[-1]
    columns = None if len(inner) == 1 else (0, width)

    def piece(offset: tuple[int, ...], shape: tuple[int, ...], *parts: Part, groups: int = 0) -> Piece:
        if layer is None:
            return Piece(key, size, offset, shape, parts, groups)
        return Piece(key, size, (layer, *offset), (1, *shape), parts, groups)

    if source.cut == "query_groups":
        for begin, end in _spans(spec.kv_heads, cuts):
            each = [shape[0] // spec.kv_heads for shape in shapes]
            parts = [
                Part(name, (begin * rows, end * rows), columns) for name, rows in zip(source.names, each, strict=True)
            ]
            box = ((end - begin) * sum(each), width)
            yield piece((begin * sum(each), 0), box, *parts, groups=end - begin)
    elif source.cut == "columns":
        for begin, end in _spans(width, cuts):
            part = Part(source.names[0], (0, inner[0]), (begin, end))
            yield piece((0, begin), part.shape, part)
    else:
        first = 0
        for name, shape in zip(source.names, shapes, strict=True):
            for begin, end in _spans(shape[0], 1 if source.cut == "whole" else cuts):
                part = Part(name, (begin, end), columns)
                yield piece((first + begin, *(0 for _ in inner[1:])), part.shape, part)
            first += shape[0]


def _spans(length: int, cuts: int) -> Iterator[tuple[int, int]]:
    """At most `cuts` spans that cover 0 to `length`, of one length but for the last."""
    step = -(-length // cuts)
    return ((begin, min(begin + step, length)) for begin in range(0, length, step))


class Ledger:
    """Who has been used how often: every number of every tensor, exactly once.

    Raises:   RuntimeError from `add` and `close`: it guards the conversion itself, input is checked before.
    """

    def __init__(self, what: str, sizes: dict[str, int]) -> None:
        """`sizes`: numbers in each tensor; `what` names them all in errors."""
        self._what = what
        self._left = dict(sizes)

    def add(self, name: str, count: int) -> None:
        """Count `count` numbers of `name`."""
        self._left[name] -= count
        if self._left[name] < 0:
            raise RuntimeError(f"{self._what}: {-self._left[name]} numbers of {name} were used twice.")

    def close(self) -> None:
        """Raise if anything is left over."""
        left = {name: count for name, count in self._left.items() if count}
        if left:
            raise RuntimeError(f"{self._what}: {len(left)} tensors were not used up: {left}.")
