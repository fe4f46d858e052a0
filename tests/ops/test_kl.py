"""The three estimators: closed forms, small and large arguments, values and gradients apart."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf.ops.kl import kl_k1, kl_k2, kl_k3


def k3_oracle(x: float) -> float:
    """e^-x - 1 + x by its Taylor series, which has no cancellation for |x| <= 1."""
    return sum((-x) ** k / math.factorial(k) for k in range(2, 30))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [1e-12, 1e-7, 1e-5, 1e-4, 9.99e-4, 1.01e-3, 0.01, 0.0999, 0.1001, 0.5, 1.0])
def test_k3_keeps_its_digits(size, sign):
    # expm1(y) - y alone has a relative error of 1e-7 / |x|: 100 % at 1e-7.
    x = torch.tensor(sign * size, dtype=torch.float32, requires_grad=True)
    zero = torch.zeros(())
    value = kl_k3(x, zero)
    value.backward()
    assert value.item() == pytest.approx(k3_oracle(x.item()), rel=3e-6)
    assert x.grad is not None
    assert x.grad.item() == pytest.approx(-math.expm1(-x.item()), rel=3e-6)  # d/dx = 1 - e^-x


def test_values_are_the_formulas():
    logprobs, ref = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -0.5, -0.5])
    x = logprobs - ref
    assert kl_k1(logprobs, ref).tolist() == [0.5, -1.5, 0.0]
    assert kl_k2(logprobs, ref).tolist() == [0.125, 1.125, 0.0]
    torch.testing.assert_close(kl_k3(logprobs, ref), torch.exp(-x) - 1 + x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("x", [-1e30, -89.0, -20.5, 50.0, 1e4])
def test_k3_and_its_gradient_stay_finite(x):
    logprobs = torch.tensor([x], requires_grad=True)
    value = kl_k3(logprobs, torch.zeros(1))
    (gradient,) = torch.autograd.grad(value.sum(), logprobs)
    assert 0 <= value.item() <= max(math.exp(20.0) * 1.001, abs(x))
    # Beyond the clamp the value is constant; for large x it is x - 1, of slope 1.
    assert gradient.item() == (0.0 if x < -20 else 1.0)


def exact_expectations(estimator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over the vocabulary (weights p, without gradient) of an estimator and of its gradient in the logits."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).requires_grad_()
    ref = torch.log_softmax(torch.randn(7, generator=generator, dtype=torch.float64), 0)
    logprobs = torch.log_softmax(logits, 0)
    p = logprobs.detach().exp()
    mean = (p * estimator(logprobs, ref)).sum()
    (gradient,) = torch.autograd.grad(mean, logits, retain_graph=True)
    reverse = (logprobs.exp() * (logprobs - ref)).sum()
    (reverse_gradient,) = torch.autograd.grad(reverse, logits, retain_graph=True)
    forward = (ref.exp() * (ref - logprobs)).sum()
    (forward_gradient,) = torch.autograd.grad(forward, logits)
    values = torch.stack([mean, reverse]).detach()
    return values, torch.stack([gradient, reverse_gradient, forward_gradient])


def test_expected_values_and_gradients_on_policy():
    """What the module says of each as a loss, by the exact sum over a vocabulary instead of samples."""
    (k1, kl), (k1_gradient, reverse, forward) = exact_expectations(kl_k1)
    _, (k2_gradient, *_) = exact_expectations(kl_k2)
    (k3, _), (k3_gradient, *_) = exact_expectations(kl_k3)
    torch.testing.assert_close(torch.stack([k1, k3]), kl.expand(2), rtol=1e-9, atol=1e-9)
    assert k1_gradient.abs().max() < 1e-12  # no signal at all
    torch.testing.assert_close(k2_gradient, reverse, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(k3_gradient, forward, rtol=1e-6, atol=1e-9)  # 1e-6: the series' share
    assert (reverse - forward).abs().max() > 0.01  # and those two are not the same thing
