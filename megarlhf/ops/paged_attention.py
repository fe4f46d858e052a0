"""Attention over a paged KV cache in plain torch, for machines without flash-attn: no loop over requests.

Both functions take the arguments that Megatron-Core's dynamic batching passes to flash-attn, under flash-attn's names,
so that they can stand in for `flash_attn_varlen_func` and `flash_attn_with_kvcache`.

A cache is [blocks, block_size, kv_heads, d]; row r's tokens are, in order, those of blocks block_table[r, 0],
block_table[r, 1], ... Negative entries of the table are unused. Keys past a row's length are read and weighted by 0, so
the cache must hold finite numbers everywhere.
"""

from __future__ import annotations

from typing import Required, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class PagedOptions(TypedDict, total=False):
    """What is passed by name; flash-attn's names."""

    causal: Required[bool]
    block_table: Required[Tensor]
    softmax_scale: float | None
    num_splits: int


def paged_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Unpack[PagedOptions],
) -> Tensor:
    """Causal attention of packed queries to each row's cached keys; a row's last query sees all of its keys.

        out = softmax(scale * q k^T) v        query i of n sees the keys 0 .. length - n + i

    Shapes:   q [N, heads, d], rows packed one after another; k, v [blocks, block_size, kv_heads, d]; cu_seqlens_q,
              cu_seqlens_k [rows + 1] int, cumulative; options: block_table [rows, columns] int (required),
              softmax_scale (default d ** -0.5), causal (must be true). Returns [N, heads, d], 0 past the last row.
    Ranks:    none (pure); heads are this rank's.
    Raises:   ValueError when causal is false.
    """
    table, scale = _options(options)
    queries, keys = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    # Packed [N] to padded [rows, max_seqlen_q]: query i of row r is packed at cu_seqlens_q[r] + i.
    step = torch.arange(max_seqlen_q, device=q.device)
    real = step < queries[:, None]
    packed_at = (cu_seqlens_q[:-1, None] + step)[real]
    padded = q.new_zeros((table.shape[0], max_seqlen_q, *q.shape[1:]))
    padded[real] = q[packed_at]
    # Query i stands at position keys - queries + i of its row.
    position = (keys - queries)[:, None] + step
    seen = torch.arange(max_seqlen_k, device=q.device) <= position[:, :, None]
    # A padding row sees its first key: no row may be left without one, or its softmax is 0 / 0.
    seen[:, :, 0] = True
    keys, values = _pages(k, table, max_seqlen_k).transpose(1, 2), _pages(v, table, max_seqlen_k).transpose(1, 2)
    grouped = q.shape[1] != k.shape[2]
    attended = scaled_dot_product_attention(
        padded.transpose(1, 2), keys, values, attn_mask=seen[:, None], scale=scale, enable_gqa=grouped
    )
    out = torch.zeros_like(q)
    out[packed_at] = attended.transpose(1, 2)[real]
    return out


def paged_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, **options: Unpack[PagedOptions]
) -> Tensor:
    """Attention of one query per row to all of the row's cached keys, its own included.

    Shapes:   q [rows, 1, heads, d]; k_cache, v_cache [blocks, block_size, kv_heads, d]; cache_seqlens [rows] int, 0 in
              padding rows; options: block_table [rows, columns] int (required), softmax_scale (default d ** -0.5),
              causal (must be true), num_splits (ignored). Returns [rows, 1, heads, d], finite in padding rows.
    Ranks:    none (pure); heads are this rank's.
    Raises:   ValueError when causal is false.
    """
    table, scale = _options(options)
    longest = max(int(cache_seqlens.max()), 1)
    unseen = torch.arange(longest, device=q.device) >= cache_seqlens.clamp(min=1)[:, None]
    bias = torch.zeros(unseen.shape, device=q.device).masked_fill_(unseen, float("-inf"))
    keys = _pages(k_cache, table, longest).permute(0, 2, 3, 1)
    values = _pages(v_cache, table, longest).transpose(1, 2)
    # The query heads of a group are the rows of one matrix. For a single query per row this beats SDPA by a quarter.
    rows, _, heads, width = q.shape
    grouped = q.view(rows, keys.shape[1], heads // keys.shape[1], width)
    scores = torch.matmul(grouped, keys).float().mul_(width**-0.5 if scale is None else scale)
    weights = scores.add_(bias[:, None, None]).softmax(-1).to(q.dtype)
    return torch.matmul(weights, values).view(q.shape)


def _options(options: PagedOptions) -> tuple[Tensor, float | None]:
    if not options["causal"]:
        raise ValueError("paged attention is causal; pass causal=True.")
    return options["block_table"], options.get("softmax_scale")


def _pages(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """Each row's first `length` tokens: [rows, length, kv_heads, d]."""
    rows, size = table.shape[0], cache.shape[1]
    columns = -(-length // size)
    # One block a row, in order: the pages already lie as the result would. A view costs nothing, a gather copies
    # the whole cache once a layer and step.
    if columns == 1 and torch.equal(table[:, 0], torch.arange(rows, dtype=table.dtype, device=table.device)):
        return cache[:rows, :length]
    blocks = table[:, :columns].clamp(min=0).long()
    if columns == 1:
        return cache[blocks[:, 0], :length]
    return cache[blocks].flatten(1, 2)[:, :length]
