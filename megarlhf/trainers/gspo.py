"""GSPO: the ratio that is clipped is that of a whole response.

    s_i = exp(mean over t of (new_t - old_t))        loss_i: max(-A_i s_i, -A_i clip(s_i, 1 - low, 1 + high))

The page is GRPO's; these are its settings. Source: Zheng et al. 2025 (arXiv 2507.18071).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megarlhf.trainers.critic_free import LEARNERS
from megarlhf.trainers.grpo import GRPOConfig, grpo_iteration
from megarlhf.trainers.policy_loop import build_cast, policy_trainer


class GSPOConfig(GRPOConfig):
    """`megarlhf gspo`: GRPO whose ratio is a response's."""

    ratio: Literal["token", "sequence"] = "sequence"
    """Whose ratio is clipped: that of its response, the geometric mean. Source: GSPO, eq. 7."""
    clip_range: float = Field(default=3e-4, gt=0)
    """The ratio is clipped from 1 - this. Source: GSPO, section 5.1; a mean moves less than a token's ratio does."""
    clip_range_high: float | None = Field(default=4e-4, gt=0)
    """The ratio is clipped to 1 + this; null: as from below. Source: GSPO, section 5.1."""
    global_batch: int = Field(default=128, ge=1)
    """Rollouts per optimiser step, or prompts, as batch_unit says; must divide rollout_batch. Source:
    GSPO's 4 steps an iteration; on its own rollouts a policy's ratio is 1, and nothing is clipped."""
    loss_mean: Literal["token", "sequence", "constant"] = "sequence"
    """What the loss is a mean over: `sequence`, the rollouts of a step. Source: GSPO, eq. 5."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Cost of the KL to the reference, per nat; 0 needs no reference. Source: GSPO leaves it out."""


TRAINER = policy_trainer(GSPOConfig, grpo_iteration, models=build_cast, learners=LEARNERS)
