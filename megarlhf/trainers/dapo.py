"""DAPO: GRPO with a higher upper clip, dynamic sampling, a token mean, and a cost of nearing the length limit.

Groups whose scores are all equal have no advantage: others are drawn in their place, up to max_draws times. What was
drawn in vain is counted as compute all the same. Source: Yu et al. 2025 (arXiv 2503.14476).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megarlhf.batch.rollouts import Prompts
from megarlhf.judges.shaping import ShapingConfig
from megarlhf.observe.metrics import names_of
from megarlhf.ops.group_advantages import group_advantages, to_tokens
from megarlhf.trainers.critic_free import (
    LEARNERS,
    CriticFreeIteration,
    critic_free_loss,
    estimate_metrics,
    group_metrics,
    lessons,
    score,
    token_level_rewards,
)
from megarlhf.trainers.filling import fill
from megarlhf.trainers.grpo import GRPOConfig
from megarlhf.trainers.policy_loop import Cast, Turn, build_cast, optimise, policy_trainer
from megarlhf.trainers.policy_metrics import length_metrics, policy_metrics, score_metrics


class DAPOShaping(ShapingConfig):
    """In this order."""

    overlong_buffer: Annotated[int, Field(ge=0)] | Literal["fifth"] = "fifth"
    """5. Last tokens before sampling.max_new_tokens over which a response loses up to overlong_penalty, linearly; 0: no
    such loss; `fifth`: a fifth of the limit. Source: DAPO, 4,096 of 20,480."""


class DAPOConfig(GRPOConfig):
    """`megarlhf dapo`: actor and judges; neither critic nor reference."""

    max_draws: int = Field(default=3, ge=1)
    """Times that prompts are rolled out in an iteration, at most; then groups of equal scores fill the batch."""
    clip_range_high: float | None = Field(default=0.28, gt=0)
    """The ratio is clipped to 1 + this; null: as from below. Source: DAPO."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Cost of the KL to the reference, per nat; 0 needs no reference. Source: DAPO."""
    shaping: DAPOShaping = DAPOShaping()
    """How scores become what is learnt from."""
    global_batch: int = Field(default=32, ge=1)
    """Rollouts per optimiser step, or prompts, as batch_unit says; must divide rollout_batch. Source:
    DAPO's 16 steps an iteration; on its own rollouts a policy's ratio is 1, and nothing is clipped."""

    @property
    def logged(self) -> set[str]:
        """Metrics of every iteration."""
        return super().logged | names_of("draws")


def dapo_iteration(cast: Cast, prompts: Prompts, cfg: DAPOConfig, turn: Turn) -> CriticFreeIteration:
    """Roll out until the batch is full, score, estimate, optimise: once. Collective, of equal prompts."""
    # 1. Roll out and judge, again and again: which groups are of use is known when they are judged.
    filled = fill(cast, prompts, turn, cfg, max_draws=cfg.max_draws)
    rollout = filled.rollout

    # 2. Score what is kept. Forward only, one model resident at a time.
    with turn.clock("score"):
        scored = score(cast, rollout, filled.judgement, cfg, turn)

    # 3. Estimate. A response against its siblings.
    with turn.clock("estimate"):
        rewards = token_level_rewards(scored, cast, cfg)
        std = None if cfg.group_std is None else cfg.group_std.divisor
        advantages = to_tokens(group_advantages(rewards.sum(1), cfg.group_size, std), rollout.response_mask)
        rows, corrected = lessons(scored, advantages, cfg)
        # Scores and lengths are of all that was drawn: the kept ones' would say which prompts are hard.
        everything = filled.all_judgement.scores
        metrics = {
            **estimate_metrics(cast, scored, rewards, advantages, cfg),
            **score_metrics(everything),
            **length_metrics(filled.all_drawn),
            **group_metrics(everything, cfg.group_size),
            **filled.metrics,
            **corrected,
        }
        cast.kl.observe(metrics, len(rollout))

    # 4. Optimise.
    with turn.clock("optimise"):
        updates = optimise(cast.actor, critic_free_loss(cast.actor, cfg), rows, turn, cfg)
    learnt = {**metrics, **policy_metrics(updates)}
    return CriticFreeIteration(filled.all_drawn, filled.all_judgement, learnt, rows, rewards)


TRAINER = policy_trainer(DAPOConfig, dapo_iteration, models=build_cast, learners=LEARNERS)
