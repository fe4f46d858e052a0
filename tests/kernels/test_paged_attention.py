"""Paged attention against attention written as a loop over rows, tokens and heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarlhf_kernels.paged_attention import paged_decode, paged_prefill

HEADS, KV_HEADS, WIDTH = 6, 2, 8


def by_loop(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Row's queries [n, heads, d] over its keys and values [m, kv_heads, d] in fp64; the last query sees all keys."""
    out = torch.empty_like(q, dtype=torch.float64)
    for i in range(len(q)):
        seen = len(keys) - len(q) + i + 1
        for head in range(q.shape[1]):
            group = head // (q.shape[1] // keys.shape[1])
            weights = (keys[:seen, group].double() @ q[i, head].double() * scale).softmax(0)
            out[i, head] = weights @ values[:seen, group].double()
    return out


class Cache:
    """Rows of the given lengths scattered over blocks; -1 where the table is unused."""

    def __init__(
        self, lengths: list[int], block_size: int, *, in_order: bool = False, head_major: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(4)
        self.lengths = lengths
        columns = -(-max(lengths) // block_size)
        used = [max(-(-length // block_size), 0) for length in lengths]
        blocks = len(lengths) if in_order else sum(used)
        order = torch.arange(blocks) if in_order else torch.randperm(blocks, generator=generator)
        self.table = torch.full((len(lengths), columns), -1, dtype=torch.int32)
        for row, ids in enumerate(order.split([1] * blocks if in_order else used)):
            self.table[row, : len(ids)] = ids.int()
        shape = (2, blocks + 1, block_size, KV_HEADS, WIDTH)
        self.k, self.v = torch.randn(shape, generator=generator)
        if head_major:
            self.k, self.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (self.k, self.v))

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        ids = self.table[row][self.table[row] >= 0].long()
        return self.k[ids].flatten(0, 1)[: self.lengths[row]], self.v[ids].flatten(0, 1)[: self.lengths[row]]


CACHES = {
    "blocks of 4, scattered": lambda lengths: Cache(lengths, 4),
    "blocks of 1": lambda lengths: Cache(lengths, 1),
    "one block a row, scattered": lambda lengths: Cache(lengths, 16),
    "one block a row, in order": lambda lengths: Cache(lengths, 16, in_order=True),
    "one block a row, in order, heads outside": lambda lengths: Cache(lengths, 16, in_order=True, head_major=True),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("scale", [None, 0.31])
def test_decode_matches_the_loop(kind: str, scale: float | None) -> None:
    cache = CACHES[kind]([1, 13, 4, 7, 8])
    q = torch.randn(5, 1, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor(cache.lengths, dtype=torch.int32)
    got = paged_decode(
        q, cache.k, cache.v, lengths, causal=True, impl="triton", block_table=cache.table, softmax_scale=scale, num_splits=0
    )
    expected = torch.stack([by_loop(q[r], *cache.row(r), scale or WIDTH**-0.5) for r in range(5)])
    torch.testing.assert_close(got.double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", CACHES)
def test_prefill_matches_the_loop_with_whole_and_continued_rows(kind: str) -> None:
    lengths, queries = [5, 13, 4, 7, 1], [5, 3, 1, 7, 1]
    cache = CACHES[kind](lengths)
    q = torch.randn(sum(queries) + 3, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0).int() for x in (queries, lengths))
    got = paged_prefill(
        q, cache.k, cache.v, cu_q, cu_k, 7, 13, softmax_scale=0.31, causal=True, impl="triton", block_table=cache.table
    )
    expected = [by_loop(q[int(cu_q[r]) : int(cu_q[r + 1])], *cache.row(r), 0.31) for r in range(5)]
    torch.testing.assert_close(got[:-3].double(), torch.cat(expected), atol=2e-6, rtol=0)
    assert (got[-3:] == 0).all()  # tokens that pad the step belong to no row


def test_padding_rows_are_finite_and_change_nothing() -> None:
    cache = Cache([3, 6], 4)
    q = torch.randn(4, 1, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    table = torch.cat([cache.table, torch.full((2, 2), -1, dtype=torch.int32)])
    lengths = torch.tensor([3, 6, 0, 0], dtype=torch.int32)
    padded = paged_decode(q, cache.k, cache.v, lengths, causal=True, impl="triton", block_table=table)
    alone = paged_decode(q[:2], cache.k, cache.v, lengths[:2], causal=True, impl="triton", block_table=cache.table)
    assert torch.equal(padded[:2], alone)
    assert padded.isfinite().all()
    cu_q, cu_k = torch.tensor([0, 1, 2, 2, 2]), torch.tensor([0, 3, 9, 9, 9])
    packed = paged_prefill(q[:2, 0], cache.k, cache.v, cu_q, cu_k, 1, 6, causal=True, impl="triton", block_table=table)
    torch.testing.assert_close(packed, alone[:, 0], atol=2e-6, rtol=0)


def test_what_lies_past_a_row_is_not_seen() -> None:
    cache = Cache([3, 6], 8)
    q = torch.randn(2, 1, HEADS, WIDTH, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([3, 6], dtype=torch.int32)
    before = paged_decode(q, cache.k, cache.v, lengths, causal=True, impl="triton", block_table=cache.table)
    for row, length in enumerate(cache.lengths):
        cache.k[cache.table[row, 0], length:] = 1e4
        cache.v[cache.table[row, 0], length:] = 1e4
    assert torch.equal(paged_decode(q, cache.k, cache.v, lengths, causal=True, impl="triton", block_table=cache.table), before)


def test_only_causal_attention_is_offered() -> None:
    cache = Cache([3], 4)
    with pytest.raises(ValueError, match="causal=True"):
        paged_decode(
            torch.zeros(1, 1, HEADS, WIDTH), cache.k, cache.v, torch.tensor([3]), causal=False, block_table=cache.table
        )
