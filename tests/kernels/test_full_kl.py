"""Exact KL of every token: fp64 oracles, hostile logits, and vocabularies split over real ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megarlhf_kernels.full_kl import definition, full_kl
from tests.helpers.ranks import run_ranks

IMPLS = ["reference", "triton"]
TEMPERATURES = {"temperature": 0.6, "ref_temperature": 1.3}


def a_case(count: int, vocab: int, scale: float = 3.0, seed: int = 0):
    """Logits, reference logits, and a random upstream gradient (all-ones would hide a wrong per-token scale)."""
    generator = torch.Generator().manual_seed(seed)
    logits, ref_logits = scale * torch.randn(2, count, vocab, generator=generator)
    return logits, ref_logits, torch.randn(count, generator=generator)


def results(function, logits, ref_logits, upstream, **options):
    """(KL, gradient in the logits, gradient in the reference's)."""
    first, second = (x.detach().clone().requires_grad_() for x in (logits, ref_logits))
    kl = function(first, second, **options)
    return kl.detach(), *torch.autograd.grad(kl, (first, second), upstream.to(kl))


def oracle(logits, ref_logits, upstream, **options):
    return results(definition, logits.double(), ref_logits.double(), upstream, **options)


def worst(got, expected) -> float:
    pairs = zip(got, expected, strict=True)
    return max((a.double() - b).abs().max().item() if a.numel() else 0.0 for a, b in pairs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, TEMPERATURES], ids=["plain", "temperatures"])
@pytest.mark.parametrize(("count", "vocab"), [(1, 1), (5, 7), (3, 1000), (2, 16032), (2, 2049)])
def test_matches_fp64_as_well_as_log_softmax_does(count, vocab, options, impl):
    case = a_case(count, vocab)
    expected = oracle(*case, **options)
    plain = worst(results(definition, *case, **options), expected)
    assert worst(results(full_kl, *case, impl=impl, **options), expected) <= 2 * plain + 1e-6


def test_many_rows_are_worked_through_in_ranges():
    case = a_case(700, 1000)
    expected = oracle(*case)
    assert worst(results(full_kl, *case), expected) <= 2 * worst(results(definition, *case), expected) + 1e-6


def test_the_reference_has_the_temperature_of_the_policy_unless_told_otherwise():
    case = a_case(4, 9)
    expected = oracle(*case, temperature=0.6, ref_temperature=0.6)
    assert worst(results(full_kl, *case, temperature=0.6), expected) < 1e-5


