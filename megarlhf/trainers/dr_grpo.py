"""GRPO without what favours long wrong responses, and prompts on which all responses are alike: Dr.GRPO.

    A_i = r_i - mean(r)        loss: sum over the tokens of all responses / (responses * sampling.max_new_tokens)

The page is GRPO's; these are its settings. Source: Liu et al. 2025 (arXiv 2503.20783).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megarlhf.trainers.critic_free import LEARNERS, GroupStdConfig
from megarlhf.trainers.grpo import GRPOConfig, grpo_iteration
from megarlhf.trainers.policy_loop import build_cast, policy_trainer


class DrGRPOConfig(GRPOConfig):
    """`megarlhf dr_grpo`: GRPO without the two biases."""

    group_std: GroupStdConfig | None = None
    """What a group's advantages are divided by; null divides by nothing. Source: Dr.GRPO."""
    loss_mean: Literal["token", "sequence", "constant"] = "constant"
    """What the loss is a mean over: `constant`, the rollouts of a step, each its sum over sampling.max_new_tokens.
    `token` and `sequence` as in GRPO. Source: Dr.GRPO, where it is a constant, never the length of a batch."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Cost of the KL to the reference, per nat; 0 needs no reference. Source: Dr.GRPO."""


TRAINER = policy_trainer(DrGRPOConfig, grpo_iteration, models=build_cast, learners=LEARNERS)
