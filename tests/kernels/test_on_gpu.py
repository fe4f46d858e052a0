"""The compiled kernels on a GPU, at sizes that the interpreter is too slow for: against fp64, beside plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from megarlhf_kernels import (
    Clip,
    Discount,
    Shaping,
    clipped_policy_loss,
    full_kl,
    linear_logprob,
    rewards_gae,
    token_logprob,
)
from megarlhf_kernels.dispatch import Impl
from megarlhf_kernels.full_kl import definition as exact_kl
from megarlhf_kernels.linear_logprob import definition as exact_linear
from megarlhf_kernels.token_logprob import definition as exact_token
from tests.kernels import linear_cases
from tests.kernels.linear_cases import LOSSES, Case, a_case, worst

pytestmark = pytest.mark.gpu

ROWS, VOCAB, HIDDEN = 300, 16_032, 256
"""128256 / 8 columns: no multiple of a tile."""


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")


def labels() -> Tensor:
    return torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator("cuda").manual_seed(9), device="cuda")


def gradients(function: Callable, inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Outputs that have gradients, and the gradients of the inputs for random upstream ones."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    results = function(*leaves)
    outputs = [x for x in (results if isinstance(results, tuple) else (results,)) if x.requires_grad]
    upstream = [draw(*x.shape, seed=70 + i).to(x.dtype) for i, x in enumerate(outputs)]
    total = sum(((x * up).sum() for x, up in zip(outputs, upstream, strict=True)), start=torch.zeros((), device="cuda"))
    return [*(x.detach() for x in outputs), *torch.autograd.grad(total, leaves)]


def assert_as_good_as_torch(ours: Callable, plain: Callable, inputs: Sequence[Tensor]) -> None:
    exact = gradients(plain, inputs, torch.float64)
    theirs = gradients(plain, inputs, torch.float32)
    for got, reference, expected in zip(gradients(ours, inputs, torch.float32), theirs, exact, strict=True):
        assert worst([got], [expected]) <= 2 * worst([reference], [expected]) + 1e-6


@pytest.fixture(autouse=True)
def _full_fp32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


def test_token_logprob() -> None:
    at = labels()
    assert_as_good_as_torch(
        lambda z: token_logprob(z, at, temperature=0.6, impl="triton"),
        lambda z: exact_token(z, at, temperature=0.6),
        [draw(ROWS, VOCAB, seed=1, scale=3.0)],
    )


def test_linear_logprob() -> None:
    at = labels()
    assert_as_good_as_torch(
        lambda h, w: linear_logprob(h, w, at, impl="triton"),
        lambda h, w: exact_linear(h, w, at),
        [draw(ROWS, HIDDEN, seed=1), draw(VOCAB, HIDDEN, seed=2, scale=0.1)],
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_linear_ppo(loss: str) -> None:
    case = Case(*(x.cuda() for x in a_case(ROWS, VOCAB, HIDDEN, scale=2.0)))
    linear_cases.assert_as_good_as_torch(case, LOSSES[loss](case), impl="triton")


def test_half_precision_goes_through_matmuls_with_fp32_output() -> None:
    at, hidden, weight = labels(), draw(ROWS, HIDDEN, seed=1).bfloat16(), draw(VOCAB, HIDDEN, seed=2).bfloat16()
    logprobs, entropy = linear_logprob(hidden, weight, at, impl="triton")
    exact = exact_linear(hidden.double(), weight.double(), at)
    assert worst([logprobs, entropy], exact) < 1e-3  # bf16 logits of this size, about 16, would be off by 0.03
    weight_grad = torch.zeros_like(weight, dtype=torch.float32)
    leaf = hidden.clone().requires_grad_()
    logprobs, _ = linear_logprob(leaf, weight.clone().requires_grad_(), at, weight_grad=weight_grad, impl="triton")
    upstream = draw(ROWS, seed=5)
    (upstream @ logprobs).backward()
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = torch.autograd.grad(upstream.double() @ exact_linear(h, w, at)[0], (h, w))
    assert leaf.grad is not None
    for got, want in zip((leaf.grad, weight_grad), expected, strict=True):
        assert (got.double() - want).norm() < 0.02 * want.norm()


def test_full_kl() -> None:
    assert_as_good_as_torch(
        lambda p, q: full_kl(p, q, impl="triton"),
        exact_kl,
        [draw(ROWS, VOCAB, seed=1, scale=2.0), draw(ROWS, VOCAB, seed=2, scale=2.0)],
    )


@pytest.mark.parametrize("clip", [Clip(0.2, 0.2), Clip(0.1, 0.3, 1.5)], ids=["clip", "dual clip"])
def test_losses_and_estimates_equal_their_references(clip: Clip) -> None:
    tokens = [draw(64, 1500, seed=i) for i in range(3)]
    mask = torch.arange(1500, device="cuda") < torch.randint(1, 1500, (64, 1), device="cuda")
    for got, want in zip(*(_policy(tokens, mask, clip, impl) for impl in ("triton", "reference")), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    ended, discount = draw(64, seed=7) > 0, Discount(1.0, 0.95)
    for earlier in (None, draw(64, 1500, seed=9)):
        shaping = Shaping(tokens[1], draw(64, seed=8), 0.1, earlier)
        estimates = [
            rewards_gae(tokens[0], tokens[2], mask, ended, shaping, discount, impl=impl)
            for impl in ("triton", "reference")
        ]
        for got, want in zip(*estimates, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def _policy(tokens: list[Tensor], mask: Tensor, clip: Clip, impl: Impl) -> list[Tensor]:
    new = tokens[0].clone().requires_grad_()
    total, count, metrics = clipped_policy_loss(new, tokens[1], tokens[2], mask, clip=clip, impl=impl)
    return [total.detach(), count, *metrics.values(), *torch.autograd.grad(total, new)]
