"""Policy and value loss against their formulas under autograd in fp64, in Triton's interpreter and in torch."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf_kernels.policy_value_loss import BLOCK, Clip, clipped_policy_loss, clipped_value_loss, clipped_weight_loss

IMPLS = ["reference", "triton"]
LOSSES = [(loss, impl) for loss in ("policy", "dual", "value") for impl in IMPLS]
CLIPS = {"policy": Clip(0.2, 0.2), "dual": Clip(0.1, 0.4, 1.2)}
"""The second has two bounds, and one for what a bad token may cost."""
UPSTREAM = -1.7


def a_case(*shape: int, spread: float = 0.3):
    """new, old, advantages or returns, mask: the clip holds some of the tokens, and one row is all masked."""
    generator = torch.Generator().manual_seed(sum(shape))
    old, noise, third = torch.randn(3, *shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.7
    if len(shape) > 1 and shape[0] > 1:
        mask[1] = False
    return old + spread * noise, old, third, mask


def run(loss: str, *case, impl):
    """[loss, count, metrics...] and the gradient for an upstream gradient that is neither 1 nor positive."""
    new, old, third, mask = case
    leaf = new.detach().clone().requires_grad_()
    if loss in CLIPS:
        total, count, metrics = clipped_policy_loss(leaf, old, third, mask, clip=CLIPS[loss], impl=impl)
    else:
        total, count, metrics = clipped_value_loss(leaf, old, third, mask, value_clip_range=0.2, impl=impl)
    (gradient,) = torch.autograd.grad(UPSTREAM * total, leaf)
    assert count.dtype == torch.int64
    assert not any(metric.requires_grad for metric in metrics.values())
    return torch.stack([total.detach(), count.to(total.dtype), *metrics.values()]), gradient


def oracle(loss: str, new, old, third, mask):
    """The same in fp64, as the papers write it."""
    leaf = new.double().requires_grad_()
    a, b, c = leaf[mask], old.double()[mask], third.double()[mask]
    if loss in CLIPS:
        ratio = (a - b).exp()
        low, high, dual = CLIPS[loss]
        first, second = -c * ratio, -c * ratio.clamp(1 - low, 1 + high)
        worst = torch.maximum(first, second)
        bad = (c < 0) & (worst > -dual * c)
        metrics = [((second > first) | bad).sum(), (ratio - 1 - (a - b)).sum(), ratio.sum()]
        total = torch.where(bad, -dual * c, worst).sum()
    else:
        first, second = (a - c) ** 2, (b + (a - b).clamp(-0.2, 0.2) - c) ** 2
        metrics = [(second > first + 1e-12).sum(), first.sum()]
        total = 0.5 * torch.maximum(first, second).sum()
    (gradient,) = torch.autograd.grad(UPSTREAM * total, leaf)
    return torch.stack([total, mask.sum().double(), *metrics]).detach(), gradient


@pytest.mark.parametrize(("loss", "impl"), LOSSES)
@pytest.mark.parametrize("shape", [(1,), (5, 7), (3, 401), (2 * BLOCK + 1,)])
def test_matches_the_formula_in_fp64(shape, loss, impl):
    case = a_case(*shape)
    sums, gradient = run(loss, *case, impl=impl)
    expected, expected_gradient = oracle(loss, *case)
    torch.testing.assert_close(sums.double(), expected, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-6, atol=1e-6)
    assert gradient[~case[3]].abs().sum() == 0.0
    if len(shape) > 1:
        assert 0 < expected[2] < expected[1]  # the clip holds some


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("gap", [1e-6, 1e-4, 1e-2, 0.09, 0.11, 0.49, 0.51, 3.0, -1e-4, -0.3, -30.0])
def test_approx_kl_keeps_its_digits(gap, impl):
    old = torch.zeros(1)
    new = torch.tensor([gap])
    sums, _ = run("policy", new, old, torch.ones(1), torch.ones(1).bool(), impl=impl)
    x = new.double().item()
    assert sums[3].item() == pytest.approx(math.expm1(x) - x if abs(x) > 1e-5 else x * x / 2, rel=4e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_first_pass_is_exact(impl):
    _, old, advantages, mask = a_case(4, 50)
    sums, gradient = run("policy", old, old, advantages, mask, impl=impl)
    assert sums[1:].tolist() == [mask.sum(), 0.0, 0.0, mask.sum()]
    assert torch.equal(gradient, torch.where(mask, UPSTREAM * -advantages, 0.0))
    sums, gradient = run("value", old, old, advantages, mask, impl=impl)
    assert sums[2] == 0.0
    assert torch.equal(gradient, torch.where(mask, UPSTREAM * (old - advantages), 0.0))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("log_ratio", [100.0, -100.0, 3e38])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_far_policies_stay_finite_and_learn_nothing(log_ratio, advantage, impl):
    new, one = torch.tensor([log_ratio]), torch.ones(1).bool()
    sums, gradient = run("policy", new, torch.zeros(1), torch.tensor([advantage]), one, impl=impl)
    ratio = math.exp(math.copysign(20, log_ratio))
    expected = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
    assert sums[0].item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(sums).all()
    assert gradient.item() == 0.0


@pytest.mark.parametrize(("loss", "impl"), LOSSES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 3e38])
def test_masked_inputs_are_never_read(poison, loss, impl):
    *inputs, mask = a_case(5, 30)
    clean = run(loss, *inputs, mask, impl=impl)
    poisoned = run(loss, *[torch.where(mask, x, poison) for x in inputs], mask, impl=impl)
    for expected, got in zip(clean, poisoned, strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize(("loss", "impl"), LOSSES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_nan_is_not_hidden(which, loss, impl):
    case = a_case(3, 20)
    case[3][0, 0] = True
    case[which][0, 0] = math.nan
    sums, gradient = run(loss, *case, impl=impl)
    assert torch.isnan(sums[0])
    # The old value only bounds the loss: it has no part in the derivative.
    assert torch.isnan(gradient).nonzero().tolist() == ([] if (loss, which) == ("value", 1) else [[0, 0]])


@pytest.mark.parametrize(("loss", "impl"), LOSSES)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 40)])
def test_nothing_to_learn_from_is_zero(shape, loss, impl):
    new, old, third, mask = a_case(*shape)
    sums, gradient = run(loss, new, old, third, torch.zeros_like(mask), impl=impl)
    assert sums.abs().sum() == 0.0
    assert gradient.shape == shape
    assert gradient.abs().sum() == 0.0


@pytest.mark.parametrize("loss", ["policy", "dual", "value"])
def test_gradcheck(loss):
    new, old, third, mask = (x.double() if x.is_floating_point() else x for x in a_case(4, 5))
    function, keyword = {
        **{name: (clipped_policy_loss, {"clip": clip}) for name, clip in CLIPS.items()},
        "value": (clipped_value_loss, {"value_clip_range": 0.2}),
    }[loss]
    assert torch.autograd.gradcheck(lambda x: function(x, old, third, mask, **keyword)[0], new.requires_grad_())


@pytest.mark.parametrize(("loss", "impl"), LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_fp32(dtype, loss, impl):
    *inputs, mask = a_case(4, 30)
    halves = [x.to(dtype) for x in inputs]
    sums, gradient = run(loss, *halves, mask, impl=impl)
    expected, expected_gradient = run(loss, *[x.float() for x in halves], mask, impl=impl)
    assert torch.equal(sums, expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@pytest.mark.parametrize(("loss", "impl"), LOSSES)
def test_only_the_first_argument_gets_a_gradient(loss, impl):
    new, old, third, mask = a_case(3, 20)
    without, _ = run(loss, new, old, third, mask, impl=impl)
    sums, _ = run(loss, new, old.requires_grad_(), third.requires_grad_(), mask, impl=impl)
    assert torch.equal(sums, without)
    function, keyword = {
        **{name: (clipped_policy_loss, {"clip": clip}) for name, clip in CLIPS.items()},
        "value": (clipped_value_loss, {"value_clip_range": 0.2}),
    }[loss]
    assert not function(new, old, third, mask, **keyword, impl=impl)[0].requires_grad


def test_errors_name_the_argument():
    new, old, third, mask = a_case(4, 6)
    for message, arguments in {
        r"new_logprobs: got shape \[4, 5\]; must be \[4, 6\]": (new[:, 1:], old, third, mask),
        r"logprobs: got torch.int64": (new, old.long(), third, mask),
        r"advantages: is on meta; must be on cpu": (new, old, third.to("meta"), mask),
        r"advantages: strides \[1, 4\]": (new, old, third.T.contiguous().T, mask),
        r"mask: got torch.float32; must be torch.bool": (new, old, third, mask.float()),
    }.items():
        with pytest.raises(ValueError, match=message):
            clipped_policy_loss(*arguments, clip=Clip(0.2, 0.2))
    with pytest.raises(ValueError, match=r"returns: got shape \[3, 6\]; must be \[4, 6\]"):
        clipped_value_loss(new, old, third[1:], mask, value_clip_range=0.2)
    with pytest.raises(ValueError, match=r"new_values: got torch.float64"):
        clipped_value_loss(new.double(), old, third, mask, value_clip_range=0.2, impl="triton")


def test_the_dual_clip_is_for_negative_advantages_alone():
    """Ye et al. 2020, eq. 5: a bad token that became likelier costs at most `dual` times its advantage."""
    new, advantages, every = torch.full((2,), 2.0), torch.tensor([1.0, -1.0]), torch.ones(2).bool()
    for dual, costs in ((math.inf, math.e**2), (3.0, 3.0)):
        leaf = new.clone().requires_grad_()
        clip = Clip(0.2, 10.0, dual)
        total, _, metrics = clipped_policy_loss(leaf, torch.zeros(2), advantages, every, clip=clip)
        total.backward()
        assert total.item() == pytest.approx(costs - math.e**2, rel=1e-6)
        assert leaf.grad is not None
        assert leaf.grad.tolist() == pytest.approx([-(math.e**2), 0.0 if dual == 3.0 else math.e**2], rel=1e-6)
        assert metrics["clip_fraction"].item() == (dual == 3.0)


def test_the_weight_of_cispo_is_clipped_and_held():
    new = torch.tensor([-1.0, -2.0, -0.5, -0.1], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, -1.0, -1.5, -9.0], dtype=torch.float64)
    advantages = torch.tensor([2.0, -1.0, 1.0, -3.0], dtype=torch.float64)
    total, metrics = clipped_weight_loss(new, old, advantages, clip=Clip(1.0, 0.5))
    total.backward()
    weights = [1.0, math.exp(-1.0), 1.5, 1.5]  # no lower bound, and an upper one that holds whatever the advantage is
    expected = [-a * w for a, w in zip(advantages.tolist(), weights, strict=True)]
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx(expected, rel=1e-12)
    assert total.item() == pytest.approx(sum(g * x for g, x in zip(expected, new.tolist(), strict=True)), rel=1e-12)
    assert metrics["clip_fraction"].item() == 2
    assert metrics["ratio"].item() == pytest.approx(1 + math.exp(-1) + math.e + math.exp(8.9), rel=1e-12)
