"""The vocabulary projection in chunks of rows: what `linear_logprob` and `linear_ppo` share.

A chunk's logits live in one workspace that every chunk reuses, in fp32 whatever the weights' precision: bf16 logits
alone move PPO's ratios by 3-7 % with identical weights. Both functions cut the same chunks, so that a token's log-prob
when it was scored and when it is trained on is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarlhf_kernels._checks import FLOATS, check, check_positive
from megarlhf_kernels._shards import Shard, accumulation_dtype, gather_shards, live_columns, sum_shards
from megarlhf_kernels.dispatch import Impl, use_triton
from megarlhf_kernels.token_logprob import Softmax, gradient_terms, logits_gradient, merged, shard_statistics

CPU_ELEMENTS, GPU_ELEMENTS = 25 << 20, 1 << 29
"""Logits in a chunk: 100 MiB on a CPU, 2 GiB on a GPU (4096 rows of Llama 3's vocabulary).

Each chunk reads and writes the weight's whole gradient, so small ones cost: on a GPU 24 % of the matmuls' time with
1024 rows, 6 % with 4096.
"""
CPU_KEPT = 3
"""Chunks whose logits a CPU keeps for backward, 300 MiB. A GPU keeps none: its memory is dearer than its arithmetic."""


def rows_of_chunk(columns: int, *, cpu: bool) -> int:
    """Rows of a full chunk of logits with so many columns."""
    return max(1, (CPU_ELEMENTS if cpu else GPU_ELEMENTS) // max(columns, 1))


class Chunk(NamedTuple):
    """Some rows, their logits, and the factors these came from."""

    rows: slice
    logits: Tensor
    """[n, V_local]. The next chunk's take their place."""
    hidden: Tensor
    weight: Tensor


@dataclass
class Gradients:
    """Where gradients are put, in the accumulation precision; None where nobody wants them."""

    hidden: Tensor | None
    """[N, H], this shard's share: the ranks' are summed afterwards."""
    weight: Tensor | None
    """[V_local, H]."""
    started: bool
    """Whether `weight` holds something to add to."""


@dataclass(frozen=True)
class Projection:
    """hidden [N, H] times weight [V_local, H]: one shard's logits and their gradients, a chunk of rows at a time."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    """[N], local: 0 is this shard's first column."""
    columns: int
    """Columns that are not padding."""
    scale: float
    """1 / temperature."""
    group: dist.ProcessGroup | None
    fast: bool
    """Whether statistics and gradient run in Triton."""

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, statistics and accumulated gradients."""
        return accumulation_dtype(self.hidden)

    def chunks(self, done: Sequence[Chunk] = (), *, keep: int = 0) -> Iterator[Chunk]:
        """All rows, each chunk's matrix product when it is asked for.

        Chunks that are `done` come first, as they are, and one of them is the workspace of the rest. The last `keep`
        chunks have logits to themselves; all before share those of the first of them.
        """
        yield from done
        left = [rows for rows in self._ranges() if all(rows != chunk.rows for chunk in done)]
        if not left:
            return
        rows, width, shared = left[-1].stop - left[-1].start, len(self.weight), max(0, len(left) - max(keep, 1))
        buffers = [done[0].logits] if done else [self._empty(rows, width) for _ in range(len(left) - shared)]
        hidden, weight = self.hidden, self.weight
        if hidden.is_cpu:
            # A CPU has no matrix product from half precision to fp32.
            hidden, weight = hidden.to(self.dtype), weight.to(self.dtype)
        for index, rows in enumerate(left):
            buffer = buffers[0] if done else buffers[max(0, index - shared)]
            logits = _mm(hidden[rows], weight.t(), out=buffer[: rows.stop - rows.start])
            yield Chunk(rows, logits, hidden[rows], weight)

    def _ranges(self) -> list[slice]:
        # The odd rows come first: every kept chunk is then a full one, whose place any other can take.
        count, size = len(self.hidden), self.chunk_rows
        cuts = [*([0] if count % size else []), *range(count % size, count + 1, size)]
        return [slice(start, stop) for start, stop in pairwise(cuts)]

    @property
    def chunk_rows(self) -> int:
        """Rows of a full chunk."""
        return rows_of_chunk(len(self.weight), cpu=self.hidden.is_cpu)

    @property
    def kept_chunks(self) -> int:
        """How many chunks' logits are worth keeping until backward, which then computes only the others again."""
        return CPU_KEPT if self.hidden.is_cpu else 0

    def _empty(self, rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, dtype=self.dtype, device=self.hidden.device)

    def statistics(self, chunk: Chunk, *, with_entropy: bool = True, out: Tensor) -> None:
        """This shard's four numbers a row: `out` [4, n]."""
        live, labels = chunk.logits[:, : self.columns], self.labels[chunk.rows]
        shard_statistics(live, labels, scale=self.scale, with_entropy=with_entropy, fast=self.fast, out=out)

    def softmax(self, statistics: Tensor, *, with_entropy: bool = True) -> Softmax:
        """The distributions that all ranks' statistics [4, n] describe. Collective over the group."""
        return merged(gather_shards(statistics, self.group), with_entropy=with_entropy)

    def gradients(self, *, hidden: bool, weight: bool, weight_grad: Tensor | None) -> Gradients:
        """Memory for those that are wanted: for the weight's `weight_grad` itself, to add to, where it is given."""
        d_hidden = torch.empty_like(self.hidden, dtype=self.dtype) if hidden else None
        if not weight or weight_grad is not None:
            return Gradients(d_hidden, weight_grad if weight else None, started=True)
        # Zeros would be written and read once for nothing, except where no row follows.
        make = torch.empty_like if len(self.hidden) else torch.zeros_like
        return Gradients(d_hidden, make(self.weight, dtype=self.dtype), started=False)

    def backward(
        self, chunk: Chunk, softmax: Softmax, d_logprobs: Tensor | None, d_entropy: Tensor | None, out: Gradients
    ) -> None:
        """From the gradients [n] of the chunk's log-probs and entropy to those of hidden and weight.

        Uses up the chunk's logits. `softmax` is that of the chunk's rows.
        """
        labels = self.labels[chunk.rows]
        terms = gradient_terms(softmax, labels, d_logprobs, d_entropy, columns=self.columns, scale=self.scale)
        same = chunk.weight.dtype == self.dtype
        d_logits = chunk.logits if same else torch.empty_like(chunk.logits, dtype=chunk.weight.dtype)
        logits_gradient(
            chunk.logits,
            labels,
            terms,
            columns=self.columns,
            scale=self.scale,
            sloped=d_entropy is not None,
            fast=self.fast,
            out=d_logits,
        )
        if out.hidden is not None:
            _mm(d_logits, chunk.weight, out=out.hidden[chunk.rows])
        if out.weight is not None:
            _addmm(d_logits.t(), chunk.hidden, beta=float(out.started), out=out.weight)
            out.started = True

    def summed(self, gradients: Gradients) -> Tensor | None:
        """The gradient of hidden over all ranks, in its own precision."""
        if gradients.hidden is None:
            return None
        return sum_shards(gradients.hidden, self.group).to(self.hidden.dtype)


def project(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float, impl: Impl, shard: Shard
) -> Projection:
    """Check the arguments of a public function, which its docstring describes, and choose the implementation."""
    fast = use_triton("linear_logprob", impl, hidden)
    check("hidden", hidden, (None, None), FLOATS[:3] if fast else FLOATS, hidden)
    check("weight", weight, (None, hidden.shape[1]), (hidden.dtype,), hidden)
    check("labels", labels, (hidden.shape[0],), (torch.int64,), hidden)
    check_positive("temperature", temperature)
    local, columns = labels - shard.get("vocab_start", 0), live_columns(weight.shape[0], shard)
    return Projection(hidden.detach(), weight.detach(), local, columns, 1 / temperature, shard.get("group"), fast)


def check_weight_grad(weight_grad: Tensor | None, weight: Tensor) -> None:
    """Raise ValueError unless gradients of `weight` can be added to `weight_grad`."""
    if weight_grad is not None:
        check("weight_grad", weight_grad, tuple(weight.shape), (accumulation_dtype(weight),), weight)


def _mm(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def _addmm(a: Tensor, b: Tensor, *, beta: float, out: Tensor) -> None:
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=beta)
    else:
        torch.addmm(out, a, b, beta=beta, out_dtype=out.dtype, out=out)
