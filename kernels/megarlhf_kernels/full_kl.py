"""Exact KL(p || q) of every token, from policy and reference logits whose vocabulary may be split over ranks.

    KL = sum p (log p - log q)      p = softmax(logits / temperature)      q = softmax(ref_logits / ref_temperature)

With z the scaled logits less their maximum, total = sum e^z and gap = sum e^{z_p} (z_p - z_q) this is

    KL = gap / total_p + log(total_q / total_p)

    dKL / dz_p = p (log p - log q - KL)      dKL / dz_q = q - p

Memory:   5 numbers a token. Forward is one online pass over both logits, and backward, which recomputes from them,
          writes each wanted gradient once. No softmax is kept, and no copy of the logits.
Source:   the online softmax of Milakov and Gimelshein 2018, of two distributions at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarlhf_kernels._checks import FLOATS, check, check_positive
from megarlhf_kernels._shards import NO_LOGIT, Shard, accumulation_dtype, gather_shards, live_columns
from megarlhf_kernels._triton import constexpr, jit, tl, triton
from megarlhf_kernels.aot import CompileCase
from megarlhf_kernels.dispatch import Impl, use_triton


def definition(logits: Tensor, ref_logits: Tensor, *, temperature: float = 1.0, ref_temperature: float = 1.0) -> Tensor:
    """What `full_kl` computes, for a whole vocabulary on one rank, as one would write it down."""
    log_p = torch.log_softmax(logits / temperature, dim=1)
    log_q = torch.log_softmax(ref_logits / ref_temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def full_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    impl: Impl = "auto",
    **shard: Unpack[Shard],
) -> Tensor:
    """KL(policy || reference) of every token over the whole vocabulary, differentiable in both logits.

    It is 0 where the two are the same, and never less. A column without probability under the policy counts nothing,
    whatever the reference says of it; one without probability under the reference alone costs up to 1e30, not inf.

    Shapes:   logits, ref_logits [N, V_local], one float dtype: columns vocab_start.. of the vocabulary, those from
              `vocab_size` on being padding. Returns [N] in fp32 (fp64 for fp64 logits).
    Units:    nats. `ref_temperature` is `temperature` if not given.
    Ranks:    collective over `group`, whose ranks hold the other columns. One all-gather of 5 floats a token, merged in
              rank order: the result is bitwise the same on all of them. Backward is local: each rank needs the same
              upstream gradient and returns that of its own columns.
    Raises:   ValueError if shapes, dtypes or devices differ or a temperature is not positive.
    """
    fast = use_triton("full_kl", impl, logits)
    ref_temperature = temperature if ref_temperature is None else ref_temperature
    check("logits", logits, (None, None), FLOATS[:3] if fast else FLOATS, logits)
    check("ref_logits", ref_logits, tuple(logits.shape), (logits.dtype,), logits)
    check_positive("temperature", temperature)
    check_positive("ref_temperature", ref_temperature)
    columns = live_columns(logits.shape[1], shard)
    plan = _Plan(columns, 1.0 / temperature, 1.0 / ref_temperature, shard.get("group"), fast)
    return _FullKL.apply(logits, ref_logits, plan)


@dataclass(frozen=True)
class _Plan:
    columns: int
    scale: float
    ref_scale: float
    group: dist.ProcessGroup | None
    fast: bool


class _FullKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, plan: _Plan) -> Tensor:
        statistics = torch.empty(5, logits.shape[0], dtype=accumulation_dtype(logits), device=logits.device)
        live = logits[:, : plan.columns], ref_logits[:, : plan.columns]
        (_launch_statistics if plan.fast else _torch_statistics)(*live, plan, statistics)
        top, total, ref_top, ref_total, gap = _merged(gather_shards(statistics, plan.group))
        # The ratio of totals is between 1 / V and V, and its log is more exact than the difference of two. Rounding
        # may pass 0 by an ulp.
        kl = (gap / total + (ref_total / total).log()).clamp(min=0.0)
        ctx.plan = plan
        ctx.save_for_backward(logits, ref_logits, top, total, ref_top, ref_total, kl)
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_kl: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        plan: _Plan = ctx.plan
        logits, ref_logits, top, total, ref_top, ref_total, kl = ctx.saved_tensors
        offset = (ref_total / total).log() - kl
        weight, up, down = plan.scale * d_kl / total, plan.ref_scale * d_kl / ref_total, plan.ref_scale * d_kl / total
        terms = torch.stack([top, ref_top, offset, weight, up, down])
        wanted = (
            torch.empty_like(x) if needed else None
            for x, needed in zip((logits, ref_logits), ctx.needs_input_grad[:2], strict=True)
        )
        d_logits, d_ref = wanted
        (_launch_gradients if plan.fast else _torch_gradients)(logits, ref_logits, terms, plan, d_logits, d_ref)
        return d_logits, d_ref, None


# Statistics [5, N] of one shard of scaled logits z and z' are (max z, sum e^(z - max), the same of z', gap). Backward's
# terms [6, N] are (top, ref_top, offset, weight, up, down), with which, z and z' now being less top and ref_top,
#
#     dlogits = weight e^z (z - z' + offset)          dref = up e^z' - down e^z


def _merged(shards: Tensor) -> list[Tensor]:
    """Statistics [R, 5, N] of all shards, in rank order, as those of one."""
    tops, totals, ref_tops, ref_totals, gaps = shards.unbind(1)
    top, ref_top = tops.amax(0), ref_tops.amax(0)
    down, ref_down = tops - top, ref_tops - ref_top  # <= 0
    weight = down.exp()
    # A shard of padding has weight 0 and total 0, so its -1e30 stays out.
    gap = (weight * (gaps + (down - ref_down) * totals)).sum(0)
    return [top, (weight * totals).sum(0), ref_top, (ref_down.exp() * ref_totals).sum(0), gap]


def _torch_statistics(logits: Tensor, ref_logits: Tensor, plan: _Plan, out: Tensor) -> None:
    out.zero_()
    top, total, ref_top, ref_total, gap = out
    if not plan.columns:
        top.fill_(NO_LOGIT)
        ref_top.fill_(NO_LOGIT)
        return
    ranges, work = _ranges(logits, out.dtype)
    for rows in ranges:
        z, ref_z, p = work[:, : rows.stop - rows.start]
        top[rows] = plan.scale * logits[rows].amax(1).to(top.dtype).clamp(min=NO_LOGIT)
        ref_top[rows] = plan.ref_scale * ref_logits[rows].amax(1).to(top.dtype).clamp(min=NO_LOGIT)
        _shifted(logits[rows], top[rows], plan.scale, out=z)
        _shifted(ref_logits[rows], ref_top[rows], plan.ref_scale, out=ref_z)
        torch.exp(z, out=p)
        torch.sum(p, 1, out=total[rows])
        torch.sum(p.mul_(z.sub_(ref_z)), 1, out=gap[rows])
        torch.sum(ref_z.exp_(), 1, out=ref_total[rows])


def _torch_gradients(
    logits: Tensor, ref_logits: Tensor, terms: Tensor, plan: _Plan, d_logits: Tensor | None, d_ref: Tensor | None
) -> None:
    for gradient in (d_logits, d_ref):
        if gradient is not None:
            gradient[:, plan.columns :] = 0.0
    if not plan.columns:
        return
    logits, ref_logits = logits[:, : plan.columns], ref_logits[:, : plan.columns]
    ranges, work = _ranges(logits, terms.dtype)
    for rows in ranges:
        z, ref_z, p = work[:, : rows.stop - rows.start]
        top, ref_top, offset, weight, up, down = terms[:, rows, None]
        _shifted(logits[rows], top[:, 0], plan.scale, out=z)
        _shifted(ref_logits[rows], ref_top[:, 0], plan.ref_scale, out=ref_z)
        torch.exp(z, out=p)
        if d_logits is not None:
            d_logits[rows, : plan.columns] = z.sub_(ref_z).add_(offset).mul_(p).mul_(weight)
        if d_ref is not None:
            d_ref[rows, : plan.columns] = ref_z.exp_().mul_(up).sub_(p.mul_(down))


def _shifted(logits: Tensor, top: Tensor, scale: float, *, out: Tensor) -> None:
    """out = scale * logits - top in the precision of `top`; finite, for 0 * inf is NaN."""
    torch.add(-top[:, None], logits, alpha=scale, out=out).clamp_(min=NO_LOGIT)


def _ranges(logits: Tensor, dtype: torch.dtype) -> tuple[list[slice], Tensor]:
    """Rows to work through at a time, so few that a CPU's cache holds them; and workspace [3, rows, V] for those."""
    count, width = logits.shape
    size = max(1, min(count, (1 << 18 if logits.is_cpu else 1 << 26) // width))
    work = torch.empty(3, size, width, dtype=dtype, device=logits.device)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)], work


