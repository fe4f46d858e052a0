"""Log-probabilities and entropy of tokens from logits whose vocabulary may be split over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

NO_LOGIT = -1e30
"""Stands for "no such column". Finite, because -inf * 0 is NaN."""


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """log p(label) and the entropy of p = softmax(logits / temperature), differentiable in `logits`.

    Keeps no copy of the logits and no softmax: forward works through them in chunks that stay in cache, and backward
    recomputes from them. A label outside the vocabulary gets log-prob -1e30 and no gradient, so a mask can drop it.

    Shapes:   logits [N, V_local], any float dtype: columns vocab_start.. of the vocabulary; labels [N] int64, global.
              Columns from `vocab_size` on are padding (None: there is none). Returns (logprobs [N], entropy [N]) in
              fp32 (fp64 for fp64 logits), or entropy [0] without `with_entropy`.
    Units:    nats.
    Ranks:    collective over `group`, whose ranks hold the other columns; None when this rank holds them all. One
              all-gather of 4 floats a token, merged in rank order: the result is bitwise the same on all of them.
              Backward is local: each rank needs the same upstream gradient and returns that of its own columns.
    Raises:   ValueError if shapes or dtypes do not fit or temperature is not positive.
    """
    if logits.ndim != 2 or not logits.is_floating_point() or labels.shape != logits.shape[:1]:
        got = f"{logits.dtype} {list(logits.shape)}, labels {list(labels.shape)}"
        raise ValueError(f"logits: got {got}; must be a float [N, V] with labels [N].")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}; must be positive, it divides the logits.")
    columns = logits.shape[1]
    if vocab_size is not None:
        columns = max(0, min(columns, vocab_size - vocab_start))
    local = labels - vocab_start
    return _TokenLogprobs.apply(logits, local, columns, 1.0 / temperature, group, with_entropy)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        columns: int,
        scale: float,
        group: dist.ProcessGroup | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        # Padding columns are cut off, which masks them in the max and the sums at once (backward: in the gradient).
        statistics = shard_statistics(logits[:, :columns], labels, scale=scale, with_entropy=with_entropy)
        top, total, spread, picked = _merge(_all_gather(statistics, group))
        log_total = total.log()
        # Entropy = lse - sum p z: in terms of z - top nothing large is subtracted. Rounding may pass 0 by an ulp.
        entropy = (log_total - spread / total).clamp(min=0.0) if with_entropy else total.new_empty(0)
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        ctx.columns, ctx.scale = columns, scale
        ctx.save_for_backward(logits, labels, top, total, entropy, picked > NO_LOGIT / 2)
        return picked - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        """dz = d_logprobs (1[label] - p) - d_entropy p (log p + H), as p (offset + slope z) and a term at the label."""
        logits, labels, top, total, entropy, found = ctx.saved_tensors
        d_logprobs = top.new_zeros(top.shape) if d_logprobs is None else torch.where(found, d_logprobs, 0.0)
        column, owned = _owned(labels, ctx.columns)
        at_label = torch.where(owned, ctx.scale * d_logprobs, 0.0)[:, None]
        slope = None if d_entropy is None else -ctx.scale * d_entropy / total
        offset = -ctx.scale * d_logprobs / total
        if slope is not None:
            offset = offset + slope * (entropy - total.log())
        gradient = torch.empty_like(logits)
        gradient[:, ctx.columns :] = 0.0
        live = gradient[:, : ctx.columns]
        chunks, work = _chunks(logits[:, : ctx.columns], buffers=2)
        for rows in chunks:
            # fp32 gradients are computed where they will lie; lower precisions are rounded once, at the end.
            p = live[rows] if live.dtype == top.dtype else work[0, : rows.stop - rows.start]
            z = p if slope is None else work[1, : rows.stop - rows.start]
            _shifted(logits[rows, : ctx.columns], top[rows], ctx.scale, out=z)
            if slope is None:
                z.exp_().mul_(offset[rows, None])
            else:
                torch.exp(z.clamp_(min=_FLOOR), out=p)
                p.mul_(z.mul_(slope[rows, None]).add_(offset[rows, None]))
            # In fp32, before the gradient is rounded to the logits' dtype: 1 - p cancels when the token was certain.
            p.scatter_add_(1, column[rows], at_label[rows])
            if live.dtype != p.dtype:
                live[rows] = p
        return gradient, None, None, None, None, None


_FLOOR = -1e4
"""z - top is raised to this where it multiplies e^(z - top): the product is 0 as it should be, also for z = -inf."""


def shard_statistics(logits: Tensor, labels: Tensor, *, scale: float, with_entropy: bool) -> Tensor:
    """What one vocabulary shard contributes: (top, total, spread, picked), with z = scale * logits.

        top = max z     total = sum e^(z - top)     spread = sum (z - top) e^(z - top)     picked = z[label] - top

    Shapes:   logits [N, V_local]; labels [N] int64, local: outside 0..V_local - 1 another shard has them and picked is
              NO_LOGIT. A shard without columns gives (NO_LOGIT, 0, 0, NO_LOGIT). Returns [4, N] fp32 (fp64 if logits).
    Units:    nats. spread is 0 without `with_entropy`.
    """
    count, width = logits.shape
    statistics = torch.zeros(4, count, dtype=_precision(logits), device=logits.device)
    top, total, spread, picked = statistics
    if not width:
        statistics[0::3] = NO_LOGIT
        return statistics
    column, owned = _owned(labels, width)
    chunks, work = _chunks(logits, buffers=2)
    for rows in chunks:
        z, p = work[:, : rows.stop - rows.start]
        top[rows] = scale * logits[rows].amax(1).to(top.dtype)
        _shifted(logits[rows], top[rows], scale, out=z)
        picked[rows] = z.gather(1, column[rows]).squeeze(1)
        if with_entropy:
            torch.exp(z.clamp_(min=_FLOOR), out=p)
            torch.sum(p, 1, out=total[rows])
            torch.sum(z.mul_(p), 1, out=spread[rows])
        else:
            torch.sum(z.exp_(), 1, out=total[rows])
    picked.masked_fill_(~owned, NO_LOGIT)
    return statistics


def _merge(shards: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics [R, 4, N] of all shards, in rank order, as those of one: four of [N]."""
    if shards.shape[0] == 1:
        top, total, spread, picked = shards[0]
        return top, total, spread, picked
    tops, totals, spreads, picks = shards.unbind(1)
    top = tops.amax(0)
    down = tops - top  # <= 0, and 0 on the shard that has the maximum
    weight = down.exp()
    # A shard of padding has weight 0 and total 0, so its -1e30 stays out: 0 * (0 + -1e30 * 0) = 0.
    return top, (totals * weight).sum(0), (weight * (spreads + down * totals)).sum(0), (picks + down).amax(0)


