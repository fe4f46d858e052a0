"""Token-level rewards, advantages, returns and the moments for whitening, in one launch.

Over the response tokens of a sequence, with t + 1 the next of them (masked tokens carry A and V across unchanged):

    r_t = -kl_coef (logprob_t - ref_logprob_t)  [+ score at the last one]
    delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      return_t = A_t + V_t

After the last one A is 0, and V is 0 if the sequence terminated, else the value at that token (it was cut: bootstrap).

Memory:   the outputs; every input is read once. The reference on packed sequences or on masks with gaps works on
          [S, L] copies, with L the most response tokens of a sequence.
Source:   Schulman et al. 2016, eq. 11-16; Huang et al. 2024 for the KL penalty. Differs: masked gaps. The scan
          multiplies decays and never divides by them, so gamma * lam = 1 and 1e-8 are both exact.
"""

from __future__ import annotations

from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from megarlhf_kernels._checks import FLOATS, check
from megarlhf_kernels._triton import constexpr, jit, tl, triton
from megarlhf_kernels.dispatch import Impl, use_triton


class Options(TypedDict, total=False):
    """How a batch is laid out, and what runs."""

    cu_seqlens: Tensor | None
    impl: Impl


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
    **options: Unpack[Options],
) -> Estimate:
    """KL penalty, score and GAE of every sequence, without gradient; padded, or packed with `cu_seqlens`.

    Shapes:   logprobs, values float, mask bool: [B, T], or [N] with the sequences one after another and cu_seqlens
              [S + 1] int32 or int64 (0, where each ends, up to N). terminated [S] bool, with S = B if padded.
              Outputs in fp32 (fp64 if an input is); moments: `mean_and_variance` of all ranks' rows joined.
    Units:    reward; log-probs in nats. Masked inputs are never read; a sequence that is all masked loses its score.
    Raises:   ValueError if a shape, dtype or device does not fit, a row is not contiguous, or cu_seqlens do not rise
              from 0 to N (looked at on a CPU only: on a GPU that would wait for it).
    """
    batch = _checked(logprobs, values, mask, terminated, shaping, options.get("cu_seqlens"))
    on_triton = use_triton("rewards_gae", options.get("impl", "auto"), values)
    estimate = (_launch if on_triton else _reference)(batch, discount)
    return Estimate(*(x.view(values.shape) for x in estimate[:3]), estimate[3])


