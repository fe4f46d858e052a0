"""GRPO: a response is as good as it scores above the others to its prompt, over their standard deviation.

    A_i = (r_i - mean(r)) / (std(r) + eps), at every token     loss: clipped surrogate + kl_coef KL(policy || reference)

Source: Shao et al. 2024 (arXiv 2402.03300).
"""

from __future__ import annotations

from megarlhf.batch.rollouts import Prompts
from megarlhf.errors import ConfigError
from megarlhf.ops.group_advantages import group_advantages, to_tokens
from megarlhf.trainers.critic_free import (
    LEARNERS,
    CriticFreeConfig,
    CriticFreeIteration,
    GroupStdConfig,
    critic_free_loss,
    estimate_metrics,
    lessons,
    score,
    token_level_rewards,
)
from megarlhf.trainers.policy_loop import Cast, Turn, build_cast, optimise, policy_trainer
from megarlhf.trainers.policy_metrics import policy_metrics


class GRPOConfig(CriticFreeConfig):
    """`megarlhf grpo`: actor, judges and, for the KL, a reference; no critic."""

    group_std: GroupStdConfig | None = GroupStdConfig()
    """What a group's advantages are divided by; null divides by nothing."""

    @property
    def remarks(self) -> list[str]:
        """That a group's scores are divided by their standard deviation twice, where they are."""
        twice = (
            "shaping.normalise=group divides a group's scores by their standard deviation, and group_std what came of "
            "that once more: by about 1, unless later steps of shaping or a KL in the reward move it; "
            "shaping.normalise=none divides once."
        )
        return [*super().remarks, *([twice] if self.shaping.normalise == "group" else [])]

    def check_sizes(self) -> None:
        """Raise where the numbers of a run do not go together, before anything is read."""
        if self.group_std is None and self.shaping.normalise == "group":
            raise ConfigError(
                "shaping.normalise=group with group_std=null: it divides by the standard deviation that is to be left "
                "out; set shaping.normalise to none or batch, or divide by group_std, as grpo does."
            )
        super().check_sizes()


def grpo_iteration(cast: Cast, prompts: Prompts, cfg: GRPOConfig, turn: Turn) -> CriticFreeIteration:
    """Roll out, score, estimate, optimise: once. Collective: every rank calls it with the same prompts."""
    # 1. Roll out, a group of responses to each prompt.
    with turn.clock("rollout"):
        rollout = cast.sampler.generate(prompts, cfg.sampling, seed=turn.seed("rollout"), group_size=cfg.group_size)

    # 2. Score. Forward only, one model resident at a time.
    with turn.clock("score"):
        scored = score(cast, rollout, cast.panel.judge(rollout), cfg, turn)

    # 3. Estimate. A response against its siblings.
    with turn.clock("estimate"):
        rewards = token_level_rewards(scored, cast, cfg)
        std = None if cfg.group_std is None else cfg.group_std.divisor
        advantages = to_tokens(group_advantages(rewards.sum(1), cfg.group_size, std), rollout.response_mask)
        rows, corrected = lessons(scored, advantages, cfg)
        metrics = {**estimate_metrics(cast, scored, rewards, advantages, cfg), **corrected}
        cast.kl.observe(metrics, len(rollout))

    # 4. Optimise.
    with turn.clock("optimise"):
        updates = optimise(cast.actor, critic_free_loss(cast.actor, cfg), rows, turn, cfg)
    return CriticFreeIteration(rollout, scored.judgement, {**metrics, **policy_metrics(updates)}, rows, rewards)


TRAINER = policy_trainer(GRPOConfig, grpo_iteration, models=build_cast, learners=LEARNERS)
