"""From the judgement of a rollout to a reward per token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megarlhf.ops.masked import check_mask, last_true


class Earned(NamedTuple):
    """What responses earned, without the KL."""

    last: Tensor
    """[B]: at the last response token."""
    earlier: Tensor | None
    """[B, T]: at those before it, 0 elsewhere; None where nothing is earned before the last."""


def where_earned(scores: Tensor, token_scores: Tensor, response_mask: Tensor) -> Earned:
    """Scores of responses, of which what was earned before the last response token stays where it was earned.

        earlier_t = token_scores_t before the last response token      last = scores - sum over t of earlier_t

    So a response earns its score, whatever was made of it, and one that earned nothing before its last token earns all
    of it there, to the bit.

    Shapes:   scores [B], token_scores [B, T] fp32; response_mask [B, T] bool.
    Units:    reward.
    Raises:   ValueError if shapes differ or the mask is not bool.
    """
    check_mask(response_mask, token_scores=token_scores)
    if scores.shape != token_scores.shape[:1]:
        raise ValueError(f"scores: got {list(scores.shape)}, token_scores are {list(token_scores.shape)}; one a row.")
    earlier = torch.where(response_mask & ~last_true(response_mask), token_scores, 0.0)
    return Earned((scores.double() - earlier.double().sum(1)).to(scores.dtype), earlier)


def add_kl_penalty(
    scores: Tensor, kl: Tensor, response_mask: Tensor, *, kl_coef: float, earlier: Tensor | None = None
) -> Tensor:
    """The score at the last response token, and a KL penalty at every response token.

        token_level_rewards_t = -kl_coef * kl_t   + earlier_t, if any   + score if t is the last response token

    Shapes:   scores [B]; kl, earlier [B, T] fp32; response_mask [B, T] bool. Returns [B, T].
    Units:    reward; kl in nats. Masked outputs are exactly 0; a row without response tokens loses its score.
    Raises:   ValueError if shapes differ or the mask is not bool.
    Source:   Huang et al. 2024, detail "KL penalty": added to the reward once, before GAE.
    """
    check_mask(response_mask, kl=kl, **({} if earlier is None else {"earlier": earlier}))
    if scores.shape != kl.shape[:1]:
        raise ValueError(f"scores: got {list(scores.shape)}, kl is {list(kl.shape)}; must be one score a row.")
    rewards = -kl_coef * kl if earlier is None else -kl_coef * kl + earlier
    return torch.where(response_mask, rewards, 0.0) + torch.where(last_true(response_mask), scores[:, None], 0.0)
