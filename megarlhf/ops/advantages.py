"""Advantages: how much better a token was than the critic expected."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megarlhf.ops.masked import check_mask
from megarlhf_kernels.rewards_gae import Discount, Shaping, mean_and_variance, rewards_gae
from megarlhf_kernels.rewards_gae import gae as fused_gae


class Advantages(NamedTuple):
    """What `shaped_gae` returns: [B, T] fp32 without gradient, exactly 0 where masked."""

    token_level_rewards: Tensor
    advantages: Tensor
    """Before whitening."""
    whitened: Tensor
    returns: Tensor


def shaped_gae(
    logprobs: Tensor, values: Tensor, response_mask: Tensor, terminated: Tensor, shaping: Shaping, discount: Discount
) -> Advantages:
    """KL penalty, score, GAE and whitening, fused: one pass over the tokens and one over what came of it.

        token_level_rewards = -kl_coef * (logprobs - ref_logprobs)  + earlier  + score at the last response token
        whitened = (advantages - mean) / sqrt(var + 1e-8)

    Its slow twin is `add_kl_penalty` of k1, `gae` and `masked_whiten`, one after another.

    Shapes:   logprobs, values, shaping.ref_logprobs, shaping.earlier [B, T] fp32; shaping.scores [B]; response_mask
              [B, T] bool; terminated [B] bool.
    Units:    reward; log-probs in nats.
    Ranks:    none (pure): pass the global batch, for the mean over a part of it is another mean.
    Raises:   ValueError if shapes differ or a mask is not bool.
    """
    mask = response_mask.contiguous()
    earlier = None if shaping.earlier is None else shaping.earlier.contiguous()
    shaping = shaping._replace(ref_logprobs=shaping.ref_logprobs.contiguous(), earlier=earlier)
    found = rewards_gae(logprobs.contiguous(), values.contiguous(), mask, terminated, shaping, discount)
    mean, variance = mean_and_variance(found.moments)
    whitened = torch.where(mask, ((found.advantages.double() - mean) * torch.rsqrt(variance + 1e-8)).float(), 0.0)
    return Advantages(found.token_level_rewards, found.advantages, whitened, found.returns)


def gae(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, terminated: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over response tokens, masked positions skipped.

        delta_t = r_t + gamma * V_{t+1} - V_t       A_t = delta_t + gamma * lam * A_{t+1}       return_t = A_t + V_t

    V_t is the critic's value before token t + 1 is produced. After the last response token V is 0 when the rollout
    ended with EOS (`terminated`); when it was cut, it is the value at the last response position, the closest state
    that the critic has seen, since the text after the last token is not part of the rollout.

    Shapes:   token_level_rewards, values [B, T] fp32; response_mask [B, T] bool; terminated [B] bool.
              Returns (advantages, returns) [B, T] fp32, without gradient: they are targets.
    Units:    reward. Masked positions of both outputs are exactly 0, and their inputs are never read.
    Raises:   ValueError if shapes differ or a mask is not bool.
    Source:   Schulman et al. 2016, eq. 11-16. Differs: masked gaps carry A and V across unchanged.
    """
    check_mask(response_mask, token_level_rewards=token_level_rewards, values=values)
    if terminated.dtype != torch.bool or terminated.shape != values.shape[:1]:
        got = f"{terminated.dtype} {list(terminated.shape)}"
        raise ValueError(f"terminated: got {got}, values are {list(values.shape)}; must be torch.bool, one a row.")
    # The kernel wants contiguous rows; a critic's values may be a transposed view.
    rewards, values, mask = (x.contiguous() for x in (token_level_rewards, values, response_mask))
    return fused_gae(rewards, values, mask, terminated, Discount(gamma, lam))
