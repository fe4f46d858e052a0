"""RLOO: REINFORCE whose baseline is what the other responses to the same prompt score.

    A_i = r_i - mean of the others' r = n / (n - 1) (r_i - mean(r))      r: score - kl_coef sum over t of k1

Source: Ahmadian et al. 2024 (arXiv 2402.14740).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megarlhf.batch.rollouts import Prompts
from megarlhf.ops.group_advantages import leave_one_out, to_tokens
from megarlhf.trainers.critic_free import (
    LEARNERS,
    CriticFreeConfig,
    CriticFreeIteration,
    critic_free_loss,
    estimate_metrics,
    lessons,
    score,
    token_level_rewards,
)
from megarlhf.trainers.policy_loop import Cast, Turn, build_cast, optimise, policy_trainer
from megarlhf.trainers.policy_metrics import policy_metrics


class RLOOConfig(CriticFreeConfig):
    """`megarlhf rloo`: actor, judges and a reference; no critic."""

    group_size: int = Field(default=4, ge=1)
    """Responses per prompt. Source: 2 and 4 in RLOO."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Cost of the KL to the reference, per nat; 0 needs no reference. Source: TRL, and Huang et al. 2024."""
    kl_in: Literal["loss", "reward"] = "reward"
    """Where the KL is paid: in the reward that advantages are made of. Source: RLOO, eq. 3."""

    @property
    def remarks(self) -> list[str]:
        """That a group's scores are divided by their standard deviation, where they are."""
        divided = (
            "shaping.normalise=group divides a group's scores by their standard deviation, and RLOO by nothing: "
            "advantages become GRPO's, times n / (n - 1); shaping.normalise=none leaves RLOO's."
        )
        return [*super().remarks, *([divided] if self.shaping.normalise == "group" else [])]


def rloo_iteration(cast: Cast, prompts: Prompts, cfg: RLOOConfig, turn: Turn) -> CriticFreeIteration:
    """Roll out, score, estimate, optimise: once. Collective: every rank calls it with the same prompts."""
    # 1. Roll out, a group of responses to each prompt.
    with turn.clock("rollout"):
        rollout = cast.sampler.generate(prompts, cfg.sampling, seed=turn.seed("rollout"), group_size=cfg.group_size)

    # 2. Score. Forward only, one model resident at a time.
    with turn.clock("score"):
        scored = score(cast, rollout, cast.panel.judge(rollout), cfg, turn)

    # 3. Estimate. A response against the others.
    with turn.clock("estimate"):
        rewards = token_level_rewards(scored, cast, cfg)
        advantages = to_tokens(leave_one_out(rewards.sum(1), cfg.group_size), rollout.response_mask)
        rows, corrected = lessons(scored, advantages, cfg)
        metrics = {**estimate_metrics(cast, scored, rewards, advantages, cfg), **corrected}
        cast.kl.observe(metrics, len(rollout))

    # 4. Optimise.
    with turn.clock("optimise"):
        updates = optimise(cast.actor, critic_free_loss(cast.actor, cfg), rows, turn, cfg)
    return CriticFreeIteration(rollout, scored.judgement, {**metrics, **policy_metrics(updates)}, rows, rewards)


TRAINER = policy_trainer(RLOOConfig, rloo_iteration, models=build_cast, learners=LEARNERS)
