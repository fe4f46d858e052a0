"""Attention over a paged KV cache, prefill and decode, for machines without flash-attn; causal, grouped-query.

    out = softmax(scale * q k^T) v        query i of n sees the keys 0 .. length - n + i of its row

Both functions take the arguments that Megatron-Core's dynamic batching passes to flash-attn, under flash-attn's names,
so that they can stand in for `flash_attn_varlen_func` and `flash_attn_with_kvcache`.

A cache is [blocks, block_size, kv_heads, d]; row r's tokens are, in order, those of blocks block_table[r, 0],
block_table[r, 1], ... Negative entries of the table are unused.

The reference works on all rows at once. It reads keys past a row's length and weighs them by 0, so the cache must hold
finite numbers everywhere. The Triton kernel reads no such key. It is one kernel for prefill and decode: a program owns
some queries of one row and one kv head, and goes through their keys once (Dao 2023, FlashAttention-2, algorithm 1).
All query heads of the group are rows of one matrix, so that a key is read once for the group. Softmax and sums are
fp32, and fp32 inputs are multiplied in full fp32. No atomics and no split over keys: the same bits on every run.
Memory: the output.
"""

from __future__ import annotations

from typing import NamedTuple, Required, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megarlhf_kernels._checks import check
from megarlhf_kernels._triton import constexpr, jit, tl, triton
from megarlhf_kernels.aot import CompileCase
from megarlhf_kernels.dispatch import Impl, use_triton

CACHED = (torch.float16, torch.bfloat16, torch.float32)
WHOLE = (torch.int32, torch.int64)
LOG2_E = 1.4426950408889634


class PagedOptions(TypedDict, total=False):
    """What is passed by name; flash-attn's names, and which implementation to take."""

    causal: Required[bool]
    block_table: Required[Tensor]
    softmax_scale: float | None
    num_splits: int
    impl: Impl


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

    Shapes:   q [N, heads, d], rows packed one after another; k, v [blocks, block_size, kv_heads, d]; cu_seqlens_q,
              cu_seqlens_k [rows + 1] int, cumulative; options: block_table [rows, columns] int (required),
              softmax_scale (default d ** -0.5), causal (must be true). Returns [N, heads, d], 0 past the last row.
    Ranks:    none (pure); heads are this rank's.
    Raises:   ValueError when causal is false, or when shapes, dtypes or devices do not fit.
    """
    table, scale = _options(options, q)
    rows = table.shape[0]
    _check_cache(q, (None, None, None), k, v, table)
    for name, sums in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check(name, sums, (rows + 1,), WHOLE, q)
    if not q.numel() or not rows:
        return torch.zeros_like(q)
    if use_triton("paged_prefill", options.get("impl", "auto"), q):
        return _launch(q, k, v, table, Rows(cu_seqlens_q, cu_seqlens_k, max_seqlen_q), scale)
    return _prefill_reference(q, k, v, table, Rows(cu_seqlens_q, cu_seqlens_k, max_seqlen_q), max_seqlen_k, scale)


def paged_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, **options: Unpack[PagedOptions]
) -> Tensor:
    """Attention of one query per row to all of the row's cached keys, its own included.

    Shapes:   q [rows, 1, heads, d]; k_cache, v_cache [blocks, block_size, kv_heads, d]; cache_seqlens [rows] int, 0 in
              padding rows; options: block_table [rows, columns] int (required), softmax_scale (default d ** -0.5),
              causal (must be true), num_splits (ignored). Returns [rows, 1, heads, d], finite in padding rows.
    Ranks:    none (pure); heads are this rank's.
    Raises:   ValueError when causal is false, or when shapes, dtypes or devices do not fit.
    """
    table, scale = _options(options, q)
    _check_cache(q, (table.shape[0], 1, None, None), k_cache, v_cache, table)
    check("cache_seqlens", cache_seqlens, (table.shape[0],), WHOLE, q)
    if not q.numel():
        return torch.zeros_like(q)
    if use_triton("paged_decode", options.get("impl", "auto"), q):
        return _launch(q[:, 0], k_cache, v_cache, table, Rows(None, cache_seqlens, 1), scale)[:, None]
    return _decode_reference(q, k_cache, v_cache, cache_seqlens, table, scale)


class Rows(NamedTuple):
    """Where each row's queries are and how many keys it has."""

    starts: Tensor | None
    """[rows + 1], cumulative: the first query of each row; None when every row has one."""
    lengths: Tensor
    """Keys: [rows + 1], cumulative, beside `starts`, else [rows], one by one."""
    longest: int
    """At least the queries of the longest row."""


