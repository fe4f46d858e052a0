"""CISPO: a token whose ratio is clipped keeps its gradient, with the clipped weight.

    loss_t = -sg[min(ratio_t, 1 + high)] A_t new_t

The page is GRPO's; these are its settings. Source: MiniMax-M1 (arXiv 2506.13585).
"""

from __future__ import annotations

from pydantic import Field

from megarlhf.trainers.critic_free import LEARNERS
from megarlhf.trainers.grpo import GRPOConfig, grpo_iteration
from megarlhf.trainers.policy_loop import build_cast, policy_trainer
from megarlhf_kernels.linear_ppo import Surrogate


class CISPOConfig(GRPOConfig):
    """`megarlhf cispo`: GRPO whose clipped tokens go on learning."""

    surrogate: Surrogate = "cispo"
    """`cispo`: a token whose ratio was clipped keeps its gradient, with the clipped weight.
    Source: MiniMax-M1, eq. 4."""
    clip_range: float = Field(default=1.0, gt=0)
    """The ratio is clipped from 1 - this: 1 is no lower bound. Source: MiniMax-M1, which uses the upper one alone."""
    clip_range_high: float | None = Field(default=4.0, gt=0)
    """The ratio is clipped to 1 + this; null: as from below. Source: the cap of 5 of ScaleRL (arXiv 2510.13786)."""
    global_batch: int = Field(default=128, ge=1)
    """Rollouts per optimiser step, or prompts, as batch_unit says; must divide rollout_batch. Four steps
    an iteration: on its own rollouts a policy's ratio is 1, and nothing is clipped."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Cost of the KL to the reference, per nat; 0 needs no reference. Source: MiniMax-M1 has none."""


TRAINER = policy_trainer(CISPOConfig, grpo_iteration, models=build_cast, learners=LEARNERS)
