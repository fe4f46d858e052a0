"""GAE against the textbook recursion in Python floats (fp64), and against its closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf.ops.advantages import gae, shaped_gae
from megarlhf.ops.kl import kl_k1
from megarlhf.ops.masked import masked_whiten
from megarlhf.ops.rewards import add_kl_penalty
from megarlhf_kernels.rewards_gae import Discount, Shaping


def by_recursion(rewards, values, mask, terminated, gamma, lam) -> tuple[torch.Tensor, torch.Tensor]:
    """One row at a time over its response tokens alone, backwards."""
    advantages, returns = torch.zeros(values.shape).double(), torch.zeros(values.shape).double()
    for row in range(values.shape[0]):
        tokens = [t for t in range(values.shape[1]) if mask[row, t]]
        if not tokens:
            continue
        next_value = 0.0 if terminated[row] else values[row, tokens[-1]].item()
        advantage = 0.0
        for t in reversed(tokens):
            value = values[row, t].item()
            advantage = rewards[row, t].item() + gamma * next_value - value + gamma * lam * advantage
            advantages[row, t], returns[row, t] = advantage, advantage + value
            next_value = value
    return advantages, returns


def a_case(rows: int, positions: int, kind: str):
    generator = torch.Generator().manual_seed(rows + positions)
    rewards = torch.randn(rows, positions, generator=generator)
    values = torch.randn(rows, positions, generator=generator)
    terminated = torch.rand(rows, generator=generator) < 0.5
    if kind == "gaps":
        mask = torch.rand(rows, positions, generator=generator) < 0.6
    else:
        start = torch.randint(0, positions, (rows, 1), generator=generator)
        length = torch.randint(0, positions, (rows, 1), generator=generator)
        index = torch.arange(positions)
        mask = (index >= start) & (index < start + length)
    if rows > 1:
        mask[0], mask[1] = False, True
    return rewards, values, mask, terminated


@pytest.mark.parametrize("kind", ["spans", "gaps"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.99, 0.9), (1.0, 0.0), (0.0, 0.0), (0.01, 0.01)])
@pytest.mark.parametrize("positions", [1, 2, 7, 64, 97])
def test_matches_the_recursion(positions, gamma, lam, kind):
    rewards, values, mask, terminated = a_case(9, positions, kind)
    advantages, returns = gae(rewards, values, mask, terminated, gamma=gamma, lam=lam)
    expected, expected_returns = by_recursion(rewards, values, mask, terminated, gamma, lam)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns.double(), expected_returns, rtol=1e-5, atol=1e-5)
    assert advantages[~mask].abs().sum() == 0.0
    assert returns[~mask].abs().sum() == 0.0


@pytest.mark.parametrize("decay", [1.0, 0.95, 1e-8])
def test_long_rows_stay_exact(decay):
    """4096 tokens: 1e-8^4096 underflows and 1^4096 does not decay; the error stays at a few ulp of the sums."""
    rewards, values, mask, terminated = a_case(3, 4096, "gaps")
    advantages, _ = gae(rewards, values, mask, terminated, gamma=1.0, lam=decay)
    expected, _ = by_recursion(rewards, values, mask, terminated, 1.0, decay)
    assert torch.isfinite(advantages).all()
    assert (advantages.double() - expected).abs().max() < 4e-7 * expected.abs().max() + 1e-6


def test_gamma_lambda_one_is_reward_to_go_minus_value():
    rewards, values, mask, _ = a_case(6, 33, "spans")
    ended = torch.ones(6, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, ended, gamma=1.0, lam=1.0)
    to_go = torch.where(mask, rewards, 0.0).double().flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns.double(), torch.where(mask, to_go, 0.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(advantages, torch.where(mask, returns - values, 0.0), rtol=1e-5, atol=1e-5)


def test_termination_and_truncation_differ_by_the_bootstrap():
    """By hand: r = 0, 0, 2; V = 1, 3, 5; gamma = lambda = 1, so A_t = sum of rewards + V after the end - V_t."""
    rewards, values = torch.tensor([[0.0, 0.0, 2.0]] * 2), torch.tensor([[1.0, 3.0, 5.0]] * 2)
    advantages, returns = gae(rewards, values, torch.ones(2, 3).bool(), torch.tensor([True, False]), gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[1.0, -1.0, -3.0], [6.0, 4.0, 2.0]]
    assert returns.tolist() == [[2.0, 2.0, 2.0], [7.0, 7.0, 7.0]]


def test_masked_values_never_bootstrap_and_padding_changes_nothing():
    rewards, values, mask, terminated = a_case(8, 20, "spans")
    clean = gae(rewards, values, mask, terminated, gamma=0.99, lam=0.95)
    poisoned = [torch.where(mask, x, math.nan) for x in (rewards, values)]
    wider = [
        torch.nn.functional.pad(x, (3, 5), value=fill) for x, fill in zip([*poisoned, mask], [1e9, 1e9, 0], strict=True)
    ]
    padded = gae(wider[0], wider[1], wider[2], terminated, gamma=0.99, lam=0.95)
    for before, after in zip(clean, padded, strict=True):
        torch.testing.assert_close(after[:, 3:-5], before, rtol=1e-6, atol=1e-6)
        assert after[:, :3].abs().sum() == after[:, -5:].abs().sum() == 0.0


def test_empty_batch_no_gradient_and_errors():
    empty = torch.zeros(0, 5)
    advantages, _ = gae(empty, empty, empty.bool(), torch.zeros(0).bool(), gamma=1.0, lam=0.95)
    assert advantages.shape == (0, 5)
    rewards, values, mask, terminated = a_case(4, 6, "spans")
    advantages, returns = gae(rewards, values.requires_grad_(), mask, terminated, gamma=1.0, lam=0.95)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    with pytest.raises(ValueError, match=r"terminated: got torch.bool \[3\], values are \[4, 6\]"):
        gae(rewards, values, mask, terminated[:3], gamma=1.0, lam=0.95)
    with pytest.raises(ValueError, match=r"values: got \[4, 5\], mask is \[4, 6\]"):
        gae(rewards, values[:, 1:], mask, terminated, gamma=1.0, lam=0.95)


@pytest.mark.parametrize("kind", ["responses", "gaps"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("by_step", [False, True])
def test_the_fused_estimate_is_its_slow_twin(by_step, kl_coef, kind):
    rewards, values, mask, terminated = a_case(7, 97, kind)
    generator = torch.Generator().manual_seed(4)
    logprobs, ref_logprobs = rewards.clone(), torch.randn(rewards.shape, generator=generator)
    scores = torch.randn(7, generator=generator)
    earlier = torch.randn(97, 7, generator=generator).T if by_step else None  # rows that are not contiguous
    shaping = Shaping(ref_logprobs, scores, kl_coef, earlier)
    fused = shaped_gae(logprobs, values, mask, terminated, shaping, Discount(0.97, 0.9))
    shaped = add_kl_penalty(scores, kl_k1(logprobs, ref_logprobs), mask, kl_coef=kl_coef, earlier=earlier)
    advantages, returns = gae(shaped, values, mask, terminated, gamma=0.97, lam=0.9)
    twin = (shaped, advantages, masked_whiten(advantages, mask), returns)
    for name, ours, theirs in zip(fused._fields, fused, twin, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6, msg=name)
        assert not ours[~mask].any()
    assert fused.whitened[mask].mean().abs() < 1e-6
    assert fused.whitened[mask].var(correction=0).item() == pytest.approx(1.0, abs=1e-5)
