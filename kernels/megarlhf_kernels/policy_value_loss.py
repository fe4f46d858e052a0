"""The clipped policy loss and the clipped value loss with their metrics, forward and backward in one pass.

    policy: max(-A ratio, -A clip(ratio, 1 - low, 1 + high)), at most -dual A where A < 0      ratio = exp(new - old)
    value:  0.5 max((new - target)^2, (clip(new, old - c, old + c) - target)^2)

Both are sums over tokens. A token's derivative costs nothing beside its loss, so forward writes it, and backward
multiplies it by the upstream gradient. Where the clipped branch is the greater the clip has removed the gradient.

Memory:   one number a token for the gradient; 5 sums in fp64 of every 1024 tokens, added in one order.
Source:   Schulman et al. 2017, eq. 7; two bounds: DAPO (arXiv 2503.14476); dual clip: Ye et al. 2020, eq. 5; Huang et
          al. 2024, detail "value loss". Differs: |new - old| of log-probs is clamped to 20 before exp, without gradient
          beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarlhf_kernels._checks import FLOATS, check
from megarlhf_kernels._shards import accumulation_dtype
from megarlhf_kernels._triton import constexpr, jit, tl, triton
from megarlhf_kernels.aot import CompileCase
from megarlhf_kernels.dispatch import Impl, use_triton

MAX_LOG_RATIO = 20.0
"""fp32 overflows at e^88.7."""

BLOCK, WARPS = 1024, 8
"""Tokens a program, and warps: four tokens a thread. With eight, Triton 3.7.1 spills registers of `_value_kernel`."""


class Clip(NamedTuple):
    """How far a ratio may go before the loss ignores it."""

    low: float
    """Down to 1 - low."""
    high: float
    """Up to 1 + high."""
    dual: float = math.inf
    """Where the advantage is negative, the loss is at most this times its size; above 1."""


def clipped_policy_loss(
    new_logprobs: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip: Clip,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The clipped surrogate summed over the mask, differentiable in `new_logprobs` alone.

    Shapes:   new_logprobs, logprobs, advantages float and mask bool, all of one shape. Returns scalars (sum, count,
              metrics) in fp32 (fp64 for fp64 inputs), the count in int64.
    Units:    nats. Metrics are sums over the same tokens: `clip_fraction` (tokens whose gradient the clip removed),
              `approx_kl` (k3 of KL(old || new), nats), `ratio`. Masked inputs are never read.
    Raises:   ValueError if shapes, dtypes or devices differ, or rows are not contiguous.
    """
    case = _Case(new_logprobs, logprobs, advantages, mask, (clip.low, clip.high, clip.dual))
    fast = _checked("clipped_policy_loss", case, ("new_logprobs", "logprobs", "advantages"), impl)
    sums, slope = _run(_policy if fast else _policy_reference, case)
    clip_fraction, approx_kl, ratio = sums[2:].to(slope.dtype)
    metrics = {"clip_fraction": clip_fraction, "approx_kl": approx_kl, "ratio": ratio}
    return _Loss.apply(new_logprobs, sums, slope), sums[1].long(), metrics


def clipped_weight_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, *, clip: Clip
) -> tuple[Tensor, dict[str, Tensor]]:
    """-A clip(ratio, 1 - low, 1 + high) new_logprob, summed, the clipped ratio held: no token loses its gradient.

    Shapes:   new_logprobs, logprobs, advantages [n] fp32 or fp64; differentiable in the first. Returns (sum, metrics).
    Units:    metrics as in `clipped_policy_loss`; `clip_fraction` is of tokens whose weight was clipped.
    Source:   CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4), where only the upper bound is used: low = 1 is no lower one.
    """
    log_ratio = (new_logprobs - logprobs).detach()
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight = ratio.clamp(1 - clip.low, 1 + clip.high)
    each = -advantages * weight * new_logprobs
    metrics = {"clip_fraction": weight != ratio, "approx_kl": k3(log_ratio), "ratio": ratio}
    return each.sum(), {name: x.sum(dtype=torch.float64) for name, x in metrics.items()}


