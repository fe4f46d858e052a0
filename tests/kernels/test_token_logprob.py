"""Token log-probs and entropy: fp64 oracles, hostile logits, and vocabularies split over real ranks.

Both implementations; without a GPU the Triton kernels run in Triton's interpreter.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from megarlhf_kernels.dispatch import Impl
from megarlhf_kernels.token_logprob import definition, shard_statistics, token_logprob
from tests.helpers.ranks import run_ranks


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> Impl:
    return request.param


def a_case(count: int, vocab: int, scale: float = 3.0, seed: int = 0):
    """Logits, labels, and upstream gradients of both outputs (random: all-ones would hide a wrong per-token scale)."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, vocab, generator=generator)
    labels = torch.randint(0, vocab, (count,), generator=generator)
    return logits, labels, torch.randn(count, generator=generator), torch.randn(count, generator=generator)


def oracle(logits, labels, d_logprobs, d_entropy, temperature=1.0):
    """log_softmax and its autograd in fp64: (logprobs, entropy, gradient in the logits)."""
    exact = logits.double().requires_grad_()
    logprobs, entropy = definition(exact, labels, temperature=temperature)
    (d_logprobs.double() @ logprobs + d_entropy.double() @ entropy).backward()
    assert exact.grad is not None
    return logprobs.detach(), entropy.detach(), exact.grad


def ours(logits, labels, d_logprobs, d_entropy, **options):
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = token_logprob(leaf, labels, **options)
    (d_logprobs.to(logprobs) @ logprobs + d_entropy.to(entropy) @ entropy).backward()
    assert leaf.grad is not None
    return logprobs.detach(), entropy.detach(), leaf.grad


def worst(got, expected) -> float:
    return max((a.double() - b).abs().max().item() for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize(
    ("count", "vocab"), [(1, 1), (5, 7), (60, 10_000), (3, 300_000)]
)  # several chunks; a row a chunk
def test_matches_fp64_as_well_as_log_softmax_does(count, vocab, temperature, impl):
    case = a_case(count, vocab)
    expected = oracle(*case, temperature)
    leaf = case[0].clone().requires_grad_()
    logprobs, entropy = definition(leaf, case[1], temperature=temperature)
    (case[2] @ logprobs + case[3] @ entropy).backward()
    plain = worst((logprobs.detach(), entropy.detach(), leaf.grad), expected)
    assert worst(ours(*case, temperature=temperature, impl=impl), expected) <= 2 * plain + 1e-6


@pytest.mark.parametrize("vocab_size", [7, 5])
def test_gradcheck(vocab_size):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, 2, 3, 1, 4])
    for with_entropy in (True, False):
        options = {"temperature": 0.7, "vocab_size": vocab_size, "with_entropy": with_entropy}
        assert torch.autograd.gradcheck(lambda x, options=options: token_logprob(x, labels, **options), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_in_fp32(dtype, impl):
    """The only error is the logits' own rounding, and the gradient is rounded once."""
    logits, labels, *upstream = a_case(64, 500)
    rounded = logits.to(dtype)
    logprobs, entropy, gradient = ours(rounded, labels, *upstream, impl=impl)
    exact = ours(rounded.float(), labels, *upstream, impl=impl)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert torch.equal(logprobs, exact[0])
    assert torch.equal(entropy, exact[1])
    if impl == "triton" and dtype == torch.bfloat16:
        # Triton's interpreter cuts bits off where a GPU rounds: up to one step of 2^-8.
        torch.testing.assert_close(gradient.float(), exact[2], rtol=2**-7, atol=0)
    else:
        assert torch.equal(gradient, exact[2].to(dtype))


def test_entropy_is_optional_and_changes_no_bit(impl):
    logits, labels, upstream, _ = a_case(50, 900, scale=200.0)
    gradients = []
    for with_entropy in (True, False):
        leaf = logits.clone().requires_grad_()
        logprobs, entropy = token_logprob(leaf, labels, with_entropy=with_entropy, impl=impl)
        assert entropy.shape == ((50,) if with_entropy else (0,))
        assert entropy.requires_grad is with_entropy
        gradients += [logprobs.detach(), torch.autograd.grad(upstream @ logprobs, leaf)[0]]
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[3])


