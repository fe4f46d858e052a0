"""Log-probabilities and entropy of tokens from logits whose vocabulary may be split over ranks.

    logprob = z[label] - lse(z)     entropy = lse(z) - sum softmax(z) z     z = logits / temperature

Memory:   4 numbers a token. No softmax and no copy of the logits is kept: forward is one online pass over them, and
          backward, which recomputes from them, writes the gradient once, over the logits if asked.
Source:   the online softmax of Milakov and Gimelshein 2018, with a third sum for the entropy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarlhf_kernels._checks import FLOATS, check, check_positive
from megarlhf_kernels._shards import NO_LOGIT, Shard, accumulation_dtype, gather_shards, live_columns
from megarlhf_kernels._triton import constexpr, jit, tl, triton
from megarlhf_kernels.aot import CompileCase
from megarlhf_kernels.dispatch import Impl, use_triton


def definition(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """What `token_logprob` computes, for a whole vocabulary on one rank, as one would write it down."""
    logprobs = torch.log_softmax(logits / temperature, dim=1)
    return logprobs.gather(1, labels[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)


def token_logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    in_place: bool = False,
    impl: Impl = "auto",
    **shard: Unpack[Shard],
) -> tuple[Tensor, Tensor]:
    """log p(label) and the entropy of p = softmax(logits / temperature), differentiable in `logits`.

    A label outside the vocabulary gets log-prob -1e30 and no gradient, so a mask can drop it. With `in_place` the
    gradient is written over the logits, which nobody may need any more.

    Shapes:   logits [N, V_local], any float dtype: columns vocab_start.. of the vocabulary; labels [N] int64, global.
              Columns from `vocab_size` on are padding (None: there is none). Returns (logprobs [N], entropy [N]) in
              fp32 (fp64 for fp64 logits), or entropy [0] without `with_entropy`.
    Units:    nats.
    Ranks:    collective over `group`, whose ranks hold the other columns; None when this rank holds them all. One
              all-gather of 4 floats a token, merged in rank order: the result is bitwise the same on all of them.
              Backward is local: each rank needs the same upstream gradient and returns that of its own columns.
    Raises:   ValueError if shapes, dtypes or devices do not fit or temperature is not positive.
    """
    fast = use_triton("token_logprob", impl, logits)
    check("logits", logits, (None, None), FLOATS[:3] if fast else FLOATS, logits)
    check("labels", labels, (logits.shape[0],), (torch.int64,), logits)
    check_positive("temperature", temperature)
    columns = live_columns(logits.shape[1], shard)
    plan = _Plan(columns, 1.0 / temperature, shard.get("group"), with_entropy, in_place, fast)
    return _TokenLogprob.apply(logits, labels - shard.get("vocab_start", 0), plan)


@dataclass(frozen=True)
class _Plan:
    columns: int
    scale: float
    group: dist.ProcessGroup | None
    with_entropy: bool
    in_place: bool
    fast: bool


class Softmax(NamedTuple):
    """What is known of each token's distribution once all shards are merged: four of [N]."""

    top: Tensor
    """Largest z, in nats."""
    total: Tensor
    """sum e^(z - top)."""
    logprobs: Tensor
    entropy: Tensor
    """Nats; [0] when not asked for."""

    def rows(self, rows: slice) -> Softmax:
        """Those of some tokens."""
        return Softmax(*(part[rows] for part in self))


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        statistics = torch.empty(4, logits.shape[0], dtype=accumulation_dtype(logits), device=logits.device)
        live = logits[:, : plan.columns]
        shard_statistics(live, labels, scale=plan.scale, with_entropy=plan.with_entropy, fast=plan.fast, out=statistics)
        softmax = merged(gather_shards(statistics, plan.group), with_entropy=plan.with_entropy)
        if not plan.with_entropy:
            ctx.mark_non_differentiable(softmax.entropy)
        ctx.set_materialize_grads(False)
        ctx.plan = plan
        ctx.save_for_backward(logits, labels, *softmax)
        return softmax.logprobs, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        logits, labels, *rest = ctx.saved_tensors
        softmax = Softmax(*rest)
        out = logits if plan.in_place else torch.empty_like(logits)
        terms = gradient_terms(softmax, labels, d_logprobs, d_entropy, columns=plan.columns, scale=plan.scale)
        logits_gradient(
            logits,
            labels,
            terms,
            columns=plan.columns,
            scale=plan.scale,
            sloped=d_entropy is not None,
            fast=plan.fast,
            out=out,
        )
        return out, None, None


