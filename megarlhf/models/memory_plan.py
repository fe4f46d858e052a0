"""Bytes of one rank, from sizes and a layout alone: what a role keeps, what a rollout's cache takes, what a state is.

Nothing here looks at a tensor or a group. `Role` asks for the bytes of the weights that it has, `megarlhf plan` for
those that it would have, and both get them by the same rules. What passes through a model is in `activations`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from megarlhf.models.lora import LoraConfig, sizes
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.layout import ParallelLayout

FP32 = 4
CUDA_BLOCK_TOKENS = 256
"""Tokens in a block of the KV cache on a GPU. Source: flash-attn's paged kernels want multiples of 256."""
BUCKET = 2**28
"""Bytes of one rank's weights that travel together in a refit: enough that the way there is short of their time."""
Head = Literal["language", "scalar"]


class Piece(NamedTuple):
    """A part of the stack of layers: one chunk of a rank."""

    layers: int
    first: bool
    """It has the embedding."""
    last: bool
    """It has the final norm and the head."""


def pieces_of(spec: ModelSpec, layout: ParallelLayout, rank: int) -> list[Piece]:
    """The chunks of pipeline rank `rank`: more than one where stages are interleaved."""
    stages = range(rank, layout.stages, layout.pipeline)
    ends = [(stage == 0, stage == layout.stages - 1) for stage in stages]
    return [Piece(spec.layers_of(layout.stages, first=first, last=last), first, last) for first, last in ends]


def layer_sizes(spec: ModelSpec, tensor: int) -> list[int]:
    """Numbers in each weight of one layer on one of `tensor` ranks: qkv, proj, fc1, fc2 and the two norms."""
    wide, hidden = spec.head_dim, spec.hidden_size
    return [
        hidden * wide * (spec.heads + 2 * spec.kv_heads) // tensor,
        spec.heads * wide * hidden // tensor,
        2 * hidden * spec.ffn_size // tensor,
        spec.ffn_size * hidden // tensor,
        hidden,
        hidden,
    ]


def end_sizes(spec: ModelSpec, head: Head, tensor: int, piece: Piece) -> list[int]:
    """Numbers in the weights of a piece that are of no layer.

    The vocabulary is padded to a multiple of the tensor ranks. Tied embeddings are one weight where first and last
    piece are one, and else a copy on either end. A scalar head is whole on each tensor rank.
    """
    vocabulary = spec.padded_vocab(tensor) // tensor * spec.hidden_size
    found = [vocabulary] if piece.first else []
    if piece.last:
        tied = spec.tie_embeddings and head == "language" and piece.first
        found += [spec.hidden_size] + ([] if tied else [spec.hidden_size if head == "scalar" else vocabulary])
    return found


def adapter_sizes(spec: ModelSpec, layout: ParallelLayout, rank: int, lora: LoraConfig | None) -> list[int]:
    """Numbers in each tensor of adapters on pipeline rank `rank`."""
    layers = sum(piece.layers for piece in pieces_of(spec, layout, rank))
    return layers * sizes(lora, spec, layout.tensor) if lora else []


def learnt_of(spec: ModelSpec, head: Head, layout: ParallelLayout, rank: int, lora: LoraConfig | None) -> int | None:
    """Numbers that learn on pipeline rank `rank` where adapters do, with a scalar head; None where all weights do."""
    if lora is None:
        return None
    here = head == "scalar" and pieces_of(spec, layout, rank)[-1].last
    return sum(adapter_sizes(spec, layout, rank, lora)) + (spec.hidden_size if here else 0)


def weight_sizes(spec: ModelSpec, head: Head, layout: ParallelLayout, rank: int) -> list[int]:
    """Numbers in each weight on pipeline rank `rank`; not in adapters."""
    found: list[int] = []
    for piece in pieces_of(spec, layout, rank):
        found += end_sizes(spec, head, layout.tensor, piece) + piece.layers * layer_sizes(spec, layout.tensor)
    return found


def numbers_of(spec: ModelSpec, head: Head, layout: ParallelLayout, rank: int) -> int:
    """Numbers in all of them."""
    layer = sum(layer_sizes(spec, layout.tensor))
    pieces = pieces_of(spec, layout, rank)
    return sum(piece.layers * layer + sum(end_sizes(spec, head, layout.tensor, piece)) for piece in pieces)


class Learns(NamedTuple):
    """How a role learns."""

    distributed: bool
    """Optimiser state is shared by the ranks that hold the same weights."""
    copies: int
    """Those: data x context ranks."""

    @property
    def shares(self) -> int:
        """Into how many parts optimiser state is cut."""
        return self.copies if self.distributed else 1


@dataclass(frozen=True)
class Held:
    """Bytes of a role on one rank, by part."""

    weights: int
    gradients: int = 0
    """In fp32, summed over micro-batches."""
    masters: int = 0
    """fp32 copies of weights in half precision."""
    moments: int = 0
    """Adam's two, in fp32."""
    staged: int = 0
    """Of host memory, while a training state is saved."""
    gathered: int = 0
    """Of the device, while a training state is saved."""

    @property
    def optimiser(self) -> int:
        """Masters and moments."""
        return self.masters + self.moments

    @property
    def all(self) -> int:
        """What is on the device while the role learns."""
        return self.weights + self.gradients + self.optimiser


def held(numbers: int, itemsize: int, learns: Learns | None = None, learnt: int | None = None) -> Held:
    """What a role of `numbers` weights on a rank keeps; `itemsize`: bytes of a weight; learnt: how many learn, or all.

    The distributed optimiser gathers masters and both moments, in fp32 and one after another, on the device of every
    copy, and all three on its host, so that a state can be read in any layout.
    """
    weights = itemsize * numbers
    if learns is None:
        return Held(weights)
    learnt = numbers if learnt is None else learnt
    shared = -(-learnt // learns.shares)
    return Held(
        weights,
        gradients=FP32 * learnt,
        masters=FP32 * shared if itemsize < FP32 else 0,
        moments=2 * FP32 * shared,
        staged=3 * FP32 * learnt if learns.distributed else 0,
        gathered=FP32 * (learnt + shared) if learns.distributed else 0,
    )


def saved_bytes(of: Held, learns: Learns) -> int:
    """A rank's share of a saved state: weights, and of those that learn an fp32 copy and what the optimiser has."""
    return (of.weights + of.gradients) // learns.copies + of.optimiser // (1 if learns.distributed else learns.copies)


def cache_bytes_per_token(spec: ModelSpec, layers: int, tensor: int, itemsize: int) -> int:
    """Keys and values of one token in so many layers, on one of `tensor` ranks."""
    return 2 * layers * (spec.kv_heads // tensor) * spec.head_dim * itemsize


def cache_row_bytes(width: int, block: int, bytes_per_token: int) -> int:
    """The cache of a row of up to `width` tokens, in whole blocks of `block`."""
    return -(-width // block) * block * bytes_per_token


def rows_that_fit(free: int, share: float, row_bytes: int) -> int:
    """Rows whose cache `share` of the `free` bytes holds, beside the block that padding writes to."""
    return max(0, int(share * free) // row_bytes - 1)


def pinned_bytes(blocks: list[int]) -> int:
    """Host memory of so many blocks, as torch pins it: each in a power of two."""
    return sum(1 << (size - 1).bit_length() for size in blocks if size)