@pytest.mark.parametrize("vocab_size", [7, 5])
def test_gradcheck(vocab_size):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(6, 7, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda p, q: full_kl(p, q, vocab_size=vocab_size, temperature=0.6, ref_temperature=1.3), (first, second)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_in_fp32(dtype, impl):
    """The only error is the logits' own rounding, and the gradients are rounded once."""
    logits, ref_logits, upstream = a_case(5, 300)
    halves = logits.to(dtype), ref_logits.to(dtype)
    kl, *gradients = results(full_kl, *halves, upstream, impl=impl)
    exact_kl, *exact = results(full_kl, halves[0].float(), halves[1].float(), upstream, impl=impl)
    assert kl.dtype == torch.float32
    assert torch.equal(kl, exact_kl)
    for gradient, expected in zip(gradients, exact, strict=True):
        # Triton's interpreter cuts off what does not fit in bf16, a GPU rounds.
        ulps = 1 if impl == "triton" else 0
        torch.testing.assert_close(gradient, expected.to(dtype), rtol=ulps * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_equal_logits_have_no_divergence_and_no_gradient(scale, impl):
    logits, _, upstream = a_case(4, 70, scale)
    kl, *gradients = results(full_kl, logits, logits, upstream, impl=impl)
    assert kl.tolist() == [0.0] * 4
    for gradient in gradients:
        assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("impl", IMPLS)
def test_close_distributions_keep_their_divergence(impl):
    """KL of 1e-6 nats: its terms are 1e3 times as large and cancel, but it does not drown in the log of the sums."""
    logits, other, upstream = a_case(8, 500, scale=1.0)
    near = logits + 1e-3 * other
    expected = oracle(logits, near, upstream)[0]
    assert (expected < 2e-6).all()
    got = results(full_kl, logits, near, upstream, impl=impl)[0]
    plain = results(definition, logits, near, upstream)[0]
    assert worst([got], [expected]) <= 2 * worst([plain], [expected]) + 1e-9
    assert (got >= 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", [-1e4, -88.0, 0.0, 1e4])
def test_levels_do_not_matter(level, impl):
    # A running maximum that starts at 0 gives NaN below -88.
    flat, peaked = torch.full((3, 11), level), torch.full((3, 11), level)
    peaked[:, 4] += math.log(5)
    kl, d_flat, d_peaked = results(full_kl, flat, peaked, torch.tensor([1.0, -2.0, 0.5]), impl=impl)
    q = torch.where(torch.arange(11) == 4, 5.0, 1.0) / 15
    expected = -math.log(11) - q.log().mean().item()
    torch.testing.assert_close(kl, torch.full((3,), expected), rtol=1e-3 if abs(level) == 1e4 else 1e-5, atol=0)
    assert d_flat.sum(1).abs().max() < 1e-5
    torch.testing.assert_close(d_peaked[0], q - 1 / 11, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(d_peaked[1], -2 * d_peaked[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gap", [1e3, 1e30, math.inf])
def test_a_certain_policy_costs_the_references_surprise(gap, impl):
    logits = torch.full((2, 4), -gap)
    logits[:, 1] = 0.0
    ref_logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf], [0.0, 0.0, 0.0, 0.0]])
    kl, d_logits, d_ref = results(full_kl, logits, ref_logits, torch.tensor([2.0, 1.0]), impl=impl)
    q = torch.softmax(ref_logits, 1)
    torch.testing.assert_close(kl, -q[:, 1].log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(d_ref, torch.tensor([[2.0], [1.0]]) * (q - logits.eq(0).float()), rtol=1e-5, atol=1e-6)
    assert d_logits.abs().max() < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_what_the_reference_rules_out_costs_a_finite_lot(impl):
    logits, ref_logits, upstream = a_case(3, 8)
    ref_logits[1, 2] = -math.inf
    kl, *gradients = results(full_kl, logits, ref_logits, upstream, impl=impl)
    p = torch.softmax(logits, 1)[1, 2].item()
    assert kl[1].item() == pytest.approx(p * 1e30, rel=1e-5)
    assert (kl[[0, 2]] < 100).all()
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_is_not_hidden(impl):
    for which in (0, 1):
        logits, ref_logits, _ = a_case(4, 9)
        (logits, ref_logits)[which][2, 3] = math.nan
        assert torch.isnan(full_kl(logits, ref_logits, impl=impl)).tolist() == [False, False, True, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_columns_change_nothing(impl):
    logits, ref_logits, upstream = a_case(6, 100)
    padding = torch.tensor([1e4, math.nan, 3e38]).expand(6, 3)  # whatever the projection left there
    padded = [torch.cat([x, padding], dim=1) for x in (logits, ref_logits)]
    plain = results(full_kl, logits, ref_logits, upstream, impl=impl)
    wide = results(full_kl, padded[0], padded[1], upstream, impl=impl, vocab_size=100)
    assert torch.equal(plain[0], wide[0])
    for narrow, gradient in zip(plain[1:], wide[1:], strict=True):
        assert torch.equal(narrow, gradient[:, :100])
        assert gradient[:, 100:].abs().max() == 0.0


@pytest.mark.parametrize("impl", IMPLS)
def test_one_gradient_at_a_time_and_rows_of_wider_tensors(impl):
    logits, ref_logits, upstream = a_case(5, 60)
    whole = results(full_kl, logits[:, :50], ref_logits[:, 10:], upstream, impl=impl)
    leaf = logits.clone().requires_grad_()
    kl = full_kl(leaf[:, :50], ref_logits[:, 10:], impl=impl)
    (gradient,) = torch.autograd.grad(kl, leaf, upstream)
    assert torch.equal(kl.detach(), whole[0])
    assert torch.equal(gradient[:, :50], whole[1])
    leaf = ref_logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(full_kl(logits[:, :50], leaf[:, 10:], impl=impl), leaf, upstream)
    assert torch.equal(gradient[:, 10:], whole[2])


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_batch(impl):
    kl, *gradients = results(full_kl, *a_case(0, 9), impl=impl)
    assert kl.shape == (0,)
    assert [gradient.shape for gradient in gradients] == [(0, 9)] * 2


def test_errors_name_the_argument():
    logits, ref_logits, _ = a_case(4, 9)
    for message, arguments, options in [
        (r"logits: got shape \[9\]; must be \[any, any\]", (logits[0], ref_logits), {}),
        (r"logits: got torch.int64", (logits.long(), ref_logits), {}),
        (r"ref_logits: got shape \[3, 9\]; must be \[4, 9\]", (logits, ref_logits[:3]), {}),
        (r"ref_logits: got torch.bfloat16; must be torch.float32", (logits, ref_logits.bfloat16()), {}),
        (r"ref_logits: is on meta; must be on cpu", (logits, ref_logits.to("meta")), {}),
        (r"ref_logits: strides \[1, 4\]", (logits, ref_logits.T.contiguous().T), {}),
        (r"temperature: 0\.0", (logits, ref_logits), {"temperature": 0.0}),
        (r"ref_temperature: -1\.0", (logits, ref_logits), {"ref_temperature": -1.0}),
    ]:
        with pytest.raises(ValueError, match=message):
            full_kl(*arguments, **options)


def split_on_this_rank(columns: int, vocab_size: int, scale: float, impl: str) -> list[torch.Tensor]:
    """This rank's `columns` of the padded vocabulary: (KL, gradients in its columns)."""
    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    logits, ref_logits, upstream = a_case(9, vocab_size, scale, seed=7)
    start = rank * columns
    own = [
        torch.nn.functional.pad(x, (0, ranks * columns - vocab_size), value=1e4)[:, start : start + columns]
        for x in (logits, ref_logits)
    ]
    shard = {"vocab_start": start, "vocab_size": vocab_size, "group": dist.group.WORLD}
    return list(results(full_kl, own[0], own[1], upstream, impl=impl, **shard, **TEMPERATURES))


@pytest.mark.parametrize("scale", [3.0, 2000.0])
@pytest.mark.parametrize(
    ("ranks", "columns", "vocab_size", "impl"),
    [
        (1, 128, 101, "reference"),
        (2, 50, 100, "reference"),  # even
        (2, 64, 101, "triton"),  # padded in the last shard
        (4, 26, 101, "reference"),  # ragged
        (4, 64, 101, "reference"),  # two shards of nothing but padding
        (4, 64, 101, "triton"),
    ],
)
def test_split_vocabularies_equal_the_whole_and_each_other(ranks, columns, vocab_size, impl, scale):
    parts = run_ranks(split_on_this_rank, ranks, columns, vocab_size, scale, impl)
    case = a_case(9, vocab_size, scale, seed=7)
    expected = oracle(*case, **TEMPERATURES)
    whole = worst(results(full_kl, *case, impl=impl, **TEMPERATURES), expected)
    for part in parts:
        assert torch.equal(part[0], parts[0][0])  # bitwise: ranks must not drift apart
    joined = [torch.cat([part[which] for part in parts], dim=1) for which in (1, 2)]
    split = worst([parts[0][0], *(gradient[:, :vocab_size] for gradient in joined)], expected)
    # Two maxima of a shard are rounded before they meet those of the others: a few ulp of the divergence.
    assert split <= 2 * whole + 1e-6 + 2**-22 * expected[0].abs().max()
    for gradient in joined:
        assert gradient[:, vocab_size:].abs().sum() == 0.0