def test_gradient_of_the_entropy_alone(impl):
    logits, labels, upstream, d_entropy = a_case(20, 30)
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(d_entropy @ token_logprob(leaf, labels, impl=impl)[1], leaf)
    expected = oracle(logits, labels, 0 * upstream, d_entropy)[2]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", [-1e4, -88.0, 0.0, 1e4])
def test_equal_logits_are_uniform_at_any_level(level, impl):
    # A running max that starts at 0 gives NaN below -88; one that subtracts a rounded logsumexp is off by 1e-3 at 1e4.
    logits = torch.full((3, 11), level, requires_grad=True)
    logprobs, entropy = token_logprob(logits, torch.tensor([0, 5, 10]), impl=impl)
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    torch.testing.assert_close(logprobs, torch.full((3,), -math.log(11)), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, torch.full((3,), math.log(11)), rtol=1e-6, atol=0)
    expected = -torch.ones(3, 11) / 11
    expected[[0, 1, 2], [0, 5, 10]] += 1
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gap", [50.0, 1e3, 1e30, math.inf])
def test_a_certain_token_has_entropy_zero_and_finite_gradients(gap, impl):
    logits = torch.zeros(2, 4)
    logits[:, 1:] = -gap  # the others have p = e^-gap = 0 in fp32 (2e-22 for the first)
    logprobs, entropy, gradient = ours(logits, torch.tensor([0, 0]), torch.ones(2), torch.ones(2), impl=impl)
    assert logprobs.tolist() == [0.0, 0.0]
    assert ((entropy >= 0) & (entropy < 1e-19)).all()
    assert gradient.abs().max() < 1e-18


def test_a_nan_is_not_hidden(impl):
    logits, labels, *_ = a_case(4, 9)
    logits[2, 3] = math.nan
    logprobs, entropy = token_logprob(logits, labels, impl=impl)
    assert torch.isnan(logprobs).tolist() == torch.isnan(entropy).tolist() == [False, False, True, False]


def test_padded_columns_change_nothing(impl):
    logits, labels, *upstream = a_case(40, 100)
    padding = torch.tensor([1e4, math.nan, 3e38]).expand(40, 3)  # whatever the projection left there
    padded = torch.cat([logits, padding], dim=1)
    plain, wide = ours(logits, labels, *upstream, impl=impl), ours(padded, labels, *upstream, vocab_size=100, impl=impl)
    assert torch.equal(plain[0], wide[0])
    assert torch.equal(plain[1], wide[1])
    assert torch.equal(plain[2], wide[2][:, :100])
    assert wide[2][:, 100:].abs().max() == 0.0


def test_a_label_outside_the_vocabulary_is_finite_and_learns_nothing(impl):
    logits, _, upstream, none = a_case(4, 9)
    logprobs, entropy, gradient = ours(
        logits, torch.tensor([-100, 9, 8, 3]), upstream, 0 * none, vocab_size=8, impl=impl
    )
    assert (logprobs[:3] < -1e29).all()
    assert torch.isfinite(logprobs).all()
    assert torch.isfinite(entropy).all()
    assert gradient[:3].abs().max() == 0.0
    assert gradient[3].abs().max() > 0.0


def statistics(logits, labels, impl):
    out = torch.empty(4, len(logits))
    shard_statistics(logits, labels, scale=0.5, with_entropy=True, fast=impl == "triton", out=out)
    return out


