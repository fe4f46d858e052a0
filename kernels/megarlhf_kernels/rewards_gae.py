"""Token-level rewards, advantages, returns and the moments for whitening, in one launch.

Over the response tokens of a sequence, with t + 1 the next of them (masked tokens carry A and V across unchanged):

    r_t = -kl_coef (logprob_t - ref_logprob_t)  [+ earlier_t]  [+ score at the last one]
    delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      return_t = A_t + V_t

After the last one A is 0, and V is 0 if the sequence terminated, else the value at that token (it was cut: bootstrap).

Memory:   the outputs; every input is read once. The reference on packed sequences or on masks with gaps works on
          [S, L] copies, with L the most response tokens of a sequence.
Source:   Schulman et al. 2016, eq. 11-16; Huang et al. 2024 for the KL penalty. Differs: masked gaps. The scan
          multiplies decays and never divides by them, so gamma * lam = 1 and 1e-8 are both exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megarlhf_kernels._checks import FLOATS, check
from megarlhf_kernels._scan import reverse_scan
from megarlhf_kernels._triton import constexpr, jit, tl, triton
from megarlhf_kernels.aot import CompileCase
from megarlhf_kernels.dispatch import Impl, use_triton


class Estimate(NamedTuple):
    """What `rewards_gae` returns: three of the inputs' shape, exactly 0 where masked, and `moments` [S, 3] fp64."""

    token_level_rewards: Tensor
    advantages: Tensor
    returns: Tensor
    moments: Tensor


class Shaping(NamedTuple):
    """What turns log-probs into rewards: reference log-probs (as the log-probs), a score a sequence [S], kl_coef."""

    ref_logprobs: Tensor
    scores: Tensor
    kl_coef: float
    earlier: Tensor | None = None
    """What is earned at every token besides, as the log-probs are shaped; None where nothing is."""


class Discount(NamedTuple):
    """gamma weighs the next value, gamma * lam the next advantage."""

    gamma: float
    lam: float


