"""Policy, value and preference losses: scalar loops in Python floats, closed-form gradients, parts that add up."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf.ops.preference_loss import bradley_terry_loss, pointwise_loss
from megarlhf.ops.value_loss import clipped_value_loss
from megarlhf_kernels import Clip
from tests.helpers.losses import clipped_policy_loss


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(25, generator=generator) for _ in range(3))


def test_policy_loss_matches_a_loop_in_value_and_gradient(case):
    old, noise, advantages = case
    new = (old + 0.3 * noise).requires_grad_()
    total, metrics = clipped_policy_loss(new, old, advantages, clip=Clip(0.2, 0.2))
    (gradient,) = torch.autograd.grad(1.7 * total, new)
    loss, clipped, kl, ratios, slope = 0.0, 0, 0.0, 0.0, torch.zeros(25)
    for at in range(25):
        log_ratio, advantage = new[at].item() - old[at].item(), advantages[at].item()
        ratio = math.exp(log_ratio)
        kept, cut = -advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)
        loss += max(kept, cut)
        clipped += cut > kept
        kl += ratio - 1 - log_ratio
        ratios += ratio
        slope[at] = 0.0 if cut > kept else 1.7 * kept  # d ratio / d new = ratio
    assert total.item() == pytest.approx(loss, rel=1e-5)
    assert metrics["clip_fraction"].item() == clipped > 0
    assert metrics["approx_kl"].item() == pytest.approx(kl, rel=1e-4)
    assert metrics["ratio"].item() == pytest.approx(ratios, rel=1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6)


def test_first_pass_is_ratio_one_and_plain_policy_gradient(case):
    logprobs, _, advantages = case
    new = logprobs.clone().requires_grad_()
    total, metrics = clipped_policy_loss(new, logprobs, advantages, clip=Clip(0.2, 0.2))
    (gradient,) = torch.autograd.grad(total, new)
    assert metrics["ratio"].item() == 25
    assert metrics["clip_fraction"].item() == 0
    assert metrics["approx_kl"].item() == 0.0
    assert torch.equal(gradient, -advantages)


@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 3e38])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_far_policies_stay_finite(log_ratio, advantage):
    new = torch.tensor([log_ratio], requires_grad=True)
    total, metrics = clipped_policy_loss(new, torch.zeros(1), torch.tensor([advantage]), clip=Clip(0.2, 0.2))
    (gradient,) = torch.autograd.grad(total, new)
    assert torch.isfinite(torch.stack([total.detach(), gradient.sum(), *metrics.values()])).all()
    expected = max(-advantage * math.exp(math.copysign(20, log_ratio)), -advantage * (1.2 if log_ratio > 0 else 0.8))
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_value_loss_matches_a_loop_in_value_and_gradient(case):
    old, noise, returns = case
    new = (old + 0.4 * noise).requires_grad_()
    total, metrics = clipped_value_loss(new, old, returns, value_clip_range=0.2)
    (gradient,) = torch.autograd.grad(1.7 * total, new)
    loss, cuts, square, slope = 0.0, 0, 0.0, torch.zeros(25)
    for at in range(25):
        move = min(max(new[at].item() - old[at].item(), -0.2), 0.2)
        error, clipped = new[at].item() - returns[at].item(), old[at].item() + move - returns[at].item()
        loss += 0.5 * max(error**2, clipped**2)
        square += error**2
        cuts += clipped**2 > error**2 + 1e-6
        slope[at] = 1.7 * error if error**2 >= clipped**2 - 1e-6 else 0.0
    assert total.item() == pytest.approx(loss, rel=1e-5)
    assert metrics["clip_fraction"].item() == cuts > 0
    assert metrics["squared_error"].item() == pytest.approx(square, rel=1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-5)


def test_micro_batches_add_up(case):
    """Sums of parts are those of the whole: what lets one place divide."""
    parts = [slice(0, 3), slice(3, 4), slice(4, 25)]
    both = ((clipped_policy_loss, {"clip": Clip(0.2, 0.3, 3.0)}), (clipped_value_loss, {"value_clip_range": 0.2}))
    for loss, keyword in both:
        whole = loss(*case, **keyword)
        split = [loss(*(x[p] for x in case), **keyword) for p in parts]
        assert sum(part[0].item() for part in split) == pytest.approx(whole[0].item(), rel=1e-6)
        for name, value in whole[1].items():
            assert sum(part[1][name].item() for part in split) == pytest.approx(value.item(), rel=1e-5)


def test_bradley_terry_matches_a_loop_and_its_gradient():
    chosen = torch.tensor([2.0, -1.0, 0.5, 60.0, -200.0], requires_grad=True)
    rejected = torch.tensor([1.0, 1.0, 0.5, -60.0, 200.0], requires_grad=True)
    weight = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0])
    total, metrics = bradley_terry_loss(chosen, rejected, weight)
    total.backward()
    gaps = [1.0, -2.0, 0.0, 120.0, -400.0]
    # log(1 + e^-gap); for a gap of -400 it is 400, where log(sigmoid) would be -inf.
    losses = [math.log1p(math.exp(-gap)) if gap > -300 else -gap for gap in gaps]
    assert total.item() == pytest.approx(sum(w * x for w, x in zip(weight.tolist(), losses, strict=True)), rel=1e-6)
    assert metrics["accuracy"].item() == 1.0 + 0.0 + 2.0 * 0.5 + 1.0 + 0.0
    assert metrics["score_gap"].item() == pytest.approx(1.0 - 1.0 + 0.0 + 120.0 - 400.0)
    slopes = [-w / (1 + math.exp(min(gap, 700))) for w, gap in zip(weight.tolist(), gaps, strict=True)]
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx(slopes, abs=1e-6)
    assert rejected.grad.tolist() == pytest.approx([-s for s in slopes], abs=1e-6)


def test_equal_scores_cost_log_two():
    zeros, ones = torch.zeros(4), torch.ones(4)
    total, metrics = bradley_terry_loss(zeros, zeros, ones)
    assert total.item() / 4 == pytest.approx(math.log(2), rel=1e-6)
    assert metrics["accuracy"].item() == 2.0
    total, _ = pointwise_loss(zeros, ones, ones)
    assert total.item() / 4 == pytest.approx(math.log(2), rel=1e-6)


def test_pointwise_loss_matches_a_loop_and_its_gradient():
    scores = torch.tensor([2.0, -1.0, 0.3, 150.0, -150.0], requires_grad=True)
    correct, weight = torch.tensor([1.0, 0.0, 0.25, 0.0, 1.0]), torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0])
    total, metrics = pointwise_loss(scores, correct, weight)
    total.backward()
    loss, slopes = 0.0, []
    for s, c, w in zip(scores.tolist(), correct.tolist(), weight.tolist(), strict=True):
        softplus = max(s, 0.0) + math.log1p(math.exp(-abs(s)))  # -log sigmoid(-s)
        loss += w * (softplus - c * s)
        slopes.append(w * (1 / (1 + math.exp(-s)) - c))
    assert total.item() == pytest.approx(loss, rel=1e-6)
    assert metrics["accuracy"].item() == 1.0 + 0.5  # the soft 0.25 scored above 0, the certain one wrong, the last free
    assert metrics["score"].item() == pytest.approx(2.0 - 0.5 + 0.6 + 150.0, rel=1e-6)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx(slopes, abs=1e-6)


def test_empty_batches_sum_to_zero():
    none = torch.zeros(0)
    for total, metrics in (
        clipped_policy_loss(none, none, none, clip=Clip(0.2, 0.2)),
        clipped_value_loss(none, none, none, value_clip_range=0.2),
        bradley_terry_loss(none, none, none),
        pointwise_loss(none, none, none),
    ):
        assert [total.item(), *(m.item() for m in metrics.values())] == [0.0] * (1 + len(metrics))


def test_errors_name_the_tensors(case):
    first, second, third = case
    with pytest.raises(ValueError, match=r"advantages: got .*\[24\]"):
        clipped_policy_loss(first, second, third[1:], clip=Clip(0.2, 0.2))
    with pytest.raises(ValueError, match=r"returns: got .*\[24\]"):
        clipped_value_loss(first, second, third[1:], value_clip_range=0.2)
    with pytest.raises(ValueError, match=r"chosen_scores \[25\], rejected_scores \[24\], weight \[25\]"):
        bradley_terry_loss(first, first[1:], first)