def _all_gather(statistics: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if group is None or dist.get_world_size(group) == 1 or not statistics.numel():
        return statistics[None]
    shards = [torch.empty_like(statistics) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, statistics, group=group)
    return torch.stack(shards)


def _owned(labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Each label's column, clamped into the shard ([N, 1], for gather and scatter), and whether it is really there."""
    return labels.clamp(0, max(width - 1, 0))[:, None], (labels >= 0) & (labels < width)


def _shifted(logits: Tensor, top: Tensor, scale: float, *, out: Tensor) -> None:
    """out = scale * logits - top in the precision of `top`, in one pass and without a copy of the logits."""
    torch.add(-top[:, None], logits, alpha=scale, out=out)


def _precision(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: Tensor, *, buffers: int) -> tuple[list[slice], Tensor]:
    """Row ranges to work through, and workspace [buffers, rows, V] for one of them.

    A range is of a size that a CPU's cache holds over several passes, or that fills an accelerator. The workspace is
    shared, because fresh memory for every range would cost more than the arithmetic.
    """
    count, width = logits.shape
    elements = 1 << 18 if logits.is_cpu else 1 << 26
    size = max(1, min(count, elements // max(width, 1)))
    work = torch.empty(buffers, size, width, dtype=_precision(logits), device=logits.device)
    return [slice(start, min(start + size, count)) for start in range(0, count if width else 0, size)], work
