"""Importance weights of tokens that the sampler drew with other log-probs than the trainer gives them."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megarlhf.ops.masked import check_mask, masked_mean, masked_sum

Rule = Literal["none", "truncate", "mask", "sequence_mask"]
MOST = 20.0
"""Of a log-weight: exp of it is finite."""


class Corrections(NamedTuple):
    """What `sampler_corrections` returns."""

    weights: Tensor
    """[B, T] fp32, not negative; 0 where masked."""
    changed: Tensor
    """Share of response tokens whose weight the rule changed."""
    effective: Tensor
    """(sum w)^2 / (N sum w^2): 1 where all weights are equal, 1/N where one is all there is."""


def sampler_corrections(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, *, rule: Rule, low: float, high: float
) -> Corrections:
    """Factors on the advantages, of w = exp(logprobs - sampler_logprobs).

        none: 1        truncate: min(max(w, low), high)        mask: w where low <= w <= high, else 0
        sequence_mask: w in responses whose exp(mean over t of log w) is within low and high, else 0

    Shapes:   logprobs, sampler_logprobs [B, T] fp32; mask [B, T] bool.
    Raises:   ValueError if shapes differ or mask is not bool.
    Source:   TIS (Yao et al. 2025), IcePop (Ling team 2025), sequence mask (as OpenRLHF and NeMo RL have it).
    """
    check_mask(mask, logprobs=logprobs, sampler_logprobs=sampler_logprobs)
    gap = torch.where(mask, logprobs - sampler_logprobs, 0.0)
    raw = gap.clamp(-MOST, MOST).exp()
    match rule:
        case "none":
            weights = torch.ones_like(raw)
        case "truncate":
            weights = raw.clamp(low, high)
        case "mask":
            weights = torch.where((raw >= low) & (raw <= high), raw, 0.0)
        case "sequence_mask":
            means = (gap.double().sum(1) / mask.sum(1).clamp(min=1)).clamp(-MOST, MOST).exp()
            weights = torch.where(((means >= low) & (means <= high))[:, None], raw, 0.0)
    weights = torch.where(mask, weights, 0.0)
    changed = (weights != raw) if rule != "none" else torch.zeros_like(mask)
    total, squares = masked_sum(weights, mask).double(), masked_sum(weights.double() ** 2, mask)
    effective = total**2 / (mask.sum() * squares).clamp(min=1e-12)
    return Corrections(weights, masked_mean(changed.float(), mask), effective)


def token_mult_prob_error(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean over response tokens of exp(|logprobs - sampler_logprobs|): 1 where sampler and trainer agree.

    Shapes:   [B, T] each; returns a scalar. Source: NeMo RL, whose runs stay below 1.05.
    """
    gap = torch.where(mask, (logprobs - sampler_logprobs).abs(), 0.0)
    return masked_mean(gap.clamp(max=MOST).exp(), mask)
