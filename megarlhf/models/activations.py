"""Bytes that pass through a model, from sizes alone: what a forward keeps for backward, and what either needs at once.

Two kinds of layers are counted, each as it is. Megatron-Core's local ones with torch's attention (a CPU): their norms
keep two fp32 copies of what they read, their gated MLP its input alone. Transformer Engine's (a GPU): the norms keep
what they read, and Megatron's unfused gated MLP keeps four tensors more of its width than its input. Attention of
either kind keeps queries, keys, values, its output and a number a head; scores are never whole in memory. Context ranks
have their share of the tokens; the local kind keeps keys and values of all of them.

Tokens are those of a micro-batch, however it is packed. What is smaller than a number a token and channel is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megarlhf.models.memory_plan import FP32, Head, Piece, pieces_of
from megarlhf.models.recompute import Recompute, whole_layers
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.layout import ParallelLayout
from megarlhf_kernels._projection import CPU_KEPT, rows_of_chunk
from megarlhf_kernels.token_logprob import CPU_ELEMENTS

Reads = Literal["fused", "composed", "scored"]
"""What is done at the head: a loss that makes its gradients at once, one that goes through log-probs, or no loss."""


@dataclass(frozen=True)
class Arithmetic:
    """In which numbers and by which layers a model computes."""

    itemsize: int
    """Bytes of a weight and of an activation."""
    engine: bool
    """Transformer Engine's layers; else local ones."""
    recompute: Recompute
    """What is not kept, and is computed again in backward."""
    cpu: bool = False
    """Chunks of logits are those of a CPU, which has no products of half precision into fp32."""


