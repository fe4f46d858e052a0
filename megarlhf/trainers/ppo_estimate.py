"""From what four models say of rollouts to rewards, advantages and returns: pure, in fp32, over the global batch."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.ops.advantages import gae
from megarlhf.ops.kl import kl_k1
from megarlhf.ops.masked import masked_whiten
from megarlhf.ops.rewards import add_kl_penalty, shape_scores
from megarlhf.trainers.ppo_config import PPOConfig


class Scored(NamedTuple):
    """What the four models say of rollouts, before anything is learnt: [B, T] fp32, and scores [B]."""

    rollout: Rollout
    logprobs: Tensor
    """The actor's, recomputed by the trainer's forward."""
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    """Before any penalty."""


class Estimate(NamedTuple):
    """What is made of it: [B, T] fp32, 0 outside of responses."""

    token_level_rewards: Tensor
    advantages: Tensor
    """Before whitening."""
    whitened: Tensor
    returns: Tensor


def estimated(scored: Scored, cfg: PPOConfig, *, wrong_score: float = math.inf) -> Estimate:
    """Token-level rewards, advantages and returns of the global batch; wrong_score as in `shape_scores`."""
    rollout = scored.rollout
    mask = rollout.response_mask
    kl = kl_k1(scored.logprobs, scored.ref_logprobs)
    shaped = shape_scores(
        scored.scores,
        rollout.terminated,
        missing_eos_score=cfg.missing_eos_score,
        wrong_score=wrong_score,
        clip=cfg.score_clip,
    )
    token_level_rewards = add_kl_penalty(shaped, kl, mask, kl_coef=cfg.kl_coef)
    advantages, returns = gae(
        token_level_rewards, scored.values, mask, rollout.terminated, gamma=cfg.gamma, lam=cfg.gae_lambda
    )
    return Estimate(token_level_rewards, advantages, masked_whiten(advantages, mask), returns)
