"""Paged attention against attention written as a loop over rows, tokens and heads.

Both implementations; without a GPU the Triton kernel runs in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf_kernels.dispatch import Impl
from megarlhf_kernels.paged_attention import paged_decode, paged_prefill

HEADS, KV_HEADS, WIDTH = 6, 2, 8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP16_ULP = 2.0**-11


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> Impl:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


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


def random(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def cumulative(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0).int().to(DEVICE)


class Cache:
    """Rows of the given lengths scattered over blocks; -1 where the table is unused."""

    def __init__(
        self,
        lengths: list[int],
        block_size: int,
        *,
        in_order: bool = False,
        head_major: bool = False,
        heads: int = KV_HEADS,
        width: int = WIDTH,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.lengths = lengths
        columns = -(-max(lengths) // block_size)
        used = [max(-(-length // block_size), 0) for length in lengths]
        blocks = len(lengths) if in_order else sum(used)
        order = torch.arange(blocks) if in_order else torch.randperm(blocks, generator=torch.Generator().manual_seed(4))
        self.table = torch.full((len(lengths), columns), -1, dtype=torch.int32, device=DEVICE)
        for row, ids in enumerate(order.split([1] * blocks if in_order else used)):
            self.table[row, : len(ids)] = ids.int()
        self.k, self.v = random(2, blocks + 1, block_size, heads, width, seed=4, dtype=dtype)
        if head_major:
            self.k, self.v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (self.k, self.v))

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        ids = self.table[row][self.table[row] >= 0].long()
        return self.k[ids].flatten(0, 1)[: self.lengths[row]], self.v[ids].flatten(0, 1)[: self.lengths[row]]

    def decode(self, q: Tensor, **options: Any) -> Tensor:
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        return paged_decode(q, self.k, self.v, lengths, causal=True, block_table=self.table, **options)

    def prefill(self, q: Tensor, queries: list[int], **options: Any) -> Tensor:
        longest = max(queries), max(self.lengths)
        sums = cumulative(queries), cumulative(self.lengths)
        return paged_prefill(q, self.k, self.v, *sums, *longest, causal=True, block_table=self.table, **options)

    def expected(self, q: Tensor, queries: list[int], scale: float) -> Tensor:
        return torch.cat([by_loop(part, *self.row(row), scale) for row, part in enumerate(q.split(queries))])


CACHES = {
    "blocks of 4, scattered": lambda lengths: Cache(lengths, 4),
    "blocks of 1": lambda lengths: Cache(lengths, 1),
    "one block a row, scattered": lambda lengths: Cache(lengths, 16),
    "one block a row, in order": lambda lengths: Cache(lengths, 16, in_order=True),
    "one block a row, in order, heads outside": lambda lengths: Cache(lengths, 16, in_order=True, head_major=True),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("scale", [None, 0.31])
def test_decode_matches_the_loop(kind: str, scale: float | None, impl: Impl) -> None:
    cache = CACHES[kind]([1, 13, 4, 7, 8])
    q = random(5, 1, HEADS, WIDTH)
    got = cache.decode(q, softmax_scale=scale, num_splits=0, impl=impl)
    expected = cache.expected(q[:, 0], [1] * 5, scale or WIDTH**-0.5)
    torch.testing.assert_close(got[:, 0].double(), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", CACHES)
def test_prefill_matches_the_loop_with_whole_and_continued_rows(kind: str, impl: Impl) -> None:
    queries = [5, 3, 1, 7, 1]
    cache = CACHES[kind]([5, 13, 4, 7, 1])
    q = random(sum(queries) + 3, HEADS, WIDTH)
    got = cache.prefill(q, queries, softmax_scale=0.31, impl=impl)
    torch.testing.assert_close(got[:-3].double(), cache.expected(q[:-3], queries, 0.31), atol=2e-6, rtol=0)
    assert (got[-3:] == 0).all()  # tokens that pad the step belong to no row


SHAPES = [
    # heads, kv heads, width, block size: head sizes that are and are not powers of 2, groups of 1, 3, 16 and 20.
    (4, 4, 16, 16),
    (6, 2, 24, 64),
    (16, 1, 64, 32),
    (20, 1, 5, 256),
    (8, 2, 128, 48),
]


@pytest.mark.parametrize(("heads", "kv_heads", "width", "block"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_error_is_that_of_plain_torch(heads, kv_heads, width, block, dtype) -> None:
    """Rows of several tiles of keys and queries, begun and whole, in the precision of the inputs; decode and prefill.

    The interpreter multiplies bfloat16 wrongly, so float16 stands for both.
    """
    pytest.importorskip("triton")
    lengths, queries = [1, 130, 64, 65], [1, 70, 64, 2]
    cache = Cache(lengths, block, heads=kv_heads, width=width, dtype=dtype)
    q = random(sum(queries), heads, width, dtype=dtype)
    expected = cache.expected(q, queries, width**-0.5)
    errors = [(cache.prefill(q, queries, impl=i).double() - expected).abs().max() for i in ("triton", "reference")]
    # Weights are rounded to fp16 before they meet the values, a part that plain torch may leave out.
    slack = FP16_ULP if dtype == torch.float16 else 1e-6
    assert errors[0] <= 2 * errors[1] + slack
    last = q[cumulative(queries)[1:].long() - 1]
    ends = expected[cumulative(queries)[1:].long() - 1]
    errors = [(cache.decode(last[:, None], impl=i)[:, 0].double() - ends).abs().max() for i in ("triton", "reference")]
    assert errors[0] <= 2 * errors[1] + slack


def test_large_scores_do_not_overflow(impl: Impl) -> None:
    """Scores of thousands, all negative in one row: the running maximum starts below all of them, not at 0."""
    cache = Cache([40, 40], 16)
    q = 300 * random(2, 1, HEADS, WIDTH)
    cache.k.abs_()
    q[1].abs_().neg_()
    got = cache.decode(q, impl=impl)[:, 0].double()
    torch.testing.assert_close(got, cache.expected(q[:, 0], [1, 1], WIDTH**-0.5), atol=1e-3, rtol=0)
    assert got.isfinite().all()


def test_padding_rows_are_finite_and_change_nothing(impl: Impl) -> None:
    cache = Cache([3, 6], 4)
    q = random(4, 1, HEADS, WIDTH)
    alone = cache.decode(q[:2], impl=impl)
    cache.table = torch.cat([cache.table, torch.full_like(cache.table, -1)])
    cache.lengths = [3, 6, 0, 0]
    padded = cache.decode(q, impl=impl)
    assert torch.equal(padded[:2], alone)
    assert padded.isfinite().all()
    packed = cache.prefill(q[:2, 0], [1, 1, 0, 0], impl=impl)
    torch.testing.assert_close(packed, alone[:, 0], atol=2e-6, rtol=0)


def test_what_lies_past_a_row_is_not_seen(impl: Impl) -> None:
    cache = Cache([3, 6], 8)
    q = random(2, 1, HEADS, WIDTH)
    before = cache.decode(q, impl=impl), cache.prefill(q[:, 0], [1, 1], impl=impl)
    for row, length in enumerate(cache.lengths):
        # Weighed by 0 in the reference, not read by the kernel.
        cache.k[cache.table[row, 0], length:] = 1e4 if impl == "reference" else float("nan")
        cache.v[cache.table[row, 0], length:] = 1e4 if impl == "reference" else float("nan")
    after = cache.decode(q, impl=impl), cache.prefill(q[:, 0], [1, 1], impl=impl)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_offsets_into_the_cache_pass_two_to_the_31st(impl: Impl) -> None:
    """Block 3, 2^30 numbers apart. The memory is only reserved: nothing but the tokens in use is ever touched."""
    cache = Cache([3, 2], 4, dtype=torch.float16)
    q = random(2, 1, HEADS, WIDTH, dtype=torch.float16)
    before = cache.decode(q, impl=impl)
    cache.k, cache.v = spread_out(cache.k), spread_out(cache.v)
    cache.table *= 3
    assert torch.equal(cache.decode(q, impl=impl), before)


def spread_out(cache: Tensor) -> Tensor:
    """Four blocks with much room between them, of which 0 and 3 are the first two of `cache`."""
    far = 2**30
    room = torch.empty(3 * far + cache[0].numel(), dtype=cache.dtype, device=cache.device)
    large = room.as_strided((4, *cache.shape[1:]), (far, *cache.stride()[1:]))
    large[0], large[3] = cache[0], cache[1]
    return large


def test_nothing_to_attend_to(impl: Impl) -> None:
    cache = Cache([3], 4)
    cache.table, cache.lengths = cache.table[:0], []
    assert cache.decode(random(0, 1, HEADS, WIDTH), impl=impl).shape == (0, 1, HEADS, WIDTH)
    options = {"causal": True, "block_table": cache.table, "impl": impl}
    for tokens in (0, 2):
        got = paged_prefill(
            random(tokens, HEADS, WIDTH), cache.k, cache.v, cumulative([]), cumulative([]), 0, 0, **options
        )
        assert torch.equal(got, torch.zeros(tokens, HEADS, WIDTH, device=DEVICE))


def test_only_causal_attention_is_offered() -> None:
    cache = Cache([3], 4)
    with pytest.raises(ValueError, match="causal=True"):
        paged_decode(
            random(1, 1, HEADS, WIDTH), cache.k, cache.v, torch.tensor([3]), causal=False, block_table=cache.table
        )


WRONG = {
    "q": [
        lambda x: x[:, 0],
        lambda x: x.expand(2, -1, -1, -1),
        lambda x: x.double(),
        lambda x: x[:, :, :5],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ],
    "k": [lambda x: x[0], lambda x: x[..., :4], lambda x: x.half(), lambda x: x.to("meta")],
    "v": [lambda x: x[:1], lambda x: x[..., :4], lambda x: x.half(), lambda x: x.to("meta")],
    "block_table": [lambda x: x[0], lambda x: x.float(), lambda x: x.to("meta")],
    "cache_seqlens": [lambda x: x[None], lambda x: x.expand(2), lambda x: x.float(), lambda x: x.to("meta")],
}


@pytest.mark.parametrize(("name", "spoil"), [(name, spoil) for name, spoils in WRONG.items() for spoil in spoils])
def test_what_does_not_fit_is_named(name: str, spoil, impl: Impl) -> None:
    cache = Cache([3], 4)
    good = {"q": random(1, 1, HEADS, WIDTH), "k": cache.k, "v": cache.v, "block_table": cache.table}
    good["cache_seqlens"] = torch.tensor([3], device=DEVICE)
    q, k, v, table, lengths = (good | {name: spoil(good[name])}).values()
    with pytest.raises(ValueError, match=f"^{name}: "):
        paged_decode(q, k, v, lengths, causal=True, block_table=table, impl=impl)


@pytest.mark.parametrize("which", ["cu_seqlens_q", "cu_seqlens_k"])
def test_prefill_checks_its_sums(which: str, impl: Impl) -> None:
    cache = Cache([3], 4)
    good, short = cumulative([3]), cumulative([3])[1:]
    sums = (short, good) if which == "cu_seqlens_q" else (good, short)
    options = {"causal": True, "block_table": cache.table, "impl": impl}
    with pytest.raises(ValueError, match=f"^{which}: "):
        paged_prefill(random(3, HEADS, WIDTH), cache.k, cache.v, *sums, 3, 3, **options)


def test_heads_wider_than_128_are_refused_by_the_kernel() -> None:
    pytest.importorskip("triton")
    cache = Cache([3], 4, width=160)
    with pytest.raises(ValueError, match="160 wide"):
        cache.decode(random(1, 1, HEADS, 160), impl="triton")