def _options(options: PagedOptions, q: Tensor) -> tuple[Tensor, float]:
    if not options["causal"]:
        raise ValueError("paged attention is causal; pass causal=True.")
    scale = options.get("softmax_scale")
    return options["block_table"], q.shape[-1] ** -0.5 if scale is None else scale


def _check_cache(q: Tensor, shape: tuple[int | None, ...], k: Tensor, v: Tensor, table: Tensor) -> None:
    check("q", q, shape, CACHED, q)
    heads, width = q.shape[-2:]
    check("k", k, (None, None, None, width), (q.dtype,), q)
    check("v", v, tuple(k.shape), (q.dtype,), q)
    check("block_table", table, (None, None), WHOLE, q)
    if not k.shape[2] or heads % k.shape[2]:
        raise ValueError(f"q: got {heads} heads; must be a multiple of the {k.shape[2]} kv heads.")


# The reference.


def _prefill_reference(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, rows: Rows, max_seqlen_k: int, scale: float
) -> Tensor:
    assert rows.starts is not None
    queries, keys = rows.starts.diff(), rows.lengths.diff()
    # Rows that go on, one query each, come before those that begin: padded like them they would be most of the work.
    more = (queries != 1).nonzero()
    going_on = int(more[0]) if len(more) else len(queries)
    if going_on:
        one = _decode_reference(q[:going_on, None], k, v, keys[:going_on], table[:going_on], scale)[:, 0]
        if going_on == len(queries):
            return torch.cat([one, torch.zeros_like(q[going_on:])])
        others = Rows(rows.starts[going_on:] - going_on, rows.lengths[going_on:] - rows.lengths[going_on], rows.longest)
        rest = _prefill_reference(q[going_on:], k, v, table[going_on:], others, max_seqlen_k, scale)
        return torch.cat([one, rest])
    # Packed [N] to padded [rows, longest]: query i of row r is packed at starts[r] + i.
    step = torch.arange(rows.longest, device=q.device)
    real = step < queries[:, None]
    packed_at = (rows.starts[:-1, None] + step)[real]
    padded = q.new_zeros((table.shape[0], rows.longest, *q.shape[1:]))
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


