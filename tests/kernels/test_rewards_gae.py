"""Rewards, GAE and moments against a loop over tokens in Python floats, in Triton's interpreter and in torch."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf.ops.masked import masked_whiten
from megarlhf_kernels.rewards_gae import Discount, Shaping, gae, mean_and_variance, rewards_gae

IMPLS = ["reference", "triton"]


def a_case(rows: int, width: int, kind: str):
    """(logprobs, ref_logprobs, values), mask, terminated, scores; row 0 is all masked and row 1 is full."""
    generator = torch.Generator().manual_seed(rows + width)
    tokens = torch.randn(3, rows, width, generator=generator)
    if kind == "gaps":
        mask = torch.rand(rows, width, generator=generator) < 0.6
    else:
        start, length = torch.randint(0, width + 1, (2, rows, 1), generator=generator)
        mask = (torch.arange(width) >= start) & (torch.arange(width) < start + length)
    if rows > 1:
        mask[0], mask[1] = False, True
    return tokens, mask, torch.rand(rows, generator=generator) < 0.5, torch.randn(rows, generator=generator)


def by_loop(tokens, mask, terminated, scores, kl_coef, gamma, lam, earlier=None):
    """(rewards, advantages, returns) in fp64, a row and a token at a time."""
    outputs = torch.zeros(3, *mask.shape, dtype=torch.float64)
    for row in range(mask.shape[0]):
        steps = [t for t in range(mask.shape[1]) if mask[row, t]]
        advantage = next_value = 0.0
        for t in reversed(steps):
            logprob, ref, value = tokens[:, row, t].tolist()
            reward = -kl_coef * (logprob - ref) + (0.0 if earlier is None else earlier[row, t].item())
            if t == steps[-1]:
                reward += scores[row].item()
                next_value = 0.0 if terminated[row] else value
            advantage = reward + gamma * next_value - value + gamma * lam * advantage
            outputs[:, row, t] = torch.tensor([reward, advantage, advantage + value])
            next_value = value
    return outputs


def assert_matches(estimate, expected, mask):
    for got, wanted in zip(estimate[:3], expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=2e-6, atol=3e-6)
        assert got[~mask].abs().sum() == 0.0
        assert not torch.signbit(got[~mask]).any()
    values = expected[1]
    for row, (count, total, centred) in enumerate(estimate.moments.tolist()):
        own = values[row][mask[row]]
        assert count == len(own)
        assert total == pytest.approx(own.sum().item(), rel=1e-5, abs=1e-4)
        assert centred == pytest.approx(((own - own.mean()) ** 2).sum().item() if count else 0.0, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["runs", "gaps"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.9), (1.0, 0.0), (1e-4, 1e-4)])
@pytest.mark.parametrize("width", [1, 7, 33, 70])
def test_padded_rows_match_the_loop(width, gamma, lam, kind, impl):
    tokens, mask, terminated, scores = a_case(5, width, kind)
    shaping = Shaping(tokens[1], scores, 0.3)
    estimate = rewards_gae(tokens[0], tokens[2], mask, terminated, shaping, Discount(gamma, lam), impl=impl)
    assert_matches(estimate, by_loop(tokens, mask, terminated, scores, 0.3, gamma, lam), mask)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["runs", "gaps"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_earned_at_every_token_is_added_there(packed, kind, impl):
    """And what stands where the mask is False is never read."""
    tokens, mask, terminated, scores = a_case(5, 70, kind)
    earlier = torch.randn(mask.shape, generator=torch.Generator().manual_seed(8))
    expected = by_loop(tokens, mask, terminated, scores, 0.3, 0.99, 0.9, earlier)
    shape, cu_seqlens = ((-1,), torch.arange(6) * 70) if packed else (mask.shape, None)
    given = torch.where(mask, earlier, math.nan).reshape(shape)
    logprobs, ref, values = (x.reshape(shape) for x in tokens)
    layout = {"cu_seqlens": cu_seqlens, "impl": impl}
    discount, inside = Discount(0.99, 0.9), mask.reshape(shape)
    estimate = rewards_gae(logprobs, values, inside, terminated, Shaping(ref, scores, 0.3, given), discount, **layout)
    padded = [x.view(mask.shape) for x in estimate[:3]]
    assert_matches(estimate._replace(**dict(zip(estimate._fields, padded, strict=False))), expected, mask)
    none = rewards_gae(logprobs, values, inside, terminated, Shaping(ref, scores, 0.3), discount, **layout)
    zeros = Shaping(ref, scores, 0.3, torch.zeros_like(given))
    for with_zeros, without in zip(
        rewards_gae(logprobs, values, inside, terminated, zeros, discount, **layout), none, strict=True
    ):
        assert torch.equal(with_zeros, without)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["full", "gaps"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_packed_equals_padded(index, kind, impl):
    """Lengths 0 and 1, first and last sequences empty, one longer than a block."""
    lengths = torch.tensor([0, 5, 0, 1, 70, 31, 32, 0])
    tokens, mask, terminated, scores = a_case(len(lengths), 70, "gaps")
    inside = torch.arange(70) < lengths[:, None]
    mask = inside & (mask | (kind == "full"))
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(index)
    logprobs, ref, values = (x[inside] for x in tokens)
    shaping, discount = Shaping(ref, scores, 0.1), Discount(0.99, 0.95)
    layout = {"cu_seqlens": cu_seqlens, "impl": impl}
    estimate = rewards_gae(logprobs, values, mask[inside], terminated, shaping, discount, **layout)
    expected = by_loop(tokens, mask, terminated, scores, 0.1, 0.99, 0.95)
    padded = [torch.zeros(mask.shape).masked_scatter(inside, x) for x in estimate[:3]]
    assert_matches(estimate._replace(**dict(zip(estimate._fields, padded, strict=False))), expected, mask)
    advantages, returns = gae(estimate[0], values, mask[inside], terminated, discount, **layout)
    assert torch.equal(advantages, estimate.advantages)
    assert torch.equal(returns, estimate.returns)


@pytest.mark.parametrize("decay", [1.0, 0.95, 1e-8])
@pytest.mark.parametrize("packed", [False, True])
def test_long_rows_and_many_ranges_stay_exact(decay, packed):
    """More tokens than the reference works through at a time, and powers of the decay that underflow."""
    tokens, mask, terminated, scores = a_case(140, 4096, "runs")
    some = [0, 1, 2, 138, 139]
    layout: dict = {"impl": "reference"}
    shape = mask.shape
    if packed:
        layout["cu_seqlens"] = torch.arange(141) * 4096
        shape = (-1,)
    logprobs, ref, values = (x.reshape(shape) for x in tokens)
    shaping, discount = Shaping(ref, scores, 0.1), Discount(1.0, decay)
    estimate = rewards_gae(logprobs, values, mask.reshape(shape), terminated, shaping, discount, **layout)
    expected = by_loop(tokens[:, some], mask[some], terminated[some], scores[some], 0.1, 1.0, decay)[1]
    error = (estimate.advantages.view(mask.shape)[some].double() - expected).abs().max()
    # The rounding of 4096 deltas of about 3 adds up as a random walk: 64 * 3 * 2^-24.
    assert error < 1.2e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_termination_and_truncation_differ_by_the_bootstrap(impl):
    """By hand: KL 0, score 2, V = 1, 3, 5, gamma = lambda = 1: A_t = sum of rewards + V after the end - V_t."""
    same, values = torch.zeros(2, 3), torch.tensor([[1.0, 3.0, 5.0]] * 2)
    ended = torch.tensor([True, False])
    shaping = Shaping(same, torch.full((2,), 2.0), 0.1)
    estimate = rewards_gae(same, values, torch.ones(2, 3).bool(), ended, shaping, Discount(1.0, 1.0), impl=impl)
    assert estimate.token_level_rewards.tolist() == [[0.0, 0.0, 2.0]] * 2
    assert estimate.advantages.tolist() == [[1.0, -1.0, -3.0], [6.0, 4.0, 2.0]]
    assert estimate.returns.tolist() == [[2.0, 2.0, 2.0], [7.0, 7.0, 7.0]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["runs", "gaps"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_masked_inputs_are_never_read(poison, kind, impl):
    tokens, mask, terminated, scores = a_case(5, 40, kind)
    scores[0] = poison  # of the row that is all masked
    results = []
    for logprobs, ref, values in (tokens, torch.where(mask, tokens, poison)):
        shaping = Shaping(ref, scores, 0.1)
        results.append(rewards_gae(logprobs, values, mask, terminated, shaping, Discount(0.99, 0.95), impl=impl))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.isfinite(clean).all()
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_nan_stays_in_its_sequence(packed, impl):
    tokens, mask, terminated, scores = a_case(5, 40, "gaps")
    tokens[0, 3, int(mask[3].nonzero()[-1])] = math.nan
    shape, cu_seqlens = ((-1,), torch.arange(6) * 40) if packed else (mask.shape, None)
    logprobs, ref, values = (x.reshape(shape) for x in tokens)
    shaping, discount = Shaping(ref, scores, 0.1), Discount(1.0, 0.95)
    layout = {"cu_seqlens": cu_seqlens, "impl": impl}
    estimate = rewards_gae(logprobs, values, mask.reshape(shape), terminated, shaping, discount, **layout)
    bad = torch.isnan(estimate.advantages.view(mask.shape))
    assert torch.equal(bad[3], mask[3])
    assert bad.sum() == mask[3].sum()


@pytest.mark.parametrize("impl", IMPLS)
def test_moments_of_parts_whiten_the_whole(impl):
    """A mean of 1e4 and a spread of 1: E[x^2] - E[x]^2 has no digit left in fp32."""
    tokens, mask, terminated, scores = a_case(6, 40, "gaps")
    values = tokens[2] - 1e4
    shaping, discount = Shaping(tokens[1], scores, 0.1), Discount(1.0, 0.0)
    none = torch.zeros(6, 40)
    ended = torch.ones_like(terminated)
    parts = [
        rewards_gae(none[own], values[own], mask[own], ended[own], Shaping(none[own], scores[own], 0.0), discount,
                    impl=impl)
        for own in (slice(0, 2), slice(2, 6))
    ]  # fmt: skip
    mean, variance = mean_and_variance(torch.cat([part.moments for part in parts]))
    advantages = torch.cat([part.advantages for part in parts])
    inside = advantages[mask].double()
    assert mean.item() == pytest.approx(inside.mean().item(), rel=1e-7)
    assert variance.item() == pytest.approx(inside.var(correction=0).item(), rel=1e-5)
    whole = rewards_gae(tokens[0], tokens[2], mask, terminated, shaping, Discount(0.99, 0.9), impl=impl)
    mean, variance = mean_and_variance(whole.moments)
    whitened = torch.where(mask, (whole.advantages - mean) * torch.rsqrt(variance + 1e-8), 0.0)
    torch.testing.assert_close(whitened.float(), masked_whiten(whole.advantages, mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_moments_are_those_of_the_advantages_to_the_last_digit(impl):
    """A mean of 1e4, rounded to 1e-3 in fp32, and a spread of 1e-2: the mean's own rounding must not stay in."""
    _, _, values = a_case(3, 300, "runs")[0]
    values = 1e-2 * values - 1e4
    none, rows = torch.zeros(3, 300), torch.zeros(3)
    mask = torch.arange(300) < torch.tensor([[300], [0], [211]])
    shaping = Shaping(none, rows, 0.0)
    estimate = rewards_gae(none, values, mask, rows.bool(), shaping, Discount(0.0, 0.0), impl=impl)
    for row, (count, total, centred) in enumerate(estimate.moments.tolist()):
        own = estimate.advantages[row][mask[row]].double()
        assert count == len(own)
        assert total == pytest.approx(own.sum().item(), rel=1e-10)
        assert centred == pytest.approx(((own - own.mean()) ** 2).sum().item() if count else 0.0, rel=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_fp32(dtype, impl):
    tokens, mask, terminated, scores = a_case(4, 20, "gaps")
    halves = tokens.to(dtype)
    results = []
    for logprobs, ref, values in (halves, halves.float()):
        shaping = Shaping(ref, scores, 0.1)
        results.append(rewards_gae(logprobs, values, mask, terminated, shaping, Discount(0.99, 0.95), impl=impl))
    for half, full in zip(*results, strict=True):
        assert half.dtype == full.dtype
        assert torch.equal(half, full)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batches(shape, impl):
    tokens = torch.zeros(shape)
    rows = torch.zeros(shape[0])
    estimate = rewards_gae(
        tokens, tokens, tokens.bool(), rows.bool(), Shaping(tokens, rows, 0.1), Discount(1.0, 1.0), impl=impl
    )
    assert [tuple(x.shape) for x in estimate] == [shape] * 3 + [(shape[0], 3)]
    assert [x.item() for x in mean_and_variance(estimate.moments)] == [0.0, 0.0]
    none = torch.zeros(0)
    packed = gae(none, none, none.bool(), none.bool(), Discount(1.0, 1.0), cu_seqlens=torch.tensor([0]), impl=impl)
    assert [tuple(x.shape) for x in packed] == [(0,), (0,)]


def test_no_gradient_and_inputs_stay_as_they_are():
    tokens, mask, terminated, scores = a_case(4, 20, "runs")
    before = tokens.clone()
    values = tokens[2].requires_grad_()
    for x in gae(tokens[0], values, mask, terminated, Discount(1.0, 0.95)):
        assert not x.requires_grad
    rewards_gae(tokens[0], values, mask, terminated, Shaping(tokens[1], scores, 0.1), Discount(1.0, 0.95))
    assert torch.equal(tokens, before)


def test_errors_name_the_argument():
    tokens, mask, terminated, scores = a_case(4, 6, "runs")
    logprobs, ref, values = tokens
    discount, cu = Discount(1.0, 0.95), torch.tensor([0, 4, 24])
    good = {"logprobs": logprobs, "values": values, "mask": mask, "terminated": terminated}

    def run(**changed):
        given = {"ref_logprobs": ref, "scores": scores, **good, **changed}
        shaping = Shaping(given.pop("ref_logprobs"), given.pop("scores"), 0.1, given.pop("earlier", None))
        rewards_gae(**given, shaping=shaping, discount=discount)

    run()
    for message, changed in {
        r"logprobs: got shape \[4, 5\]; must be \[4, 6\]": {"logprobs": logprobs[:, 1:]},
        r"ref_logprobs: got torch.int64": {"ref_logprobs": ref.long()},
        r"earlier: got shape \[4, 5\]; must be \[4, 6\]": {"earlier": ref[:, 1:]},
        r"mask: got torch.uint8; must be torch.bool": {"mask": mask.to(torch.uint8)},
        r"terminated: got shape \[3\]; must be \[4\]": {"terminated": terminated[:3]},
        r"scores: is on meta; must be on cpu": {"scores": scores.to("meta")},
        r"values: strides \[1, 4\]": {"values": values.T.contiguous().T},
        r"values: got shape \[24\]; must be \[B, T\], or \[N\]": {"values": values.flatten()},
        r"values: got shape \[4, 6\]; must be \[B, T\], or \[N\]": {"cu_seqlens": cu},
    }.items():
        with pytest.raises(ValueError, match=message):
            run(**changed)
    first, second, third = (x.flatten() for x in (logprobs, values, mask))
    for bounds in ([0, 30, 24], [1, 4, 24], [0, 4, 23], []):
        with pytest.raises(ValueError, match=r"cu_seqlens: .* must rise from 0 to the 24 tokens"):
            gae(first, second, third, terminated[:2], discount, cu_seqlens=torch.tensor(bounds, dtype=torch.int64))
