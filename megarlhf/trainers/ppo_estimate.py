"""From what four models say of rollouts to rewards, advantages and returns: pure, in fp32, over the global batch."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.ops.advantages import Advantages, shaped_gae
from megarlhf.ops.rewards import shape_scores
from megarlhf.trainers.ppo_config import PPOConfig
from megarlhf_kernels.rewards_gae import Discount, Shaping


class Scored(NamedTuple):
    """What the four models say of rollouts, before anything is learnt: [B, T] fp32, and scores [B]."""

    rollout: Rollout
    logprobs: Tensor
    """The actor's, recomputed by the trainer's forward."""
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    """Before any penalty."""


def estimated(scored: Scored, cfg: PPOConfig, *, wrong_score: float = math.inf) -> Advantages:
    """Token-level rewards, advantages and returns of the global batch; wrong_score as in `shape_scores`."""
    rollout = scored.rollout
    scores = shape_scores(
        scored.scores,
        rollout.terminated,
        missing_eos_score=cfg.missing_eos_score,
        wrong_score=wrong_score,
        clip=cfg.score_clip,
    )
    return shaped_gae(
        scored.logprobs,
        scored.values,
        rollout.response_mask,
        rollout.terminated,
        Shaping(scored.ref_logprobs, scores, cfg.kl_coef),
        Discount(cfg.gamma, cfg.gae_lambda),
    )