def clipped_value_loss(
    new_values: Tensor,
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    value_clip_range: float,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The clipped regression summed over the mask, differentiable in `new_values` alone.

    Shapes:   new_values, values, returns float and mask bool, all of one shape. Returns scalars (sum, count, metrics)
              in fp32 (fp64 for fp64 inputs), the count in int64.
    Units:    reward^2. Metrics are sums over the same tokens: `clip_fraction` (tokens whose gradient the clip
              removed), `squared_error` (of new_values, unclipped). Masked inputs are never read.
    Raises:   ValueError if shapes, dtypes or devices differ, or rows are not contiguous.
    """
    case = _Case(new_values, values, returns, mask, (value_clip_range,))
    fast = _checked("clipped_value_loss", case, ("new_values", "values", "returns"), impl)
    sums, slope = _run(_value if fast else _value_reference, case)
    clip_fraction, squared_error = sums[2:].to(slope.dtype)
    metrics = {"clip_fraction": clip_fraction, "squared_error": squared_error}
    return _Loss.apply(new_values, sums, slope), sums[1].long(), metrics


class _Case(NamedTuple):
    new: Tensor
    old: Tensor
    third: Tensor  # advantages or returns
    mask: Tensor
    bounds: tuple[float, ...]


_Sums = Callable[[_Case], tuple[Tensor, Tensor]]
"""From flat tensors to the sums (loss, count, metrics...) in fp64, and the loss's derivative of every token."""


def _checked(kernel: str, case: _Case, names: tuple[str, str, str], impl: Impl) -> bool:
    """Whether to use Triton, once the arguments fit."""
    mask = case.mask
    fast = use_triton(kernel, impl, mask)
    for name, tensor in zip(names, case[:3], strict=True):
        check(name, tensor, tuple(mask.shape), FLOATS[:3] if fast else FLOATS, mask)
    check("mask", mask, tuple(mask.shape), (torch.bool,), mask)
    return fast


def _run(sums_of: _Sums, case: _Case) -> tuple[Tensor, Tensor]:
    new, old, third, mask = (x.detach().reshape(-1) for x in case[:4])
    sums, slope = sums_of(_Case(new, old, third, mask, case.bounds))
    return sums, slope.view(case.mask.shape)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, new: Tensor, sums: Tensor, slope: Tensor) -> Tensor:
        ctx.dtype = new.dtype
        ctx.save_for_backward(slope)
        return sums[0].to(slope.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (d_loss * slope).to(ctx.dtype), None, None


# The definitions, in torch.


def _policy_reference(case: _Case) -> tuple[Tensor, Tensor]:
    new, old, advantages = _masked(case)
    low, high, dual = case.bounds
    log_ratio = new - old
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - low, 1 + high)
    loss = torch.maximum(unclipped, clipped)
    most = torch.where(advantages < 0, -dual * advantages, math.inf)
    removed = (clipped > unclipped) | (loss > most)
    loss = torch.where(loss > most, most, loss)
    slope = unclipped.masked_fill(removed | (log_ratio.abs() > MAX_LOG_RATIO), 0.0)
    return _sums(case.mask, loss, removed, k3(log_ratio), ratio), slope


def _value_reference(case: _Case) -> tuple[Tensor, Tensor]:
    new, old, target = _masked(case)
    (clip_range,) = case.bounds
    # Bounds, not `old + clamp(new - old)`: rounding would make tokens inside the range look clipped.
    moved = new.clamp(old - clip_range, old + clip_range)
    unclipped, clipped = (new - target) ** 2, (moved - target) ** 2
    removed = clipped > unclipped
    loss = 0.5 * torch.maximum(unclipped, clipped)
    return _sums(case.mask, loss, removed, unclipped), (new - target).masked_fill(removed, 0.0)


def k3(log_ratio: Tensor) -> Tensor:
    """ratio - 1 - log_ratio, never negative. Elementwise, nats; log_ratio is clamped at MAX_LOG_RATIO from above."""
    y = log_ratio.clamp(max=MAX_LOG_RATIO)
    # expm1(y) - y cancels near 0 (a third of the digits at 1e-3). The series is good to 1e-8 below 0.1, and is
    # evaluated on a clamped y, because the branch that `where` drops still sends inf * 0 = NaN into the gradient.
    small = y.clamp(-0.1, 0.1)
    series = 0.5 * small**2 * (1 + small / 3 * (1 + small / 4 * (1 + small / 5 * (1 + small / 6))))
    return torch.where(y.abs() < 0.1, series, torch.expm1(y) - y)