@torch.no_grad()
def rewards_gae(
    logprobs: Tensor,
    values: Tensor,
    mask: Tensor,
    terminated: Tensor,
    shaping: Shaping,
    discount: Discount,
    *,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> Estimate:
    """KL penalty, score and GAE of every sequence, without gradient; padded, or packed with `cu_seqlens`.

    Shapes:   logprobs, values float, mask bool: [B, T], or [N] with the sequences one after another and cu_seqlens
              [S + 1] int32 or int64 (0, where each ends, up to N). terminated [S] bool, with S = B if padded.
              Outputs in fp32 (fp64 if an input is); moments: `mean_and_variance` of all ranks' rows joined.
    Units:    reward; log-probs in nats. Masked inputs are never read; a sequence that is all masked loses its score.
    Raises:   ValueError if a shape, dtype or device does not fit, a row is not contiguous, or cu_seqlens do not rise
              from 0 to N (looked at on a CPU only: on a GPU that would wait for it).
    """
    fast = use_triton("rewards_gae", impl, values)
    batch = _checked(logprobs, values, mask, terminated, shaping, cu_seqlens, fast)
    estimate = (_launch if fast else _reference)(batch, discount)
    rewards, advantages, returns = (x.view(values.shape) for x in estimate[:3])
    return Estimate(rewards, advantages, returns, estimate.moments)


@torch.no_grad()
def gae(
    token_level_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    terminated: Tensor,
    discount: Discount,
    *,
    cu_seqlens: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of rewards that are there already: everything else as in `rewards_gae`."""
    fast = use_triton("gae", impl, values)
    batch = _checked(token_level_rewards, values, mask, terminated, None, cu_seqlens, fast)
    estimate = (_launch if fast else _reference)(batch, discount)
    return estimate.advantages.view(values.shape), estimate.returns.view(values.shape)


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all sequences' advantages from their moments: both 0 without any token.

    A data-parallel caller gathers the rows of all ranks first; in rank order, so that all get bitwise the same.

    Shapes:   moments [S, 3] fp64: a row is a sequence's count, sum, and sum of squares about its own mean, so that
              nothing cancels when the mean is large against the spread. Returns two scalars in fp64.
    """
    count, total, centred = moments.unbind(1)
    everything = count.sum().clamp(min=1)
    mean = total.sum() / everything
    own = total / count.clamp(min=1)
    return mean, (centred + count * (own - mean) ** 2).sum() / everything


class _Batch(NamedTuple):
    """Checked arguments, flat. Sequence s is `cu_seqlens[s]..[s + 1]`, or the s-th row of `width` tokens without."""

    source: Tensor  # log-probs, or without shaping the rewards
    values: Tensor
    mask: Tensor
    terminated: Tensor
    shaping: Shaping | None
    cu_seqlens: Tensor | None
    width: int

    @property
    def precision(self) -> torch.dtype:
        given = [self.source, self.values, *(self.shaping or ())]
        doubled = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in given)
        return torch.float64 if doubled else torch.float32


def _checked(
    source: Tensor,
    values: Tensor,
    mask: Tensor,
    terminated: Tensor,
    shaping: Shaping | None,
    cu_seqlens: Tensor | None,
    fast: bool,
) -> _Batch:
    shape, floats = tuple(values.shape), FLOATS[:3] if fast else FLOATS
    if len(shape) != (2 if cu_seqlens is None else 1):
        raise ValueError(f"values: got shape {list(shape)}; must be [B, T], or [N] with cu_seqlens.")
    check("values", values, shape, floats, values)
    check("logprobs" if shaping else "token_level_rewards", source, shape, floats, values)
    check("mask", mask, shape, (torch.bool,), values)
    if cu_seqlens is not None:
        check("cu_seqlens", cu_seqlens, (None,), (torch.int32, torch.int64), values)
        _check_boundaries(cu_seqlens, shape[0])
    sequences = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    check("terminated", terminated, (sequences,), (torch.bool,), values)
    if shaping is not None:
        check("ref_logprobs", shaping.ref_logprobs, shape, floats, values)
        check("scores", shaping.scores, (sequences,), floats, values)
        earlier = shaping.earlier
        if earlier is not None:
            check("earlier", earlier, shape, floats, values)
            earlier = earlier.reshape(-1)
        shaping = shaping._replace(ref_logprobs=shaping.ref_logprobs.reshape(-1), earlier=earlier)
    source, values, mask = (x.reshape(-1) for x in (source, values, mask))
    return _Batch(source, values, mask, terminated, shaping, cu_seqlens, shape[1] if cu_seqlens is None else 0)


def _check_boundaries(cu_seqlens: Tensor, count: int) -> None:
    rises = len(cu_seqlens) > 0
    if rises and cu_seqlens.is_cpu:
        rises = cu_seqlens[0] == 0 and cu_seqlens[-1] == count and bool((cu_seqlens.diff() >= 0).all())
    if not rises:
        raise ValueError(f"cu_seqlens: {cu_seqlens.tolist()}; must rise from 0 to the {count} tokens.")


# The definition, in torch.


def _reference(batch: _Batch, discount: Discount) -> Estimate:
    sequences, count = len(batch.terminated), len(batch.values)
    outputs = batch.values.new_empty(3, count, dtype=batch.precision)
    moments = outputs.new_empty(sequences, 3, dtype=torch.float64)
    bounds = None if batch.cu_seqlens is None else batch.cu_seqlens.long()
    # Some sequences at a time, few enough for a CPU's cache. They are worked out where the outputs will lie: fresh
    # memory costs more than the arithmetic.
    step = max(1, sequences * _CHUNK // max(count, 1)) if outputs.is_cpu else max(1, sequences)
    for start in range(0, sequences, step):
        own = slice(start, min(start + step, sequences))
        if bounds is None:
            tokens = slice(own.start * batch.width, own.stop * batch.width)
            rows = _rows(batch, own, tokens, [x[tokens].view(own.stop - own.start, batch.width) for x in outputs])
            moments[own] = _of_rows(rows, discount) if _is_runs(rows.mask) else _closed_up(rows, None, discount)
        else:
            tokens = slice(*bounds[[own.start, own.stop]].tolist())
            rows = _rows(batch, own, tokens, [x[tokens] for x in outputs])
            moments[own] = _closed_up(rows, bounds[own.start : own.stop + 1].diff(), discount)
    rewards, advantages, returns = outputs
    return Estimate(rewards, advantages, returns, moments)


_CHUNK = 1 << 19
"""Tokens."""


class _Rows(NamedTuple):
    """Some sequences: [S, T], or flat if they are packed; `scores` are None if `rewards` have them already."""

    rewards: Tensor
    advantages: Tensor  # output alone
    values: Tensor  # becomes the returns
    mask: Tensor
    terminated: Tensor
    scores: Tensor | None


def _rows(batch: _Batch, own: slice, tokens: slice, outputs: Sequence[Tensor]) -> _Rows:
    """These sequences, copied into the outputs."""
    rewards, advantages, values = outputs
    shape, shaping = values.shape, batch.shaping
    values.copy_(batch.values[tokens].view(shape))
    rewards.copy_(batch.source[tokens].view(shape))
    if shaping is not None:
        rewards.sub_(shaping.ref_logprobs[tokens].view(shape)).mul_(-shaping.kl_coef)
        if shaping.earlier is not None:
            rewards.add_(shaping.earlier[tokens].view(shape))
    scores = None if shaping is None else shaping.scores[own].to(values.dtype)
    return _Rows(rewards, advantages, values, batch.mask[tokens].view(shape), batch.terminated[own], scores)


def _is_runs(mask: Tensor) -> bool:
    """Whether the True entries of each row are one run: it rises at most once."""
    if not mask.numel():
        return True
    rises = (mask[:, 1:] > mask[:, :-1]).view(torch.uint8).sum(1, dtype=torch.int32) + mask[:, 0]
    return bool((rises <= 1).all())


def _closed_up(rows: _Rows, lengths: Tensor | None, discount: Discount) -> Tensor:
    """`_of_rows` with response tokens moved next to each other, at the left of rows of their own, and back again.

    Shapes:   lengths [S], all of a sequence's tokens; None if `rows` are [S, T].
    """
    mask = rows.mask.view(-1)
    if lengths is None:
        count = rows.mask.sum(1)
    else:
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        count = before[torch.nn.functional.pad(lengths.cumsum(0), (1, 0))].diff()
    token = mask.nonzero().squeeze(1)
    place = torch.arange(int(count.max()), device=mask.device)
    closed = place < count[:, None]
    # Beyond a row's tokens are those of the next: any will do there, the mask drops them.
    nth = (place + (count.cumsum(0) - count)[:, None]).clamp_(max=max(len(token) - 1, 0)).view(-1)
    source = token.index_select(0, nth)
    rewards, values = (x.view(-1).index_select(0, source).view(closed.shape) for x in (rows.rewards, rows.values))
    dense = rows._replace(rewards=rewards, advantages=torch.empty_like(values), values=values, mask=closed)
    moments = _of_rows(dense, discount)
    cell = closed.view(-1).nonzero().squeeze(1)
    for x, whole in zip(dense[:3], rows[:3], strict=True):
        whole.zero_().view(-1).index_copy_(0, token, x.view(-1).index_select(0, cell))
    return moments


def _of_rows(rows: _Rows, discount: Discount) -> Tensor:
    """Works rows [S, T] out, in which response tokens are one run: t + 1 really is the next. Returns their moments."""
    rewards, advantages, values, mask, terminated, scores = rows
    # An integer copy of the mask selects bits: `where` costs a CPU eight times as much. NaN and inf disappear too.
    bits = mask.to(torch.int64 if values.dtype == torch.float64 else torch.int32).neg_()
    for x in (rewards, values):
        _keep(x, bits, out=x)
    count = bits.sum(1, dtype=bits.dtype).neg_()
    (row,) = count.nonzero(as_tuple=True)
    last = (bits & torch.arange(mask.shape[1], dtype=bits.dtype, device=bits.device)).amax(1)[row] if len(row) else row
    if scores is not None:
        rewards[row, last] += scores[row]
    deltas = rewards - values
    deltas[:, :-1].add_(values[:, 1:], alpha=discount.gamma)  # after the run the value is 0
    deltas[row, last] += torch.where(terminated[row], 0.0, discount.gamma * values[row, last])
    _keep(reverse_scan(deltas, discount.gamma * discount.lam), bits, out=advantages)
    values.add_(advantages)
    # Moments, about a mean that may be off by rounding: what is left over joins the sum, and leaves the squares.
    size = count.clamp(min=1)
    mean = advantages.sum(1) / size
    off = torch.sub(advantages, mean[:, None], out=deltas)
    _keep(off, bits, out=off)
    left = off.sum(1).double()
    centred = off.square_().sum(1).double() - left**2 / size
    return torch.stack([count.double(), count * mean.double() + left, centred], 1)


def _keep(x: Tensor, bits: Tensor, *, out: Tensor) -> None:
    """`x` where all bits are set, 0 where none is."""
    torch.bitwise_and(x.view(bits.dtype), bits, out=out.view(bits.dtype))


# Triton.


@jit
def _nearest(right, left):
    return tl.minimum(right, left)


@jit
def _compose(right_decay, right, left_decay, left):
    """The map x -> left + left_decay x after the map x -> right + right_decay x."""
    return left_decay * right_decay, left + left_decay * right


@jit
def _join(advantage, response, count, total, centred):
    """A block's moments about its own mean, as in torch, join those of the blocks done: Chan et al. 1979."""
    size = tl.sum(response.to(tl.int32), 0).to(tl.float64)
    mean = tl.sum(advantage, 0) / tl.maximum(size, 1.0).to(tl.float32)
    off = tl.where(response, advantage - mean, 0.0)
    left = tl.sum(off, 0).to(tl.float64)
    block_total = size * mean.to(tl.float64) + left
    apart = block_total / tl.maximum(size, 1.0) - total / tl.maximum(count, 1.0)
    centred += tl.sum(off * off, 0).to(tl.float64) - left * left / tl.maximum(size, 1.0)
    centred += apart * apart * (count * size / tl.maximum(count + size, 1.0))
    return count + size, total + block_total, centred


@jit
def _kernel(
    source_ptr,
    ref_ptr,
    earlier_ptr,
    scores_ptr,
    values_ptr,
    mask_ptr,
    terminated_ptr,
    cu_seqlens_ptr,
    rewards_ptr,
    advantages_ptr,
    returns_ptr,
    moments_ptr,
    width,
    kl_coef,
    gamma,
    decay,
    SHAPED: constexpr,
    EARLIER: constexpr,
    PACKED: constexpr,
    BLOCK: constexpr,
):
    """One sequence a program, from its end to its start in blocks; what enters a block comes from the one after it."""
    NONE = 2147483647
    sequence = tl.program_id(0).to(tl.int64)
    if PACKED:
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
    else:
        start = sequence * width
        length = width
    cut = tl.load(terminated_ptr + sequence) == 0
    next_token = NONE  # the first response token of the blocks done
    carry = tl.zeros([], tl.float32)  # its advantage
    count = tl.zeros([], tl.float64)
    total = tl.zeros([], tl.float64)
    centred = tl.zeros([], tl.float64)
    blocks = tl.cdiv(length, BLOCK)
    for done in range(blocks):
        # Lanes run backwards, so that a forward scan goes from the last token to the first.
        t = (blocks - done) * BLOCK - 1 - tl.arange(0, BLOCK)
        here = start + t
        response = tl.load(mask_ptr + here, mask=t < length, other=0) != 0
        follows = tl.load(mask_ptr + here + 1, mask=t + 1 < length, other=0) != 0
        after = tl.associative_scan(tl.where(follows, t + 1, NONE), 0, _nearest)
        after = tl.minimum(after, next_token)
        last = response & (after == NONE)
        value = tl.load(values_ptr + here, mask=response, other=0.0).to(tl.float32)
        next_value = tl.load(values_ptr + start + after, mask=response & (after != NONE), other=0.0).to(tl.float32)
        next_value = tl.where(last, tl.where(cut, value, 0.0), next_value)
        reward = tl.load(source_ptr + here, mask=response, other=0.0).to(tl.float32)
        if SHAPED:
            ref = tl.load(ref_ptr + here, mask=response, other=0.0).to(tl.float32)
            score = tl.load(scores_ptr + sequence).to(tl.float32)
            reward = (reward - ref) * -kl_coef
            if EARLIER:
                reward += tl.load(earlier_ptr + here, mask=response, other=0.0).to(tl.float32)
            reward = tl.where(last, reward + score, reward)
            reward = tl.where(response, reward, 0.0)  # not -0
            tl.store(rewards_ptr + here, reward, mask=t < length)
        delta = tl.where(response, reward + gamma * next_value - value, 0.0)
        weight, advantage = tl.associative_scan((tl.where(response, decay, 1.0).to(tl.float32), delta), 0, _compose)
        advantage = tl.where(response, advantage + weight * carry, 0.0)
        tl.store(advantages_ptr + here, advantage, mask=t < length)
        tl.store(returns_ptr + here, advantage + value, mask=t < length)
        first = tl.min(tl.where(response, t, NONE), 0)
        carry = tl.where(first == NONE, carry, tl.sum(tl.where(t == first, advantage, 0.0), 0))
        next_token = tl.minimum(next_token, first)
        if SHAPED:
            count, total, centred = _join(advantage, response, count, total, centred)
    if SHAPED:
        tl.store(moments_ptr + sequence * 3, count)
        tl.store(moments_ptr + sequence * 3 + 1, total)
        tl.store(moments_ptr + sequence * 3 + 2, centred)


def _launch(batch: _Batch, discount: Discount) -> Estimate:
    shaped, sequences = batch.shaping is not None, len(batch.terminated)
    outputs = batch.values.new_empty(3 if shaped else 2, len(batch.values), dtype=torch.float32)
    rewards, advantages, returns = outputs if shaped else (batch.source, *outputs)
    moments = outputs.new_empty(sequences if shaped else 0, 3, dtype=torch.float64)
    if sequences:
        shaping = batch.shaping or Shaping(batch.source, batch.source, 0.0)
        earlier = batch.source if shaping.earlier is None else shaping.earlier
        inputs = (batch.source, shaping.ref_logprobs, earlier, shaping.scores, batch.values)
        bounds = batch.terminated if batch.cu_seqlens is None else batch.cu_seqlens
        masks = (batch.mask.view(torch.uint8), batch.terminated.view(torch.uint8), bounds)
        numbers = (batch.width, shaping.kl_coef, discount.gamma, discount.gamma * discount.lam)
        # Packed lengths are on the device: blocks are of the average one.
        options = _options(batch.width or len(batch.values) // sequences)
        layout = {"SHAPED": shaped, "EARLIER": shaping.earlier is not None, "PACKED": batch.cu_seqlens is not None}
        _kernel[(sequences,)](*inputs, *masks, rewards, advantages, returns, moments, *numbers, **layout, **options)
    return Estimate(rewards, advantages, returns, moments)


def _options(length: int) -> dict[str, int]:
    """A whole sequence at once where it fits, 8 tokens a thread."""
    block = min(4096, max(32, triton.next_power_of_2(length)))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}


def compile_cases() -> list[CompileCase]:
    """Rows of 4096 tokens, padded and packed; with shaping, with rewards at every token too, and without."""
    inputs = {f"{name}_ptr": "*fp32" for name in ("source", "ref", "earlier", "scores", "values")}
    masks = {"mask_ptr": "*u8", "terminated_ptr": "*u8", "cu_seqlens_ptr": "*i64"}
    outputs = {f"{name}_ptr": "*fp32" for name in ("rewards", "advantages", "returns")} | {"moments_ptr": "*fp64"}
    signature = inputs | masks | outputs | {"width": "i32", "kl_coef": "fp32", "gamma": "fp32", "decay": "fp32"}
    options = _options(4096)
    warps = {"num_warps": options.pop("num_warps")}
    kinds = {"rewards and gae": (True, False), "rewards at every token and gae": (True, True), "gae": (False, False)}
    return [
        CompileCase(
            _kernel,
            f"{kind}, {'packed' if packed else 'padded'}",
            signature,
            {"SHAPED": shaped, "EARLIER": earlier, "PACKED": packed, **options},
            ("width",),
            warps,
        )
        for kind, (shaped, earlier) in kinds.items()
        for packed in (True, False)
    ]
