"""Masked statistics against torch on the selected entries, and the entries that must not count."""

from __future__ import annotations

import pytest
import torch

from megarlhf.ops.masked import last_true, masked_mean, masked_sum, masked_var, masked_whiten


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 9, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.6
    mask[2] = False
    return x, mask


def test_statistics_equal_those_of_the_selected_entries(case):
    x, mask = case
    chosen = x[mask].double()
    assert masked_sum(x, mask).item() == pytest.approx(chosen.sum().item(), rel=1e-6)
    assert masked_mean(x, mask).item() == pytest.approx(chosen.mean().item(), rel=1e-6)
    assert masked_var(x, mask).item() == pytest.approx(chosen.var(unbiased=False).item(), rel=1e-6)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_matches_fp64_and_zeroes_the_rest(case, shift_mean):
    x, mask = case
    chosen = x[mask].double()
    expected = (chosen - chosen.mean()) / (chosen.var(unbiased=False) + 1e-8).sqrt()
    expected = expected if shift_mean else expected + chosen.mean()
    whitened = masked_whiten(x, mask, shift_mean=shift_mean)
    torch.testing.assert_close(whitened[mask], expected.float(), rtol=1e-6, atol=1e-7)
    assert whitened.dtype == torch.float32
    assert whitened[~mask].abs().max() == 0.0


def test_a_large_mean_does_not_cancel(case):
    x, mask = case
    # 1e4 + noise in fp32 keeps 3 digits of the noise; E[x^2] - E[x]^2 in fp32 would keep none (1e8 * 6e-8 = 6).
    shifted = x + 1e4
    assert masked_var(shifted, mask).item() == pytest.approx(
        shifted[mask].double().var(unbiased=False).item(), rel=1e-6
    )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_masked_entries_may_hold_anything(case, poison):
    x, mask = case
    poisoned = torch.where(mask, x, poison).requires_grad_()
    for function in (masked_sum, masked_mean, masked_var):
        assert torch.equal(function(poisoned, mask), function(x, mask))
    whitened = masked_whiten(poisoned, mask)
    assert torch.equal(whitened, masked_whiten(x, mask))
    (gradient,) = torch.autograd.grad(masked_sum(poisoned, mask), poisoned)
    assert torch.equal(gradient, mask.float())  # d sum / dx is exactly the mask


@pytest.mark.parametrize("shape", [(3, 4), (0, 4)])
def test_nothing_selected_gives_zeros(shape):
    x, mask = torch.full(shape, float("nan")), torch.zeros(shape, dtype=torch.bool)
    for function in (masked_sum, masked_mean, masked_var):
        assert function(x, mask).item() == 0.0
    assert torch.equal(masked_whiten(x, mask), torch.zeros(shape))


def test_last_true():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    expected = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert torch.equal(last_true(mask), expected)
    assert last_true(mask[:0]).shape == (0, 4)


def test_errors_name_the_tensors(case):
    x, mask = case
    with pytest.raises(ValueError, match=r"x: got \[6, 8\], mask is \[6, 9\]"):
        masked_sum(x[:, 1:], mask)
    with pytest.raises(ValueError, match=r"mask: got torch.float32"):
        masked_mean(x, mask.float())