WARPS = 8


def _tile(columns: int) -> int:
    """Columns that a program works on at once."""
    return min(2048, triton.next_power_of_2(max(columns, 1)))


@jit
def _finite(z, live):
    """-1e30 where there is no column or its logit is -inf; a NaN stays one."""
    return tl.where(live & ((z >= -1e30) | (z != z)), z, -1e30)


@jit
def _statistics_kernel(
    logits, ref_logits, out, stride, ref_stride, out_stride, columns, scale, ref_scale, BLOCK: constexpr
):
    """One row a program: two online softmaxes whose running maxima are shared by all lanes."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    top = -1e30
    ref_top = -1e30
    total = tl.zeros((BLOCK,), tl.float32)
    ref_total = tl.zeros((BLOCK,), tl.float32)
    gap = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        live = start + lane < columns
        z = tl.load(logits + row * stride + start + lane, mask=live, other=0.0).to(tl.float32) * scale
        ref_z = tl.load(ref_logits + row * ref_stride + start + lane, mask=live, other=0.0).to(tl.float32) * ref_scale
        z, ref_z = _finite(z, live), _finite(ref_z, live)
        higher = tl.maximum(top, tl.max(z, 0))
        ref_higher = tl.maximum(ref_top, tl.max(ref_z, 0))
        down, ref_down = top - higher, ref_top - ref_higher
        p = tl.where(live, tl.exp(z - higher), 0.0)
        q = tl.where(live, tl.exp(ref_z - ref_higher), 0.0)
        kept = tl.exp(down)
        gap = kept * (gap + (down - ref_down) * total) + p * ((z - higher) - (ref_z - ref_higher))
        total = kept * total + p
        ref_total = tl.exp(ref_down) * ref_total + q
        top, ref_top = higher, ref_higher
    tl.store(out + row, top)
    tl.store(out + out_stride + row, tl.sum(total, 0))
    tl.store(out + 2 * out_stride + row, ref_top)
    tl.store(out + 3 * out_stride + row, tl.sum(ref_total, 0))
    tl.store(out + 4 * out_stride + row, tl.sum(gap, 0))


@jit
def _gradient_kernel(
    logits,
    ref_logits,
    terms,
    d_logits,
    d_ref,
    stride,
    ref_stride,
    terms_stride,
    d_stride,
    d_ref_stride,
    columns,
    width,
    scale,
    ref_scale,
    BLOCK: constexpr,
    WANTED: constexpr,
    REF_WANTED: constexpr,
):
    """One tile of one row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < columns
    z = tl.load(logits + row * stride + column, mask=live, other=0.0).to(tl.float32) * scale
    z = _finite(z - tl.load(terms + row), live)
    ref_z = tl.load(ref_logits + row * ref_stride + column, mask=live, other=0.0).to(tl.float32) * ref_scale
    ref_z = _finite(ref_z - tl.load(terms + terms_stride + row), live)
    p = tl.exp(z)
    if WANTED:
        offset = tl.load(terms + 2 * terms_stride + row)
        weight = tl.load(terms + 3 * terms_stride + row)
        gradient = tl.where(live, weight * p * (z - ref_z + offset), 0.0)
        tl.store(d_logits + row * d_stride + column, gradient.to(d_logits.dtype.element_ty), mask=column < width)
    if REF_WANTED:
        up = tl.load(terms + 4 * terms_stride + row)
        down = tl.load(terms + 5 * terms_stride + row)
        gradient = tl.where(live, up * tl.exp(ref_z) - down * p, 0.0)
        tl.store(d_ref + row * d_ref_stride + column, gradient.to(d_ref.dtype.element_ty), mask=column < width)