def _decode_reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor, scale: float) -> Tensor:
    longest = max(int(lengths.max()), 1)
    unseen = torch.arange(longest, device=q.device) >= lengths.clamp(min=1)[:, None]
    bias = torch.zeros(unseen.shape, device=q.device).masked_fill_(unseen, float("-inf"))
    keys = _pages(k, table, longest).permute(0, 2, 3, 1)
    values = _pages(v, table, longest).transpose(1, 2)
    # The query heads of a group are the rows of one matrix. For a single query per row this beats SDPA by a quarter.
    rows, _, heads, width = q.shape
    grouped = q.view(rows, keys.shape[1], heads // keys.shape[1], width)
    # In fp32 also for bf16 inputs: scores of 20 rounded to 8 bits would move weights by 4 %.
    scores = torch.matmul(grouped.float(), keys.float()).mul_(scale)
    weights = scores.add_(bias[:, None, None]).softmax(-1).to(q.dtype)
    return torch.matmul(weights, values).view(q.shape)


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


# Triton.


@jit
def _paged_attention(
    q_at,
    k_at,
    v_at,
    out_at,
    table_at,
    starts_at,
    lengths_at,
    scale,
    blocks,
    q_token,
    q_head,
    k_page,
    k_token,
    k_head,
    v_page,
    v_token,
    v_head,
    out_token,
    out_head,
    table_row,
    GROUP: constexpr,
    PAGE: constexpr,
    WIDTH: constexpr,
    BLOCK_Q: constexpr,
    BLOCK_K: constexpr,
    BLOCK_D: constexpr,
):
    """BLOCK_Q queries of one row and kv head; `scale` holds log2(e), because the softmax is one of powers of 2."""
    row = tl.program_id(0) // blocks
    # The blocks of a row that see most keys start first.
    block = blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(1)
    if starts_at is None:
        start, queries, length = row, 1, tl.load(lengths_at + row)
    else:
        start = tl.load(starts_at + row)
        queries = tl.load(starts_at + row + 1) - start
        length = tl.load(lengths_at + row + 1) - tl.load(lengths_at + row)
    if block * BLOCK_Q >= queries * GROUP:
        return
    # Matrix row m is query m // GROUP under head m % GROUP of the group.
    m = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    query = m // GROUP
    heads = head * GROUP + m % GROUP
    token = (start + query).to(tl.int64)
    inside = (query < queries)[:, None] & (d < WIDTH)[None, :]
    q = tl.load(q_at + token[:, None] * q_token + heads[:, None] * q_head + d[None, :], mask=inside, other=0.0)
    sees = length - queries + query + 1
    # Whole tiles of keys that all these queries see need no mask; what comes after them does.
    all_see = (length - queries + (block * BLOCK_Q) // GROUP + 1) // BLOCK_K * BLOCK_K
    any_sees = tl.minimum(length, length - queries + (block * BLOCK_Q + BLOCK_Q - 1) // GROUP + 1)
    k_at += head * k_head
    v_at += head * v_head
    pages = table_at + row.to(tl.int64) * table_row
    top = tl.full([BLOCK_Q], -1e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for first in range(0, all_see, BLOCK_K):
        page = _pages_of(pages, first, length, PAGE, BLOCK_K, False)
        k = _tile(k_at, page, first, length, k_page, k_token, PAGE, WIDTH, BLOCK_K, BLOCK_D, False)
        v = _tile(v_at, page, first, length, v_page, v_token, PAGE, WIDTH, BLOCK_K, BLOCK_D, False)
        top, total, out = _attend(q, k, v, first, sees, scale, top, total, out, BLOCK_K, False)
    for first in range(all_see, any_sees, BLOCK_K):
        page = _pages_of(pages, first, length, PAGE, BLOCK_K, True)
        k = _tile(k_at, page, first, length, k_page, k_token, PAGE, WIDTH, BLOCK_K, BLOCK_D, True)
        v = _tile(v_at, page, first, length, v_page, v_token, PAGE, WIDTH, BLOCK_K, BLOCK_D, True)
        top, total, out = _attend(q, k, v, first, sees, scale, top, total, out, BLOCK_K, True)
    # A padding row has no keys and no sum: its output is 0.
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    out_at += token[:, None] * out_token + heads[:, None] * out_head + d[None, :]
    tl.store(out_at, out.to(out_at.dtype.element_ty), mask=inside)


@jit
def _pages_of(pages, first, length, PAGE: constexpr, BLOCK_K: constexpr, RAGGED: constexpr):
    """The block of each of the keys first .. first + BLOCK_K - 1, or the one that holds them all."""
    if PAGE % BLOCK_K == 0:
        page = tl.load(pages + first // PAGE)
    else:
        key = first + tl.arange(0, BLOCK_K)
        page = tl.load(pages + key // PAGE, mask=key < length if RAGGED else None)
    return page.to(tl.int64)


@jit
def _tile(
    cache_at,
    page,
    first,
    length,
    page_stride,
    token_stride,
    PAGE: constexpr,
    WIDTH: constexpr,
    BLOCK_K: constexpr,
    BLOCK_D: constexpr,
    RAGGED: constexpr,
):
    """[BLOCK_K, BLOCK_D] of the cache. What lies past the row's length is 0 and not read: it may be anything."""
    key = first + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    inside = (d < WIDTH)[None, :]
    if RAGGED:
        inside = inside & (key < length)[:, None]
    at = page * page_stride + key % PAGE * token_stride
    return tl.load(cache_at + at[:, None] + d[None, :], mask=inside, other=0.0)


@jit
def _attend(q, k, v, first, sees, scale, top, total, out, BLOCK_K: constexpr, RAGGED: constexpr):
    """Take a tile of keys and values into the running softmax: greatest score, sum of powers, weighted values."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if RAGGED:
        scores = tl.where((first + tl.arange(0, BLOCK_K))[None, :] < sees[:, None], scores, -1e30)
    # Key 0 is in the first tile and every query sees it, so `top` is a real score from there on.
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    down = tl.exp2(top - new_top)
    total = total * down + tl.sum(weights, 1)
    out = tl.dot(weights.to(v.dtype), v, out * down[:, None], input_precision="ieee")
    return new_top, total, out


def _launch(q: Tensor, k: Tensor, v: Tensor, table: Tensor, rows: Rows, scale: float) -> Tensor:
    heads, width = q.shape[1:]
    group = heads // k.shape[2]
    constants, options = _plan(group, width, k.shape[1], group * rows.longest, q.dtype)
    blocks = -(-group * rows.longest // constants["BLOCK_Q"])
    # Every row has its query in decode; in prefill some of `q` may belong to no row.
    out = torch.empty_like(q) if rows.starts is None else torch.zeros_like(q)
    _paged_attention[table.shape[0] * blocks, k.shape[2]](
        *(q, k, v, out, table, rows.starts, rows.lengths, scale * LOG2_E, blocks),
        *(*q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *out.stride()[:2], table.stride(0)),
        **constants,
        **options,
    )
    return out


def _plan(group: int, width: int, page: int, queries: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Compile-time arguments and options for `queries` rows of the matrix; what compiles for sm_90 without spills.

    Few queries are decode, which waits for memory: small tiles of queries, and more tiles of keys under way. Pages are
    looked up one stage before keys are loaded, so 3 stages load one tile ahead, and 5 stages two. 16 rows are the least
    that tensor cores take. No plan takes more than 99 KiB of shared memory, what the smallest GPUs since Ampere have.

    Raises:   ValueError when heads are wider than 128.
    """
    if width > 128:
        raise ValueError(f"q: heads are {width} wide; the Triton kernel takes at most 128, use impl='reference'.")
    few, half = queries <= 16, dtype != torch.float32
    block_q, block_k = (16 if few else 128 if half else 32), (64 if half else 32)
    block_d = max(16, triton.next_power_of_2(width))
    constants = {"GROUP": group, "PAGE": page, "WIDTH": width}
    constants |= {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_D": block_d}
    return constants, {"num_warps": 8 if block_q == 128 else 4, "num_stages": 5 if few and half else 3}


def compile_cases() -> list[CompileCase]:
    """Prefill and decode of Llama 3 1B, 8B, 70B and 405B; tensor parallelism changes only run-time strides."""
    strides = [
        "q_token",
        "q_head",
        "k_page",
        "k_token",
        "k_head",
        "v_page",
        "v_token",
        "v_head",
        "out_token",
        "out_head",
    ]
    integers = ["blocks", *strides, "table_row"]

    def case(model: str, group: int, width: int, page: int, dtype: torch.dtype, *, decode: bool) -> CompileCase:
        constants, options = _plan(group, width, page, group if decode else 4096, dtype)
        element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
        signature = dict.fromkeys(("q_at", "k_at", "v_at", "out_at"), element)
        signature |= dict.fromkeys(("table_at", "lengths_at"), "*i32") | {"scale": "fp32"}
        signature |= dict.fromkeys(integers, "i32")
        starts = {"starts_at": None} if decode else {}
        if not decode:
            signature["starts_at"] = "*i32"
        variant = f"{'decode' if decode else 'prefill'} {model} {element[1:]} blocks of {page}"
        return CompileCase(_paged_attention, variant, signature, {**constants, **starts}, tuple(strides), options)

    models = {"1B": (4, 64), "8B": (4, 128), "70B": (8, 128), "405B": (16, 128)}
    cases = [case(m, *models[m], 256, torch.bfloat16, decode=decode) for m in models for decode in (False, True)]
    # Blocks smaller than a tile of keys, and full fp32.
    cases += [case("8B", *models["8B"], 16, torch.bfloat16, decode=decode) for decode in (False, True)]
    cases += [case("8B", *models["8B"], 256, torch.float32, decode=decode) for decode in (False, True)]
    return cases
