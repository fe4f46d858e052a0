"""REINFORCE++: REINFORCE whose baseline is the batch, with PPO's clip and a KL in the reward.

    A_t = whiten(sum over s >= t of gamma^(s - t) r_s)      r_s: score at the last token, - kl_coef k1 at every one
    baseline=group: A_t = whiten(r_i - mean(r) of its group), at every token      whitened over all tokens
    baseline=token: A_t = whiten(sum over s >= t of r_s, less b_i for each of those tokens)
                    b_i = sum of the rewards of the others in its group / sum of their tokens

Source: Hu et al. 2025 (arXiv 2501.03262); the baseline of tokens PURE (2504.15275). Differs: there a step's tokens lose
theirs at its end, all at once, which is the same before the first of them; and a verifier has its own baseline, the
mean of the others' verdicts at the last token. Here all judges' rewards, and the KL's, are one sum.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.errors import ConfigError
from megarlhf.ops.advantages import gae
from megarlhf.ops.group_advantages import group_advantages, others_per_token, to_tokens
from megarlhf.ops.masked import masked_whiten
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


class ReinforceConfig(CriticFreeConfig):
    """`megarlhf reinforce`: actor, judges and a reference; no critic, and no groups needed."""

    compares_groups: ClassVar[bool] = False

    group_size: int = Field(default=1, ge=1)
    """Responses per prompt."""
    baseline: Literal["none", "group", "token"] = "none"
    """What is taken off before whitening: nothing; of a response's reward the mean of its group; or of each token's
    reward what the others in its group earned a token, which favours neither few steps nor many. Source: PURE."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token, without a baseline. Source: REINFORCE++."""
    kl_coef: float = Field(default=0.01, ge=0)
    """Cost of the KL to the reference, per nat; 0 needs no reference. Source: OpenRLHF."""
    kl_in: Literal["loss", "reward"] = "reward"
    """Where the KL is paid: in the reward, token by token. Source: REINFORCE++; with a baseline, in the loss there."""

    @property
    def learns_by_step(self) -> bool:
        """Where a token's advantage is of what follows it."""
        return self.baseline != "group"

    def check_sizes(self) -> None:
        """Raise where the numbers of a run do not go together, before anything is read."""
        if self.baseline == "group" and self.group_size == 1:
            raise ConfigError("baseline=group with group_size=1: a response less itself is 0; raise group_size.")
        if self.baseline == "token" and self.group_size == 1:
            raise ConfigError("baseline=token with group_size=1: there are no others to a prompt; raise group_size.")
        if self.baseline != "none" and self.gamma != 1.0:
            raise ConfigError(
                f"gamma={self.gamma:g} with baseline={self.baseline}: nothing is discounted; leave it out."
            )
        super().check_sizes()


def reinforce_iteration(cast: Cast, prompts: Prompts, cfg: ReinforceConfig, turn: Turn) -> CriticFreeIteration:
    """Roll out, score, estimate, optimise: once. Collective: every rank calls it with the same prompts."""
    # 1. Roll out.
    with turn.clock("rollout"):
        rollout = cast.sampler.generate(prompts, cfg.sampling, seed=turn.seed("rollout"), group_size=cfg.group_size)

    # 2. Score. Forward only, one model resident at a time.
    with turn.clock("score"):
        scored = score(cast, rollout, cast.panel.judge(rollout), cfg, turn)

    # 3. Estimate. A token against all others of the global batch.
    with turn.clock("estimate"):
        rewards = token_level_rewards(scored, cast, cfg)
        advantages = reinforced(rewards, rollout, cfg)
        rows, corrected = lessons(scored, masked_whiten(advantages, rollout.response_mask), cfg)
        metrics = {**estimate_metrics(cast, scored, rewards, advantages, cfg), **corrected}
        cast.kl.observe(metrics, len(rollout))

    # 4. Optimise.
    with turn.clock("optimise"):
        updates = optimise(cast.actor, critic_free_loss(cast.actor, cfg), rows, turn, cfg)
    return CriticFreeIteration(rollout, scored.judgement, {**metrics, **policy_metrics(updates)}, rows, rewards)


def reinforced(rewards: Tensor, rollout: Rollout, cfg: ReinforceConfig) -> Tensor:
    """[B, T], of token-level rewards: what follows each token, or its response's reward, less the baseline."""
    mask = rollout.response_mask
    if cfg.baseline == "group":
        return to_tokens(group_advantages(rewards.sum(1), cfg.group_size, None), mask)
    if cfg.baseline == "token":
        rewards = rewards - to_tokens(others_per_token(rewards.sum(1), mask.sum(1), cfg.group_size), mask)
    # With values of 0 and lambda 1 generalised advantages are discounted sums of rewards.
    return gae(rewards, rewards.new_zeros(rewards.shape), mask, rollout.terminated, gamma=cfg.gamma, lam=1.0)[0]


TRAINER = policy_trainer(ReinforceConfig, reinforce_iteration, models=build_cast, learners=LEARNERS)
