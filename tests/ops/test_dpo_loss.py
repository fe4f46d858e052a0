"""The DPO loss: scalar loops in Python floats, closed-form gradients, and what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf.ops.preference_loss import bradley_terry_loss, dpo_loss, implicit_rewards

CHOSEN = [1.5, -0.2, 0.0, 40.0]
REJECTED = [0.5, 0.3, 0.0, -40.0]
WEIGHT = [1.0, 2.0, 0.5, 1.0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.49])
def test_it_matches_a_loop_in_value_and_gradient(label_smoothing: float) -> None:
    chosen, rejected = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (CHOSEN, REJECTED))
    total, metrics = dpo_loss(chosen, rejected, torch.tensor(WEIGHT), label_smoothing=label_smoothing)
    up, down = torch.autograd.grad(total, (chosen, rejected))
    loss, right = 0.0, 0.0
    for at, (c, r, w) in enumerate(zip(CHOSEN, REJECTED, WEIGHT, strict=True)):
        margin = c - r
        loss += w * ((1 - label_smoothing) * math.log1p(math.exp(-margin)))
        loss += w * label_smoothing * (margin + math.log1p(math.exp(-margin)))
        right += w * (0.5 if margin == 0 else float(margin > 0))
        # d/dmargin of -(1 - e) log sigmoid(m) - e log sigmoid(-m) = sigmoid(m) - (1 - e)
        slope = w * (sigmoid(margin) - (1 - label_smoothing))
        assert up[at].item() == pytest.approx(slope, rel=1e-6, abs=1e-7)
        assert down[at].item() == pytest.approx(-slope, rel=1e-6, abs=1e-7)
    assert total.item() == pytest.approx(loss, rel=1e-6)
    assert metrics["accuracy"].item() == pytest.approx(right)
    assert metrics["margin_mean"].item() == pytest.approx(1.0 - 1.0 + 80.0)
    assert metrics["chosen_reward_mean"].item() == pytest.approx(1.5 - 0.4 + 40.0)
    assert metrics["rejected_reward_mean"].item() == pytest.approx(0.5 + 0.6 - 40.0)


def test_without_smoothing_it_is_bradley_terry_of_implicit_rewards() -> None:
    chosen, rejected, weight = (torch.tensor(x) for x in (CHOSEN, REJECTED, WEIGHT))
    ours, theirs = dpo_loss(chosen, rejected, weight, label_smoothing=0.0), bradley_terry_loss(chosen, rejected, weight)
    assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-6)
    assert ours[1]["margin_mean"] == theirs[1]["score_gap"]


def test_a_smoothed_loss_wants_the_margin_that_its_labels_are_worth() -> None:
    """The gradient is 0 where sigmoid(margin) is the share of right labels: beyond it a margin costs."""
    margin = torch.tensor([math.log(0.9 / 0.1)], dtype=torch.float64, requires_grad=True)
    total, _ = dpo_loss(margin, torch.zeros(1, dtype=torch.float64), torch.ones(1), label_smoothing=0.1)
    (slope,) = torch.autograd.grad(total, margin)
    assert slope.item() == pytest.approx(0.0, abs=1e-8)


def test_rewards_are_sums_by_response_whatever_the_order_of_the_tokens() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0], requires_grad=True)
    ref_logprobs, row = torch.tensor([-1.5, -2.0, -1.0, -4.5, -4.0]), torch.tensor([0, 0, 2, 3, 2])
    rewards = implicit_rewards(logprobs, ref_logprobs, row, 4, beta=0.1)
    assert rewards.dtype == torch.float64
    assert rewards.tolist() == pytest.approx([0.05, 0.0, 0.1 * (-2.0 - 1.0), 0.05])
    (gradient,) = torch.autograd.grad((rewards * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), logprobs)
    assert gradient.tolist() == pytest.approx([0.1, 0.1, 0.3, 0.4, 0.3])
    order = torch.tensor([4, 2, 0, 3, 1])
    again = implicit_rewards(logprobs[order], ref_logprobs[order], row[order], 4, beta=0.1)
    torch.testing.assert_close(again, rewards, rtol=1e-12, atol=1e-12)


def test_a_long_response_keeps_what_tells_it_from_the_reference() -> None:
    """In fp32 a sum of 100,000 log-probs is known to some thousandths, and 1e-3 of a nat would be lost."""
    logprobs = torch.full((100_000,), -7.3)
    ref_logprobs = logprobs.clone()
    ref_logprobs[50_000] -= 1e-3
    (reward,) = implicit_rewards(logprobs, ref_logprobs, torch.zeros(100_000, dtype=torch.int64), 1, beta=1.0).tolist()
    assert reward == pytest.approx(1e-3, rel=1e-3)


def test_equal_policies_cost_log_two_and_far_ones_stay_finite() -> None:
    total, metrics = dpo_loss(torch.zeros(3), torch.zeros(3), torch.ones(3), label_smoothing=0.2)
    assert total.item() == pytest.approx(3 * math.log(2))
    assert (metrics["margin_mean"].item(), metrics["accuracy"].item()) == (0.0, 1.5)
    for far in (1e30, -1e30):
        chosen = torch.tensor([far], requires_grad=True)
        total, _ = dpo_loss(chosen, torch.zeros(1), torch.ones(1), label_smoothing=0.0)
        (slope,) = torch.autograd.grad(total, chosen)
        assert total.isfinite()
        assert slope.item() == (0.0 if far > 0 else -1.0)


def test_errors_name_the_tensors() -> None:
    with pytest.raises(ValueError, match=r"chosen_rewards \[3\], rejected_rewards \[2\], weight \[3\]; shapes must"):
        dpo_loss(torch.zeros(3), torch.zeros(2), torch.ones(3), label_smoothing=0.0)
    with pytest.raises(ValueError, match=r"logprobs \[3\], ref_logprobs \[2\], row \[3\]; shapes must be equal"):
        implicit_rewards(torch.zeros(3), torch.zeros(2), torch.zeros(3, dtype=torch.int64), 1, beta=0.1)