def test_shard_statistics_are_their_formulas(impl):
    logits, labels, *_ = a_case(6, 20)
    labels[0], labels[1] = -3, 20  # in the shards to the left and to the right
    top, total, spread, picked = statistics(logits, labels, impl).double()
    z = 0.5 * logits.double()
    shifted = z - z.amax(1, keepdim=True)
    torch.testing.assert_close(top, z.amax(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(total, shifted.exp().sum(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(spread, (shifted * shifted.exp()).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(picked[2:], shifted[range(2, 6), labels[2:]], rtol=1e-6, atol=1e-6)
    assert (picked[:2] < -1e29).all()
    empty = statistics(logits[:, :0], labels, impl)
    torch.testing.assert_close(empty[:, 0], torch.tensor([-1e30, 0.0, 0.0, -1e30]), rtol=1e-6, atol=0)


def test_empty_batch(impl):
    logprobs, entropy, gradient = ours(*a_case(0, 9), impl=impl)
    assert logprobs.shape == entropy.shape == (0,)
    assert gradient.shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_may_be_written_over_the_logits(impl, dtype):
    logits, labels, *upstream = a_case(17, 130)
    expected = ours(logits.to(dtype), labels, *upstream, impl=impl)[2]
    leaf = logits.to(dtype).requires_grad_()
    copied = leaf * 1
    logprobs, entropy = token_logprob(copied, labels, in_place=True, impl=impl)
    (gradient,) = torch.autograd.grad(upstream[0] @ logprobs + upstream[1] @ entropy, leaf)
    assert torch.equal(gradient, expected)
    assert torch.equal(copied.detach(), expected)


def test_errors_name_the_tensors(impl):
    logits, labels, *_ = a_case(4, 9)
    for match, bad in [
        (r"labels: got shape \[3\]; must be \[4\]", (logits, labels[:3])),
        (r"labels: got torch.int32; must be torch.int64", (logits, labels.int())),
        (r"labels: is on meta; must be on cpu", (logits, labels.to("meta"))),
        (r"logits: got torch.int64; must be torch.float16 or", (labels[:, None], labels)),
        (r"logits: got shape \[4\]; must be \[any, any\]", (logits[:, 0], labels)),
        (r"logits: strides \[1, 4\] .* pass logits.contiguous\(\)", (logits.t().contiguous().t(), labels)),
    ]:
        with pytest.raises(ValueError, match=match):
            token_logprob(*bad, impl=impl)
    with pytest.raises(ValueError, match=r"temperature: 0\.0; must be positive"):
        token_logprob(logits, labels, temperature=0.0, impl=impl)


def split_on_this_rank(columns: int, vocab_size: int, scale: float, impl: Impl) -> list[torch.Tensor]:
    """This rank's `columns` of the padded vocabulary: (logprobs, entropy, gradient in its columns)."""
    dist.init_process_group("gloo")
    ranks, rank = dist.get_world_size(), dist.get_rank()
    logits, labels, *upstream = a_case(33, vocab_size, scale, seed=7)
    padded = torch.nn.functional.pad(logits, (0, ranks * columns - vocab_size), value=1e4)
    start = rank * columns
    options = {
        "vocab_start": start,
        "vocab_size": vocab_size,
        "temperature": 0.7,
        "group": dist.group.WORLD,
        "impl": impl,
    }
    return list(ours(padded[:, start : start + columns], labels, *upstream, **options))


@pytest.mark.parametrize("scale", [3.0, 2000.0])
@pytest.mark.parametrize(
    ("ranks", "columns", "vocab_size"),
    [
        (1, 128, 101),
        (2, 50, 100),  # even
        (2, 64, 101),  # padded in the last shard
        (4, 26, 101),  # ragged
        (4, 64, 101),  # two shards of nothing but padding
    ],
)
def test_split_vocabularies_equal_the_whole_and_each_other(ranks, columns, vocab_size, scale, impl):
    results = run_ranks(split_on_this_rank, ranks, columns, vocab_size, scale, impl)
    case = a_case(33, vocab_size, scale, seed=7)
    logprobs, entropy, gradient = oracle(*case, 0.7)
    whole = worst(ours(*case, temperature=0.7), (logprobs, entropy, gradient))
    for rank_logprobs, rank_entropy, _ in results:
        assert torch.equal(rank_logprobs, results[0][0])  # bitwise: ranks must not drift apart
        assert torch.equal(rank_entropy, results[0][1])
    joined = torch.cat([result[2] for result in results], dim=1)
    split = worst((results[0][0], results[0][1], joined[:, :vocab_size]), (logprobs, entropy, gradient))
    assert split <= 2 * whole + 1e-6
    assert joined[:, vocab_size:].abs().sum() == 0.0
