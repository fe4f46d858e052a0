"""Policy, value and preference losses: scalar loops in Python floats, closed-form gradients, masks that hide all."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf.ops.policy_loss import clipped_policy_loss
from megarlhf.ops.preference_loss import bradley_terry_loss, pointwise_loss
from megarlhf.ops.value_loss import clipped_value_loss


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    first, second, third = (torch.randn(5, 7, generator=generator) for _ in range(3))
    mask = torch.rand(5, 7, generator=generator) < 0.7
    mask[1] = False
    return first, second, third, mask


def entries(mask: torch.Tensor) -> list[tuple[int, int]]:
    return [(int(i), int(j)) for i, j in mask.nonzero()]


def test_policy_loss_matches_a_loop_in_value_and_gradient(case):
    old, noise, advantages, mask = case
    new = (old + 0.3 * noise).requires_grad_()
    total, count, metrics = clipped_policy_loss(new, old, advantages, mask, clip_range=0.2)
    (gradient,) = torch.autograd.grad(1.7 * total, new)
    loss, clipped, kl, ratios, slope = 0.0, 0, 0.0, 0.0, torch.zeros(5, 7)
    for at in entries(mask):
        log_ratio, advantage = new[at].item() - old[at].item(), advantages[at].item()
        ratio = math.exp(log_ratio)
        kept, cut = -advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2)
        loss += max(kept, cut)
        clipped += cut > kept
        kl += ratio - 1 - log_ratio
        ratios += ratio
        slope[at] = 0.0 if cut > kept else 1.7 * kept  # d ratio / d new = ratio
    assert count.item() == len(entries(mask))
    assert total.item() == pytest.approx(loss, rel=1e-5)
    assert metrics["clip_fraction"].item() == clipped > 0
    assert metrics["approx_kl"].item() == pytest.approx(kl, rel=1e-4)
    assert metrics["ratio"].item() == pytest.approx(ratios, rel=1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-5, atol=1e-6)


def test_first_pass_is_ratio_one_and_plain_policy_gradient(case):
    logprobs, _, advantages, mask = case
    new = logprobs.clone().requires_grad_()
    total, count, metrics = clipped_policy_loss(new, logprobs, advantages, mask, clip_range=0.2)
    (gradient,) = torch.autograd.grad(total, new)
    assert metrics["ratio"].item() == count.item()
    assert metrics["clip_fraction"].item() == 0
    assert metrics["approx_kl"].item() == 0.0
    assert torch.equal(gradient, torch.where(mask, -advantages, 0.0))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_tokens_may_overflow(case, poison):
    first, second, third, mask = case
    clean, dirty = [], []
    for inputs, results in (((first, second, third), clean), (None, dirty)):
        a, b, c = inputs or (torch.where(mask, x, poison) for x in (first, second, third))
        a = a.clone().requires_grad_()
        for loss in (
            clipped_policy_loss(a, b, c, mask, clip_range=0.2)[0],
            clipped_value_loss(a, b, c, mask, value_clip_range=0.2)[0],
        ):
            results += [loss.detach(), torch.autograd.grad(loss, a)[0]]
    for expected, got in zip(clean, dirty, strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 3e38])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_far_policies_stay_finite(log_ratio, advantage):
    new = torch.tensor([[log_ratio]], requires_grad=True)
    total, _, metrics = clipped_policy_loss(
        new, torch.zeros(1, 1), torch.full((1, 1), advantage), torch.ones(1, 1).bool(), clip_range=0.2
    )
    (gradient,) = torch.autograd.grad(total, new)
    assert torch.isfinite(torch.stack([total.detach(), gradient.sum(), *metrics.values()])).all()
    expected = max(-advantage * math.exp(math.copysign(20, log_ratio)), -advantage * (1.2 if log_ratio > 0 else 0.8))
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_value_loss_matches_a_loop_in_value_and_gradient(case):
    old, noise, returns, mask = case
    new = (old + 0.4 * noise).requires_grad_()
    total, count, metrics = clipped_value_loss(new, old, returns, mask, value_clip_range=0.2)
    (gradient,) = torch.autograd.grad(1.7 * total, new)
    loss, cuts, square, slope = 0.0, 0, 0.0, torch.zeros(5, 7)
    for at in entries(mask):
        move = min(max(new[at].item() - old[at].item(), -0.2), 0.2)
        error, clipped = new[at].item() - returns[at].item(), old[at].item() + move - returns[at].item()
        loss += 0.5 * max(error**2, clipped**2)
        square += error**2
        cuts += clipped**2 > error**2 + 1e-6
        slope[at] = 1.7 * error if error**2 >= clipped**2 - 1e-6 else 0.0
    assert count.item() == len(entries(mask))
    assert total.item() == pytest.approx(loss, rel=1e-5)
    assert metrics["clip_fraction"].item() == cuts > 0
    assert metrics["squared_error"].item() == pytest.approx(square, rel=1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-5)


def test_micro_batches_add_up(case):
    """Sums and counts of parts are those of the whole: what lets one place divide."""
    first, second, third, mask = case
    parts = [slice(0, 1), slice(1, 2), slice(2, 5)]
    for loss, keyword in ((clipped_policy_loss, "clip_range"), (clipped_value_loss, "value_clip_range")):
        whole = loss(first, second, third, mask, **{keyword: 0.2})
        split = [loss(first[p], second[p], third[p], mask[p], **{keyword: 0.2}) for p in parts]
        assert sum(part[0].item() for part in split) == pytest.approx(whole[0].item(), rel=1e-6)
        assert sum(part[1].item() for part in split) == whole[1].item()
        for name, value in whole[2].items():
            assert sum(part[2][name].item() for part in split) == pytest.approx(value.item(), rel=1e-5)


def test_bradley_terry_matches_a_loop_and_its_gradient():
    chosen = torch.tensor([2.0, -1.0, 0.5, 60.0, -200.0], requires_grad=True)
    rejected = torch.tensor([1.0, 1.0, 0.5, -60.0, 200.0], requires_grad=True)
    weight = torch.tensor([1.0, 0.5, 2.0, 1.0, 1.0])
    total, count, metrics = bradley_terry_loss(chosen, rejected, weight)
    total.backward()
    gaps = [1.0, -2.0, 0.0, 120.0, -400.0]
    # log(1 + e^-gap); for a gap of -400 it is 400, where log(sigmoid) would be -inf.
    losses = [math.log1p(math.exp(-gap)) if gap > -300 else -gap for gap in gaps]
    assert total.item() == pytest.approx(sum(w * x for w, x in zip(weight.tolist(), losses, strict=True)), rel=1e-6)
    assert count.item() == 5.5
    assert metrics["accuracy"].item() == 1.0 + 0.0 + 2.0 * 0.5 + 1.0 + 0.0
    assert metrics["score_gap"].item() == pytest.approx(1.0 - 1.0 + 0.0 + 120.0 - 400.0)
    slopes = [-w / (1 + math.exp(min(gap, 700))) for w, gap in zip(weight.tolist(), gaps, strict=True)]
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx(slopes, abs=1e-6)
    assert rejected.grad.tolist() == pytest.approx([-s for s in slopes], abs=1e-6)


def test_equal_scores_cost_log_two():
    zeros, ones = torch.zeros(4), torch.ones(4)
    total, count, metrics = bradley_terry_loss(zeros, zeros, ones)
    assert (total / count).item() == pytest.approx(math.log(2), rel=1e-6)
    assert (metrics["accuracy"] / count).item() == 0.5
    total, count, _ = pointwise_loss(zeros, ones, ones)
    assert (total / count).item() == pytest.approx(math.log(2), rel=1e-6)


def test_pointwise_loss_matches_a_loop_and_its_gradient():
    scores = torch.tensor([2.0, -1.0, 0.3, 150.0, -150.0], requires_grad=True)
    correct, weight = torch.tensor([1.0, 0.0, 0.25, 0.0, 1.0]), torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0])
    total, count, metrics = pointwise_loss(scores, correct, weight)
    total.backward()
    loss, slopes = 0.0, []
    for s, c, w in zip(scores.tolist(), correct.tolist(), weight.tolist(), strict=True):
        softplus = max(s, 0.0) + math.log1p(math.exp(-abs(s)))  # -log sigmoid(-s)
        loss += w * (softplus - c * s)
        slopes.append(w * (1 / (1 + math.exp(-s)) - c))
    assert total.item() == pytest.approx(loss, rel=1e-6)
    assert count.item() == 4.5
    assert metrics["accuracy"].item() == 1.0 + 0.5  # the soft 0.25 scored above 0, the certain one wrong, the last free
    assert metrics["score"].item() == pytest.approx(2.0 - 0.5 + 0.6 + 150.0, rel=1e-6)
    assert scores.grad is not None
    assert scores.grad.tolist() == pytest.approx(slopes, abs=1e-6)


def test_empty_batches_sum_to_zero():
    none, mask = torch.zeros(0, 4), torch.zeros(0, 4).bool()
    for total, count, metrics in (
        clipped_policy_loss(none, none, none, mask, clip_range=0.2),
        clipped_value_loss(none, none, none, mask, value_clip_range=0.2),
        bradley_terry_loss(none[:, 0], none[:, 0], none[:, 0]),
        pointwise_loss(none[:, 0], none[:, 0], none[:, 0]),
    ):
        assert [total.item(), count.item(), *(m.item() for m in metrics.values())] == [0.0] * (2 + len(metrics))


def test_errors_name_the_tensors(case):
    first, second, third, mask = case
    with pytest.raises(ValueError, match=r"advantages: got \[5, 6\], mask is \[5, 7\]"):
        clipped_policy_loss(first, second, third[:, 1:], mask, clip_range=0.2)
    with pytest.raises(ValueError, match=r"new_values: got \[4, 7\]"):
        clipped_value_loss(first[1:], second, third, mask, value_clip_range=0.2)
    with pytest.raises(ValueError, match=r"chosen_scores \[5\], rejected_scores \[4\], weight \[5\]"):
        bradley_terry_loss(first[:, 0], first[1:, 0], first[:, 0])