def merged(shards: Tensor, *, with_entropy: bool) -> Softmax:
    """Statistics [R, 4, N] of all shards, in rank order, as one distribution a token."""
    tops, totals, spreads, picks = shards.unbind(1)
    top = tops.amax(0)
    down = tops - top  # <= 0, and 0 on the shard that has the maximum
    weight = down.exp()
    # A shard of padding has weight 0 and total 0, so its -1e30 stays out: 0 * (0 + -1e30 * 0) = 0.
    total = (totals * weight).sum(0)
    log_total = total.log()
    logprobs = (picks + down).amax(0) - log_total
    if not with_entropy:
        return Softmax(top, total, logprobs, total.new_empty(0))
    # Entropy = lse - sum p z: in terms of z - top nothing large is subtracted. Rounding may pass 0 by an ulp.
    spread = (weight * (spreads + down * totals)).sum(0)
    return Softmax(top, total, logprobs, (log_total - spread / total).clamp(min=0.0))


def gradient_terms(
    softmax: Softmax,
    labels: Tensor,
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    *,
    columns: int,
    scale: float,
) -> Tensor:
    """[4, N]: (top, offset, slope, at_label), with which the gradient in the logits is

        dz = e^(z - top) (offset + slope (z - top)) + at_label 1[label]

    which is d_logprob (1[label] - p) - d_entropy p (log p + H) in fewer operations an element.
    """
    top, total, logprobs, entropy = softmax
    zeros = torch.zeros_like(top)
    # A label that no shard has must teach nothing.
    d_logprobs = zeros if d_logprobs is None else torch.where(logprobs > NO_LOGIT / 2, d_logprobs, 0.0)
    at_label = torch.where((labels >= 0) & (labels < columns), scale * d_logprobs, 0.0)
    slope = zeros if d_entropy is None else -scale * d_entropy / total
    offset = -scale * d_logprobs / total
    if d_entropy is not None:
        offset = offset + slope * (entropy - total.log())
    return torch.stack([top, offset, slope, at_label])


def shard_statistics(
    logits: Tensor, labels: Tensor, *, scale: float, with_entropy: bool, fast: bool, out: Tensor
) -> None:
    """What one vocabulary shard contributes: (top, total, spread, picked), with z = scale * logits.

        top = max z     total = sum e^(z - top)     spread = sum (z - top) e^(z - top)     picked = z[label] - top

    Shapes:   logits [N, V_local]; labels [N] int64, local: outside 0..V_local - 1 another shard has them and picked is
              NO_LOGIT. A shard without columns gives (NO_LOGIT, 0, 0, NO_LOGIT). out [4, N] fp32 (fp64 if logits).
    Units:    nats. spread is 0 without `with_entropy`.
    """
    count, columns = logits.shape
    if fast and count:
        tile = _tile(columns)
        _statistics_kernel[(count,)](
            *(logits, labels, out, logits.stride(0), out.stride(0), columns, scale, with_entropy),
            BLOCK=tile,
            num_warps=WARPS,
        )
    elif not fast:
        _torch_statistics(logits, labels, scale, with_entropy, out)


def logits_gradient(
    logits: Tensor,
    labels: Tensor,
    terms: Tensor,
    *,
    columns: int,
    scale: float,
    sloped: bool,
    fast: bool,
    out: Tensor,
) -> None:
    """Fill `out` [N, V_local], which may be `logits` itself, as `gradient_terms` says; padding gets 0.

    sloped: whether the entropy has a gradient; without one the slopes are 0.
    """
    count, width = logits.shape
    if fast and count and width:
        tile = _tile(width)
        _gradient_kernel[(count, triton.cdiv(width, tile))](
            *(logits, labels, terms, out, logits.stride(0), out.stride(0), terms.stride(0), columns, width, scale),
            BLOCK=tile,
            num_warps=WARPS,
        )
    elif not fast:
        _torch_gradient(logits, labels, terms, columns, scale, sloped=sloped, out=out)