@torch.no_grad()
def gae(
    token_level_rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    terminated: Tensor,
    discount: Discount,
    **options: Unpack[Options],
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of rewards that are there already: everything else as in `rewards_gae`."""
    batch = _checked(token_level_rewards, values, mask, terminated, None, options.get("cu_seqlens"))
    on_triton = use_triton("gae", options.get("impl", "auto"), values)
    estimate = (_launch if on_triton else _reference)(batch, discount)
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
        floats = [self.source, self.values, *(self.shaping[:2] if self.shaping else ())]
        return torch.float64 if any(x.dtype == torch.float64 for x in floats) else torch.float32


def _checked(
    source: Tensor,
    values: Tensor,
    mask: Tensor,
    terminated: Tensor,
    shaping: Shaping | None,
    cu_seqlens: Tensor | None,
) -> _Batch:
    shape = tuple(values.shape)
    if len(shape) != (2 if cu_seqlens is None else 1):
        wanted = "[B, T], or [N] with cu_seqlens"
        raise ValueError(f"values: got shape {list(shape)}; must be {wanted}.")
    check("values", values, shape, FLOATS, values)
    check("logprobs" if shaping else "token_level_rewards", source, shape, FLOATS, values)
    check("mask", mask, shape, (torch.bool,), values)
    if cu_seqlens is not None:
        check("cu_seqlens", cu_seqlens, (None,), (torch.int32, torch.int64), values)
        _check_boundaries(cu_seqlens, shape[0])
    sequences = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    check("terminated", terminated, (sequences,), (torch.bool,), values)
    if shaping is not None:
        check("ref_logprobs", shaping.ref_logprobs, shape, FLOATS, values)
        check("scores", shaping.scores, (sequences,), FLOATS, values)
        shaping = shaping._replace(ref_logprobs=shaping.ref_logprobs.reshape(-1))
    flat = (x.reshape(-1) for x in (source, values, mask))
    return _Batch(*flat, terminated, shaping, cu_seqlens, shape[1] if cu_seqlens is None else 0)


def _check_boundaries(cu_seqlens: Tensor, count: int) -> None:
    rises = len(cu_seqlens) > 0
    if rises and cu_seqlens.is_cpu:
        rises = cu_seqlens[0] == 0 and cu_seqlens[-1] == count and bool((cu_seqlens.diff() >= 0).all())
    if not rises:
        raise ValueError(f"cu_seqlens: {cu_seqlens.tolist()}; must rise from 0 to the {count} tokens.")


# The definition, in torch.


def _reference(batch: _Batch, discount: Discount) -> Estimate:
    sequences, count = len(batch.terminated), len(batch.values)
    rewards, advantages, returns = outputs = batch.values.new_empty(3, count, dtype=batch.precision)
    moments = outputs.new_empty(sequences, 3, dtype=torch.float64)
    # A range of sequences at a time that a CPU's cache holds: fresh memory costs more than the arithmetic.
    step = max(1, sequences * _CHUNK // max(count, 1)) if outputs.is_cpu else max(1, sequences)
    bounds = None if batch.cu_seqlens is None else batch.cu_seqlens.long()
    for start in range(0, sequences, step):
        own = slice(start, min(start + step, sequences))
        if bounds is None:
            lengths, tokens = None, slice(own.start * batch.width, own.stop * batch.width)
        else:
            lengths, tokens = bounds[own.start : own.stop + 1].diff(), slice(*bounds[[own.start, own.stop]].tolist())
        part = _part(batch, own, tokens)
        estimate = _of_rows(part, discount) if _is_runs(part) else _closed_up(part, lengths, discount)
        for output, x in zip(outputs, estimate[:3], strict=True):
            output[tokens] = x.reshape(-1)
        moments[own] = estimate.moments
    return Estimate(rewards, advantages, returns, moments)


_CHUNK = 1 << 16
"""Tokens."""


class _Rows(NamedTuple):
    """Some sequences: [S, T], or flat if they are packed; `scores` are None if `rewards` have them already."""

    rewards: Tensor
    values: Tensor
    mask: Tensor
    terminated: Tensor
    scores: Tensor | None


def _part(batch: _Batch, own: slice, tokens: slice) -> _Rows:
    shape = (-1,) if batch.cu_seqlens is not None else (own.stop - own.start, batch.width)
    rewards, values = batch.source[tokens].to(batch.precision), batch.values[tokens].to(batch.precision)
    scores = None
    if batch.shaping is not None:
        scores = batch.shaping.scores[own].to(batch.precision)
        kl = rewards - batch.shaping.ref_logprobs[tokens].to(batch.precision)
        rewards = kl.mul_(-batch.shaping.kl_coef)
    rows = (x.view(shape) for x in (rewards, values, batch.mask[tokens]))
    return _Rows(*rows, batch.terminated[own], scores)


def _is_runs(part: _Rows) -> bool:
    """Whether these are rows in which the mask is one run: it rises at most once."""
    mask = part.mask
    return mask.ndim == 2 and bool(((mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, :1].sum(1) <= 1).all())


def _closed_up(part: _Rows, lengths: Tensor | None, discount: Discount) -> Estimate:
    """The same with response tokens moved next to each other, at the left of rows of their own, and back again.

    Shapes:   lengths [S], all of a sequence's tokens; None if `part` has rows.
    """
    mask = part.mask.reshape(-1)
    token = mask.nonzero().squeeze(1)
    if lengths is None:
        count = part.mask.sum(1)
    else:
        before = torch.nn.functional.pad(mask.cumsum(0), (1, 0))
        count = before[torch.nn.functional.pad(lengths.cumsum(0), (1, 0))].diff()
    place = torch.arange(int(count.max()), device=mask.device)
    closed = place < count[:, None]
    # Beyond a row's tokens are those of the next: any will do there, the mask drops them.
    nth = (place + (count.cumsum(0) - count)[:, None]).clamp_(max=max(len(token) - 1, 0))
    rewards, values = (x.reshape(-1)[token[nth]] for x in (part.rewards, part.values))
    estimate = _of_rows(part._replace(rewards=rewards, values=values, mask=closed), discount)
    cell = closed.view(-1).nonzero().squeeze(1)
    outputs = (x.new_zeros(len(mask)).index_copy_(0, token, x.view(-1)[cell]) for x in estimate[:3])
    return Estimate(*outputs, estimate.moments)


def _of_rows(part: _Rows, discount: Discount) -> Estimate:
    """Estimate of rows [S, T] in which response tokens are one run, so that t + 1 really is the next of them."""
    mask = part.mask
    # An integer copy of the mask selects bits: `where` costs a CPU eight times as much. NaN and inf disappear too.
    bits = mask.to(torch.int64 if part.values.dtype == torch.float64 else torch.int32).neg_()
    rewards, values = _keep(part.rewards, bits), _keep(part.values, bits)
    count = mask.sum(1)
    (row,) = count.nonzero(as_tuple=True)
    last = mask.shape[1] - 1 - mask[row].view(torch.uint8).flip(1).argmax(1) if len(row) else row
    if part.scores is not None:
        rewards[row, last] += part.scores[row]
    deltas = rewards.clone()
    deltas[:, :-1].add_(values[:, 1:], alpha=discount.gamma)  # after the run the value is 0
    deltas[row, last] += torch.where(part.terminated[row], 0.0, discount.gamma * values[row, last])
    advantages = _keep(_reverse_scan(deltas.sub_(values), discount.gamma * discount.lam), bits)
    total = advantages.sum(1, dtype=torch.float64)
    mean = total / count.clamp(min=1)
    off = _keep(advantages - mean.to(advantages.dtype)[:, None], bits)
    # `off` is about a mean that was rounded: the last term takes the rounding out.
    centred = off.square().sum(1, dtype=torch.float64) - off.sum(1, dtype=torch.float64) ** 2 / count.clamp(min=1)
    return Estimate(rewards, advantages, advantages + values, torch.stack([count.double(), total, centred], 1))


def _keep(x: Tensor, bits: Tensor) -> Tensor:
    """`x` where all bits are set, 0 where none is."""
    return (x.view(bits.dtype) & bits).view(x.dtype)


_BLOCK = 32


def _reverse_scan(b: Tensor, decay: float) -> Tensor:
    """x_t = b_t + decay x_{t+1} along the rows of b [S, T].

    Inside a block of 32 it is a product with a triangle of powers; the first x of all blocks are a shorter scan, of
    decay^32, whose result enters each block from the right.
    """
    rows, width = b.shape
    powers = torch.tensor([decay**k for k in range(_BLOCK + 1)], dtype=b.dtype, device=b.device)
    ahead = torch.arange(_BLOCK, device=b.device)[:, None] - torch.arange(_BLOCK, device=b.device)
    triangle = torch.where(ahead >= 0, powers[ahead.clamp(min=0)], 0.0)  # [s, t]: decay^(s - t)
    if width <= _BLOCK:
        return b @ triangle[:width, :width]
    x = torch.nn.functional.pad(b, (0, -width % _BLOCK)) if width % _BLOCK else b
    x = x.reshape(-1, _BLOCK) @ triangle
    x = x.view(rows, -1, _BLOCK)
    entering = _reverse_scan(x[:, :, 0], decay**_BLOCK)[:, 1:, None]
    x[:, :-1].addcmul_(entering, powers[1:].flip(0))
    return x.view(rows, -1)[:, :width]


# Triton.


@jit
def _nearest(right, left):
    return tl.minimum(right, left)


@jit
def _compose(right_decay, right, left_decay, left):
    """The map x -> left + left_decay x after the map x -> right + right_decay x."""
    return left_decay * right_decay, left + left_decay * right


@jit
def _kernel(
    source_ptr,
    ref_ptr,
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
    PACKED: constexpr,
    BLOCK: constexpr,
):
    """One sequence a program, from its end to its start in blocks; what enters a block comes from the one after it."""
    NONE = 2147483647
    precision = advantages_ptr.dtype.element_ty
    sequence = tl.program_id(0).to(tl.int64)
    if PACKED:
        start = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
        length = (tl.load(cu_seqlens_ptr + sequence + 1) - start).to(tl.int32)
    else:
        start = sequence * width
        length = width
    cut = tl.load(terminated_ptr + sequence) == 0
    next_token = NONE  # the first response token of the blocks done
    carry = tl.zeros([], precision)  # its advantage
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
        value = tl.load(values_ptr + here, mask=response, other=0.0).to(precision)
        next_value = tl.load(values_ptr + start + after, mask=response & (after != NONE), other=0.0).to(precision)
        next_value = tl.where(last, tl.where(cut, value, 0.0), next_value)
        reward = tl.load(source_ptr + here, mask=response, other=0.0).to(precision)
        if SHAPED:
            ref = tl.load(ref_ptr + here, mask=response, other=0.0).to(precision)
            score = tl.load(scores_ptr + sequence).to(precision)
            reward = (reward - ref) * -kl_coef
            reward = tl.where(last, reward + score, reward)
            reward = tl.where(response, reward, 0.0)  # not -0
            tl.store(rewards_ptr + here, reward, mask=t < length)
        delta = tl.where(response, reward + gamma * next_value - value, 0.0)
        weight, advantage = tl.associative_scan((tl.where(response, decay, 1.0).to(precision), delta), 0, _compose)
        advantage = tl.where(response, advantage + weight * carry, 0.0)
        tl.store(advantages_ptr + here, advantage, mask=t < length)
        tl.store(returns_ptr + here, advantage + value, mask=t < length)
        first = tl.min(tl.where(response, t, NONE), 0)
        carry = tl.where(first == NONE, carry, tl.sum(tl.where(t == first, advantage, 0.0), 0))
        next_token = tl.minimum(next_token, first)
        if SHAPED:
            # The block's moments about its own mean join those of the blocks done: Chan et al. 1979.
            size = tl.sum(response.to(tl.int32), 0).to(tl.float64)
            block_total = tl.sum(advantage, 0).to(tl.float64)
            mean = block_total / tl.maximum(size, 1.0)
            off = tl.where(response, advantage - mean.to(precision), 0.0)
            apart = mean - total / tl.maximum(count, 1.0)
            centred += tl.sum(off * off, 0).to(tl.float64)
            centred += apart * apart * (count * size / tl.maximum(count + size, 1.0))
            count += size
            total += block_total
    if SHAPED:
        tl.store(moments_ptr + sequence * 3, count)
        tl.store(moments_ptr + sequence * 3 + 1, total)
        tl.store(moments_ptr + sequence * 3 + 2, centred)


def _launch(batch: _Batch, discount: Discount) -> Estimate:
    shaped, sequences = batch.shaping is not None, len(batch.terminated)
    outputs = batch.values.new_empty(3 if shaped else 2, len(batch.values), dtype=batch.precision)
    rewards, advantages, returns = outputs if shaped else (batch.source, *outputs)
    moments = batch.values.new_empty(sequences if shaped else 0, 3, dtype=torch.float64)
    if sequences:
        shaping = batch.shaping or Shaping(batch.source, batch.source, 0.0)
        block, warps = _tile(batch)
        _kernel[(sequences,)](
            batch.source,
            shaping.ref_logprobs,
            shaping.scores.contiguous(),
            batch.values,
            batch.mask.view(torch.uint8),
            batch.terminated.view(torch.uint8),
            batch.terminated if batch.cu_seqlens is None else batch.cu_seqlens,
            rewards,
            advantages,
            returns,
            moments,
            batch.width,
            shaping.kl_coef,
            discount.gamma,
            discount.gamma * discount.lam,
            SHAPED=shaped,
            PACKED=batch.cu_seqlens is not None,
            BLOCK=block,
            num_warps=warps,
        )
    return Estimate(rewards, advantages, returns, moments)


def _tile(batch: _Batch) -> tuple[int, int]:
    """(block, warps): a whole sequence at once where it fits, 8 tokens a thread. Packed: of the average length."""
    length = batch.width or len(batch.values) // len(batch.terminated)
    block = min(4096, max(32, triton.next_power_of_2(length)))
    return block, max(1, min(16, block // 256))
