"""From the judgement of a rollout to a reward per token."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf.ops.masked import check_mask, last_true


def shape_scores(
    scores: Tensor, terminated: Tensor, *, missing_eos_score: float | None = None, clip: float | None = None
) -> Tensor:
    """Clip scores to -clip..clip (None: not at all); one without EOS gets `missing_eos_score` (None: its own).

    Shapes:   scores [B] fp32; terminated [B] bool. Returns [B].
    Units:    reward.
    Raises:   ValueError if shapes differ, terminated is not bool, or clip is not positive.
    Source:   Huang et al. 2024, detail "EOS trick": -1, so that the policy learns to stop.
    """
    check_mask(terminated, scores=scores)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: {clip}; must be positive (None clips nothing).")
    shaped = scores if clip is None else scores.clamp(-clip, clip)
    return shaped if missing_eos_score is None else shaped.masked_fill(~terminated, missing_eos_score)


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