WARPS = 8
CPU_ELEMENTS, GPU_ELEMENTS = 1 << 19, 1 << 26
"""Numbers in each of the two workspaces of the slow twins: what a CPU's cache holds, or fills an accelerator."""


def _tile(columns: int) -> int:
    """Columns that a program works on at once."""
    return min(4096, triton.next_power_of_2(max(columns, 1)))


@jit
def _statistics_kernel(
    logits,
    labels,
    out,
    logits_stride,
    out_stride,
    columns,
    scale,
    WITH_ENTROPY: constexpr,
    BLOCK: constexpr,
):
    """One row a program: an online softmax whose running maximum is shared by all lanes, one exp an element."""
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * logits_stride
    lane = tl.arange(0, BLOCK)
    top = -1e30
    total = tl.zeros((BLOCK,), tl.float32)
    spread = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        live = start + lane < columns
        z = tl.load(base + start + lane, mask=live, other=0.0).to(tl.float32) * scale
        z = tl.where(live & (z >= -1e30) | (z != z), z, -1e30)  # finite, and a NaN stays one
        higher = tl.maximum(top, tl.max(z, 0))
        down = top - higher
        kept = tl.exp(down)
        p = tl.where(live, tl.exp(z - higher), 0.0)
        if WITH_ENTROPY:
            spread = kept * (spread + down * total) + (z - higher) * p
        total = kept * total + p
        top = higher
    label = tl.load(labels + row)
    inside = (label >= 0) & (label < columns)
    picked = tl.load(base + label, mask=inside, other=0.0).to(tl.float32) * scale - top
    tl.store(out + row, top)
    tl.store(out + out_stride + row, tl.sum(total, 0))
    tl.store(out + 2 * out_stride + row, tl.sum(spread, 0))
    tl.store(out + 3 * out_stride + row, tl.where(inside, picked, -1e30))


@jit
def _gradient_kernel(
    logits,
    labels,
    terms,
    out,
    logits_stride,
    out_stride,
    terms_stride,
    columns,
    width,
    scale,
    BLOCK: constexpr,
):
    """One tile of one row a program. Every element is read before it is written, so `out` may be `logits`."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < columns
    top = tl.load(terms + row)
    offset = tl.load(terms + terms_stride + row)
    slope = tl.load(terms + 2 * terms_stride + row)
    at_label = tl.load(terms + 3 * terms_stride + row)
    label = tl.load(labels + row)
    z = tl.load(logits + row * logits_stride + column, mask=live, other=0.0).to(tl.float32) * scale - top
    z = tl.where((z < -1e4) | (column >= columns), -1e4, z)  # e^z is 0 there, as it should be for z = -inf too
    gradient = tl.exp(z) * (offset + slope * z)
    gradient = tl.where(column == label, gradient + at_label, gradient)
    gradient = tl.where(live, gradient, 0.0)
    tl.store(out + row * out_stride + column, gradient.to(out.dtype.element_ty), mask=column < width)


def compile_cases() -> list[CompileCase]:
    """Llama 3's 128256 columns on 1, 4 and 8 tensor ranks, padded or not, are one case; a number not of 16s another."""
    return [case for kind, columns in (("bf16", 128_256), ("fp32", 128_257)) for case in _cases(kind, columns)]


def _cases(kind: str, columns: int) -> list[CompileCase]:
    strides = ("logits_stride", "out_stride", "terms_stride")
    common = {"logits": f"*{kind}", "labels": "*i64", "scale": "fp32", "columns": "i32"}
    forward = common | {"out": "*fp32"} | dict.fromkeys(strides[:2], "i32")
    backward = common | {"out": f"*{kind}", "terms": "*fp32", "width": "i32"} | dict.fromkeys(strides, "i32")
    even = () if columns % 16 else ("logits_stride", "columns")
    constants, options, variant = {"BLOCK": _tile(columns)}, {"num_warps": WARPS}, f"{kind} V {columns}"
    cases = []
    for entropy in (True, False):
        name = variant + (" entropy" if entropy else "")
        cases.append(
            CompileCase(_statistics_kernel, name, forward, {"WITH_ENTROPY": entropy, **constants}, even, options)
        )
    even = (*even, "out_stride", "width") if even else ()
    return [*cases, CompileCase(_gradient_kernel, variant, backward, constants, even, options)]