class Tokens(NamedTuple):
    """Of a micro-batch on one data rank, over its context ranks."""

    computed: int
    """Positions, padding included."""
    read: int
    """Of these, positions that reach the head."""

    def on_rank(self, context: int) -> Tokens:
        """Those of one of so many context ranks; read are most that one has, of rows that are read at their end."""
        chunk, read = 1 / (2 * context), self.read / self.computed
        in_chunk = [min(max(read - (1 - (place + 1) * chunk), 0), chunk) for place in range(2 * context)]
        most = max(in_chunk[rank] + in_chunk[-1 - rank] for rank in range(context))
        return Tokens(self.computed // context, round(most * self.computed))


class Passing(NamedTuple):
    """Bytes of activations on one rank at the moment when they are most."""

    kept: int
    """For the backward passes to come."""
    working: int
    """Of the layer that is computed."""
    logits: int
    """Of the chunk of the vocabulary projection, with what is made of it."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.kept + self.working + self.logits


@dataclass(frozen=True)
class Shape:
    """A model as it is cut: what the formulas are written in. Widths are numbers a token on one rank."""

    spec: ModelSpec
    layout: ParallelLayout
    of: Arithmetic

    @property
    def hidden(self) -> int:
        """Of the residual stream where every token is whole."""
        return self.spec.hidden_size

    @property
    def sliced(self) -> float:
        """The same between matrix products: tensor ranks hold a slice of the tokens under sequence parallelism."""
        return self.hidden / (self.layout.tensor if self.layout.sequence_parallel else 1)

    @property
    def queries(self) -> int:
        """Of all its heads."""
        return self.spec.heads * self.spec.head_dim // self.layout.tensor

    @property
    def keys(self) -> int:
        """Of keys, and as many of values."""
        return self.spec.kv_heads * self.spec.head_dim // self.layout.tensor

    @property
    def ffn(self) -> int:
        """Of the gated MLP."""
        return self.spec.ffn_size // self.layout.tensor

    @property
    def norm(self) -> float:
        """Bytes a token that one norm keeps, its result included, which the product after it keeps."""
        own = self.of.itemsize if self.of.engine else 2 * FP32
        return (own + self.of.itemsize) * self.sliced

    @property
    def attention(self) -> float:
        """Bytes a token that attention keeps: the products' result, of which the values are, rotated queries and keys,
        the output, and a number a head."""
        numbers = self.queries + 2 * self.keys + self.queries + self.keys + self.queries
        if self.layout.context > 1 and not self.of.engine:
            # Queries, the output, and what was gathered: the product's result is not kept beside it.
            numbers = 2 * self.queries + 2 * self.layout.context * self.keys
        return self.of.itemsize * numbers + FP32 * self.spec.heads / self.layout.tensor

    @property
    def mlp(self) -> float:
        """Bytes a token that the gated MLP keeps: gate and rest, their product, and what Megatron's makes between."""
        return self.of.itemsize * (5 if self.of.engine else 3) * self.ffn

    def is_short(self, piece: Piece) -> bool:
        """Whether the MLP of the top layer computes the read positions alone, as local layers do on a CPU."""
        return piece.last and self.of.cpu and not self.of.engine and not self.layout.sequence_parallel

    def layer(self, tokens: int, mlp_tokens: int) -> float:
        """Bytes that one layer makes and would keep for backward."""
        rest = self.of.itemsize * self.hidden * (tokens != mlp_tokens)  # the rows that are computed, beside the others
        return tokens * (self.norm + self.attention) + mlp_tokens * (self.norm + self.mlp + rest)

    def mlp_again(self, mlp_tokens: int) -> float:
        """Of these, bytes that only backward makes, layer after layer, because it computes the MLP again."""
        return mlp_tokens * self.mlp if self.of.recompute == "selective" else 0.0

    def backward(self, tokens: int, mlp_tokens: int) -> float:
        """Bytes that backward through a layer's MLP needs beside what is kept: the gradients of its output and width,
        with sequence parallelism that output whole, and the gradient of one weight."""
        whole = tokens * self.hidden if self.layout.sequence_parallel and self.layout.tensor > 1 else 0
        width = mlp_tokens * (2 if self.of.engine else 1) * self.ffn
        return self.of.itemsize * (tokens * self.sliced + whole + width + self.ffn * self.hidden)

    def forward(self, tokens: int) -> float:
        """Bytes that a layer needs without gradients: the residual stream, its norm, and the width of the MLP."""
        stream = 2 * self.sliced + self.hidden
        return self.of.itemsize * tokens * (stream + (5 if self.of.engine else 2) * self.ffn)

    def head(self, head: Head, tokens: Tokens, reads: Reads) -> tuple[float, float]:
        """Bytes that reading needs at once on the last stage, and those of it that wait for backward.

        tokens: of all context ranks, each of which has all states that are read, and projects its share of them.
        """
        context, own = self.layout.context, tokens.on_rank(self.layout.context)
        size, whole = self.of.itemsize, self.of.itemsize * own.computed * self.hidden
        states = size * tokens.read * self.hidden
        tokens = Tokens(own.computed, -(-tokens.read // context))
        if head == "scalar":
            made = FP32 * tokens.read * self.hidden
            return whole + states + made, states + made
        columns = self.spec.padded_vocab(self.layout.tensor) // self.layout.tensor
        rows = min(tokens.read, rows_of_chunk(columns, cpu=self.of.cpu))
        half = size < FP32
        copies = FP32 * (tokens.read + columns) * self.hidden if half and self.of.cpu else 0
        logits = FP32 * rows * columns + (2 * FP32 * min(rows * columns, CPU_ELEMENTS) if self.of.cpu else 0)
        if reads == "scored":
            return whole + states + copies + logits, 0
        gradient = 0 if self.of.cpu or not half else size * rows * columns
        d_hidden = FP32 * tokens.read * self.hidden
        at_once = whole + states + copies + logits + gradient + d_hidden
        if reads == "fused" or not self.of.cpu:
            return at_once, states
        kept = FP32 * min(tokens.read - rows, (CPU_KEPT - 1) * rows) * columns
        return at_once + kept, states + copies + FP32 * rows * columns + kept


def learning(shape: Shape, head: Head, tokens: Tokens, rank: int, micro_batches: int, reads: Reads) -> Passing:
    """What an optimiser step of so many micro-batches holds on pipeline rank `rank` where it holds most.

    Ranks:    pure. Stage i of p keeps p - i micro-batches (1F1B); interleaved ones as many chunks as are warmed up.
    """
    pieces = pieces_of(shape.spec, shape.layout, rank)
    last, layers = pieces[-1].last, pieces[-1].layers
    every, tokens = tokens, tokens.on_rank(shape.layout.context)
    short = tokens.read if last and shape.is_short(pieces[-1]) else tokens.computed
    stream = shape.of.itemsize * tokens.computed * shape.sliced
    again = whole_layers(shape.of.recompute, layers)
    one = shape.layer(tokens.computed, tokens.computed) - shape.mlp_again(tokens.computed)
    top = shape.layer(tokens.computed, short) - shape.mlp_again(short)
    # What a stage was sent and what it sends wait for their gradients.
    ends = stream * (2 if shape.layout.pipeline > 1 else 0)
    final = tokens.computed * (shape.norm - shape.of.itemsize * shape.sliced) if last else 0.0
    whole = [whole_layers(shape.of.recompute, piece.layers) for piece in pieces]
    each = [stream * count + one * (piece.layers - count) for count, piece in zip(whole, pieces, strict=True)]
    kept = _in_flight(shape.layout, rank, micro_batches) * (sum(each) / len(pieces) + ends) + final
    kept -= one - top if last and again < layers else 0.0
    working = max(_working(shape, tokens.computed, short, pieces))
    at_once, waiting = shape.head(head, every, reads) if last else (0.0, 0.0)
    if at_once > waiting + working:
        return Passing(round(kept), 0, round(at_once))
    return Passing(round(kept), round(working), round(waiting))


def _working(shape: Shape, tokens: int, short: int, pieces: Sequence[Piece]) -> Iterator[float]:
    """Bytes that backward needs beside all that is kept, at the moments that can be the worst; what it is done with is
    taken off. short: tokens whose MLP the top layer computes."""
    layers, last = pieces[-1].layers, pieces[-1].last
    again = whole_layers(shape.of.recompute, layers)
    whole, top = (shape.layer(tokens, mlp_tokens) for mlp_tokens in (tokens, short))
    stream = shape.of.itemsize * tokens * shape.sliced
    if again == layers:
        yield top - stream + shape.backward(tokens, short)
        if sum(piece.layers for piece in pieces) > last:
            yield whole - stream + shape.backward(tokens, tokens)
        return
    mlp_again, one = shape.mlp_again(tokens), whole - shape.mlp_again(tokens)
    top -= shape.mlp_again(short)
    yield shape.mlp_again(short) + shape.backward(tokens, short)
    if layers - again > 1:
        yield mlp_again + shape.backward(tokens, tokens) - top
    if again:
        yield whole - stream + shape.backward(tokens, tokens) - top - (layers - again - 1) * one


def _in_flight(layout: ParallelLayout, rank: int, micro_batches: int) -> int:
    """Chunks whose activations a pipeline rank keeps at once: of one piece each."""
    stages, virtual = layout.pipeline, layout.virtual_pipeline
    if virtual == 1:
        return min(micro_batches, stages - rank)
    warm = 2 * (stages - rank - 1) + (virtual - 1) * stages
    return min(micro_batches * virtual, warm + 1)


def scoring(shape: Shape, head: Head, tokens: Tokens, rank: int) -> Passing:
    """What a forward pass without gradients holds on pipeline rank `rank` where it holds most."""
    layer = shape.forward(tokens.on_rank(shape.layout.context).computed)
    at_once = shape.head(head, tokens, "scored")[0] if pieces_of(shape.spec, shape.layout, rank)[-1].last else 0.0
    return Passing(0, 0, round(at_once)) if at_once > layer else Passing(0, round(layer), 0)
