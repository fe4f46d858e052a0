"""From the judgement of a rollout to a reward per token."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf.ops.masked import check_mask, last_true


def add_kl_penalty(scores: Tensor, kl: Tensor, response_mask: Tensor, *, kl_coef: float) -> Tensor:
    """The score at the last response token, and a KL penalty at every response token.

        token_level_rewards_t = -kl_coef * kl_t   + score if t is the last response token

    Shapes:   scores [B]; kl [B, T] fp32; response_mask [B, T] bool. Returns [B, T].
    Units:    reward; kl in nats. Masked outputs are exactly 0; a row without response tokens loses its score.
    Raises:   ValueError if shapes differ or the mask is not bool.
    Source:   Huang et al. 2024, detail "KL penalty": added to the reward once, before GAE.
    """
    check_mask(response_mask, kl=kl)
    if scores.shape != kl.shape[:1]:
        raise ValueError(f"scores: got {list(scores.shape)}, kl is {list(kl.shape)}; must be one score a row.")
    penalty = torch.where(response_mask, -kl_coef * kl, 0.0)
    return penalty + torch.where(last_true(response_mask), scores[:, None], 0.0)