_FLOOR = -1e4
"""z - top is raised to this where it multiplies e^(z - top): the product is 0 as it should be, also for z = -inf."""


def _torch_statistics(logits: Tensor, labels: Tensor, scale: float, with_entropy: bool, out: Tensor) -> None:
    width = logits.shape[1]
    out.zero_()
    top, total, spread, picked = out
    if not width:
        out[0::3] = NO_LOGIT
        return
    column = labels.clamp(0, width - 1)[:, None]
    chunks, work = _chunks(logits, out.dtype, buffers=2)
    for rows in chunks:
        p, z = work[:, : rows.stop - rows.start]
        z = _scaled(logits[rows], scale, out=z)
        torch.amax(z, 1, out=top[rows])
        torch.sub(z.gather(1, column[rows]).squeeze(1), top[rows], out=picked[rows])
        # Over cached rows torch's softmax costs less than shift and exp. The sum that it divides by is not accurate
        # enough (4e-6 of 16,000 columns), but the same everywhere, and cancels against the largest p = 1 / that sum.
        torch.softmax(z, 1, out=p)
        largest = p.amax(1)
        torch.div(p.sum(1), largest, out=total[rows])
        if with_entropy:
            shifted = torch.sub(z, top[rows, None], out=work[1, : len(p)])
            torch.div(p.mul_(shifted.clamp_(min=_FLOOR)).sum(1), largest, out=spread[rows])
    picked.masked_fill_((labels < 0) | (labels >= width), NO_LOGIT)


def _torch_gradient(
    logits: Tensor, labels: Tensor, terms: Tensor, columns: int, scale: float, *, sloped: bool, out: Tensor
) -> None:
    top, offset, slope, at_label = terms
    out[:, columns:] = 0.0
    if not columns:
        return
    column = labels.clamp(0, columns - 1)[:, None]
    live = out[:, :columns]
    direct = live.dtype == terms.dtype
    chunks, work = _chunks(logits[:, :columns], terms.dtype, buffers=2)
    for rows in chunks:
        # fp32 gradients are computed where they will lie, be it over the logits; others are rounded once, at the end.
        p = live[rows] if direct else work[0, : rows.stop - rows.start]
        z = work[1, : rows.stop - rows.start] if sloped else p
        torch.sub(_scaled(logits[rows, :columns], scale, out=z), top[rows, None], out=z)
        if sloped:
            torch.exp(z.clamp_(min=_FLOOR), out=p)
            p.mul_(z.mul_(slope[rows, None]).add_(offset[rows, None]))
        else:
            z.exp_().mul_(offset[rows, None])
        # In fp32, before the gradient is rounded to the logits' dtype: 1 - p cancels when the token was certain.
        p.scatter_add_(1, column[rows], at_label[rows, None])
        if not direct:
            live[rows] = p


def _scaled(logits: Tensor, scale: float, *, out: Tensor) -> Tensor:
    """scale * logits, rounded to the precision of `out`: in `out`, or the logits themselves where nothing is to do."""
    if logits.dtype != out.dtype:
        return out.copy_(logits).mul_(scale)
    return logits if scale == 1.0 else torch.mul(logits, scale, out=out)


def _chunks(logits: Tensor, dtype: torch.dtype, *, buffers: int) -> tuple[list[slice], Tensor]:
    """Row ranges to work through, and workspace [buffers, rows, V] for one of them.

    A range is of a size that a CPU's cache holds over several passes, or that fills an accelerator. The workspace is
    shared, because fresh memory for every range would cost more than the arithmetic.
    """
    count, width = logits.shape
    elements = CPU_ELEMENTS if logits.is_cpu else GPU_ELEMENTS
    size = max(1, min(count, elements // max(width, 1)))
    work = torch.empty(buffers, size, width, dtype=dtype, device=logits.device)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)], work
