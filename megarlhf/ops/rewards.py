"""From the judgement of a rollout to a reward per token."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from megarlhf.ops.masked import check_mask, last_true


def shape_scores(
    scores: Tensor,
    terminated: Tensor,
    *,
    missing_eos_score: float | Literal["auto"] | None = None,
    wrong_score: float = math.inf,
    clip: float | None = None,
) -> Tensor:
    """Clip scores to -clip..clip (None: not at all); then mark those without EOS down (None: not at all).

    `auto` caps the score of a cut response at the lowest of `wrong_score`, the mean score of wrong responses where it
    is known, and the scores of this batch's responses that ended. So being cut never pays more than being wrong,
    whatever the offset and the scale of the scores are. A number replaces the score.

    Shapes:   scores [B] fp32; terminated [B] bool. Returns [B].
    Units:    reward.
    Raises:   ValueError if shapes differ, terminated is not bool, or clip is not positive.
    Source:   Huang et al. 2024, detail "EOS trick": a fixed -1, so that the policy learns to stop. Differs: -1 means
              something only where scores have been normalised, and even then it can lie above those of wrong responses.
    """
    check_mask(terminated, scores=scores)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip: {clip}; must be positive (None clips nothing).")
    shaped = scores if clip is None else scores.clamp(-clip, clip)
    if missing_eos_score is None:
        return shaped
    if missing_eos_score != "auto":
        return shaped.masked_fill(~terminated, missing_eos_score)
    most = torch.cat([shaped[terminated], shaped.new_tensor([wrong_score])]).amin()
    if clip is not None:
        most = most.clamp(min=-clip)
    return torch.where(terminated, shaped, shaped.minimum(most))


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