def _launch_statistics(logits: Tensor, ref_logits: Tensor, plan: _Plan, out: Tensor) -> None:
    count, columns = logits.shape
    if count:
        strides = logits.stride(0), ref_logits.stride(0), out.stride(0)
        numbers = columns, plan.scale, plan.ref_scale
        _statistics_kernel[(count,)](logits, ref_logits, out, *strides, *numbers, BLOCK=_tile(columns), num_warps=WARPS)


def _launch_gradients(
    logits: Tensor, ref_logits: Tensor, terms: Tensor, plan: _Plan, d_logits: Tensor | None, d_ref: Tensor | None
) -> None:
    count, width = logits.shape
    if count and width:
        first, second = logits if d_logits is None else d_logits, ref_logits if d_ref is None else d_ref
        tensors = (logits, ref_logits, terms, first, second)
        numbers = (plan.columns, width, plan.scale, plan.ref_scale)
        _gradient_kernel[(count, triton.cdiv(width, _tile(width)))](
            *tensors,
            *(x.stride(0) for x in tensors),
            *numbers,
            BLOCK=_tile(width),
            WANTED=d_logits is not None,
            REF_WANTED=d_ref is not None,
            num_warps=WARPS,
        )


def compile_cases() -> list[CompileCase]:
    """Llama 3's 128256 columns on 1, 4 and 8 tensor ranks, padded or not, are one case; a number not of 16s another."""
    return [case for kind, columns in (("bf16", 128_256), ("fp32", 128_257)) for case in _cases(kind, columns)]


def _cases(kind: str, columns: int) -> list[CompileCase]:
    variant, options, block = f"{kind} V {columns}", {"num_warps": WARPS}, {"BLOCK": _tile(columns)}
    both = {"logits": f"*{kind}", "ref_logits": f"*{kind}", "scale": "fp32", "ref_scale": "fp32", "columns": "i32"}
    strides = dict.fromkeys(("stride", "ref_stride"), "i32")
    forward = both | strides | {"out": "*fp32", "out_stride": "i32"}
    even = () if columns % 16 else ("stride", "ref_stride", "columns")
    cases = [CompileCase(_statistics_kernel, variant, forward, block, even, options)]
    gradients = {"terms": "*fp32", "d_logits": f"*{kind}", "d_ref": f"*{kind}", "width": "i32"}
    backward = both | strides | gradients | dict.fromkeys(("terms_stride", "d_stride", "d_ref_stride"), "i32")
    even = (*even, "d_stride", "d_ref_stride", "width") if even else ()
    for wanted in ((True, False), (False, True), (True, True)):
        constants = block | dict(zip(("WANTED", "REF_WANTED"), wanted, strict=True))
        cases.append(CompileCase(_gradient_kernel, f"{variant} {wanted}", backward, constants, even, options))
    return cases