def _masked(case: _Case) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros where masked, before exp and square: a masked token may overflow, and inf * 0 is NaN."""
    inputs = case.new, case.old, case.third
    dtype = torch.float64 if any(accumulation_dtype(x) == torch.float64 for x in inputs) else torch.float32
    new, old, third = (torch.where(case.mask, x.to(dtype), 0.0) for x in inputs)
    return new, old, third


def _sums(mask: Tensor, loss: Tensor, *metrics: Tensor) -> Tensor:
    each = [torch.where(mask, x, 0.0).sum(dtype=torch.float64) for x in (loss, mask, *metrics)]
    return torch.stack(each)


# Triton.


@jit
def _add_up(sums_ptr, row, x):
    tl.store(sums_ptr + row * tl.num_programs(0) + tl.program_id(0), tl.sum(x, 0).to(tl.float64))


@jit
def _policy_kernel(
    new_ptr, old_ptr, third_ptr, mask_ptr, slope_ptr, sums_ptr, count, low, high, dual, BLOCK: constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = tl.load(mask_ptr + at, mask=at < count, other=0) != 0
    new = tl.load(new_ptr + at, mask=live, other=0.0).to(tl.float32)
    old = tl.load(old_ptr + at, mask=live, other=0.0).to(tl.float32)
    advantage = tl.load(third_ptr + at, mask=live, other=0.0).to(tl.float32)
    log_ratio = new - old
    # `where`, not maximum and minimum: those would hide a NaN.
    y = tl.where(log_ratio > 20.0, 20.0, log_ratio)
    ratio = tl.exp(tl.where(y < -20.0, -20.0, y))
    unclipped = -advantage * ratio
    clipped = -advantage * tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    loss = tl.maximum(unclipped, clipped, propagate_nan=tl.PropagateNan.ALL)
    most = tl.where(advantage < 0, -dual * advantage, float("inf"))
    removed = (clipped > unclipped) | (loss > most)
    slope = tl.where(removed | (tl.abs(log_ratio) > 20.0), 0.0, unclipped)
    tl.store(slope_ptr + at, slope, mask=at < count)
    # There is no expm1: the series goes further up than in torch, and is good to 1e-8 below 0.5.
    s = tl.where(tl.abs(y) < 0.5, y, 0.0)
    tail = 1 + s / 7 * (1 + s / 8 * (1 + s / 9 * (1 + s / 10)))
    series = 0.5 * s * s * (1 + s / 3 * (1 + s / 4 * (1 + s / 5 * (1 + s / 6 * tail))))
    kl = tl.where(tl.abs(y) < 0.5, series, tl.exp(y) - 1 - y)
    _add_up(sums_ptr, 0, tl.where(loss > most, most, loss))
    _add_up(sums_ptr, 1, live.to(tl.float32))
    _add_up(sums_ptr, 2, (live & removed).to(tl.float32))
    _add_up(sums_ptr, 3, kl)
    _add_up(sums_ptr, 4, tl.where(live, ratio, 0.0))


@jit
def _value_kernel(new_ptr, old_ptr, third_ptr, mask_ptr, slope_ptr, sums_ptr, count, clip_range, BLOCK: constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = tl.load(mask_ptr + at, mask=at < count, other=0) != 0
    new = tl.load(new_ptr + at, mask=live, other=0.0).to(tl.float32)
    old = tl.load(old_ptr + at, mask=live, other=0.0).to(tl.float32)
    target = tl.load(third_ptr + at, mask=live, other=0.0).to(tl.float32)
    low, high = old - clip_range, old + clip_range
    moved = tl.where((new >= low) & (new <= high), new, tl.where(new > high, high, low))  # NaN bounds count
    error = new - target
    unclipped, clipped = error * error, (moved - target) * (moved - target)
    removed = clipped > unclipped
    tl.store(slope_ptr + at, tl.where(removed, 0.0, error), mask=at < count)
    _add_up(sums_ptr, 0, 0.5 * tl.maximum(unclipped, clipped, propagate_nan=tl.PropagateNan.ALL))
    _add_up(sums_ptr, 1, live.to(tl.float32))
    _add_up(sums_ptr, 2, (live & removed).to(tl.float32))
    _add_up(sums_ptr, 3, unclipped)


def _policy(case: _Case) -> tuple[Tensor, Tensor]:
    low, high, dual = case.bounds
    return _launch(_policy_kernel, case, 5, 1 - low, 1 + high, dual)


def _value(case: _Case) -> tuple[Tensor, Tensor]:
    return _launch(_value_kernel, case, 4, *case.bounds)


def _launch(kernel: Any, case: _Case, sums: int, *numbers: float) -> tuple[Tensor, Tensor]:
    count = len(case.mask)
    programs = triton.cdiv(count, BLOCK)
    slope = case.new.new_empty(count, dtype=torch.float32)
    partial = case.new.new_empty(sums, programs, dtype=torch.float64)
    if programs:
        tensors = (case.new, case.old, case.third, case.mask.view(torch.uint8), slope, partial)
        kernel[(programs,)](*tensors, count, *numbers, BLOCK=BLOCK, num_warps=WARPS)
    return partial.sum(1), slope


def compile_cases() -> list[CompileCase]:
    """Both losses of fp32 tokens."""
    tensors = {f"{name}_ptr": "*fp32" for name in ("new", "old", "third", "slope")}
    tensors |= {"mask_ptr": "*u8", "sums_ptr": "*fp64", "count": "i32"}
    kernels = {_policy_kernel: ("low", "high", "dual"), _value_kernel: ("clip_range",)}
    return [
        CompileCase(
            kernel, "fp32", tensors | dict.fromkeys(numbers, "fp32"), {"BLOCK": BLOCK}, ("count",), {"num_warps": WARPS}
        )
        for kernel, numbers in kernels.items()
    ]
