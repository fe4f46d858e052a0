"""PPO with actor, critic, reference and reward model on the same ranks.

Source: Schulman et al. 2017; details of Huang et al. 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import Field
from torch import Tensor

from megarlhf.batch.rollouts import PolicyRows, Prompts, Rollout, ValueRows
from megarlhf.errors import ConfigError
from megarlhf.judges.reward_model import ScalarModelConfig
from megarlhf.models.role import FrozenRole, Role, TrainableRole
from megarlhf.observe.metrics import names_of
from megarlhf.ops.advantages import Advantages, shaped_gae
from megarlhf.ops.rewards import Earned
from megarlhf.ops.value_loss import clipped_value_loss
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Loss, LossSums, States
from megarlhf.runtime.roles import away, learner
from megarlhf.trainers.anchored import AnchoredConfig
from megarlhf.trainers.policy_config import PolicyInputs
from megarlhf.trainers.policy_loop import Cast, Iteration, Turn, build_cast, old_logprobs, optimise, policy_trainer
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.policy_metrics import (
    advantage_metrics,
    critic_metrics,
    exact_metrics,
    policy_metrics,
    reference_metrics,
    rollout_metrics,
    step_metrics,
    value_metrics,
)
from megarlhf.trainers.role_config import LearnerConfig
from megarlhf.trainers.trainer import Learner
from megarlhf_kernels.rewards_gae import Discount, Shaping


class PPOConfig(AnchoredConfig):
    """`megarlhf ppo`: actor, critic, reference and reward model on the same ranks."""

    critic: LearnerConfig = LearnerConfig()
    """The value model. Source of its start, the reward model: Huang et al. 2024."""
    ppo_epochs: int = Field(default=4, ge=1)
    """Passes over an iteration's rollouts. Source: 4 in Huang et al. 2024."""
    value_warmup_iterations: int = Field(default=0, ge=0)
    """First iterations in which only the critic learns; the actor's own warm-up is actor.optim.warmup_steps."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token. Source: Huang et al. 2024."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Decay of generalised advantage estimation, per token. Source: Huang et al. 2024."""
    value_clip_range: float = Field(default=0.5, gt=0)
    """Values move at most this far from the old ones, in reward, before the loss ignores them.
    Source: 0.5 in OpenRLHF, verl and NeMo RL's recipes; 0.2 in Huang et al. 2024 (docs/algorithms.md has both)."""

    @property
    def passes(self) -> int:
        """Over an iteration's rollouts."""
        return self.ppo_epochs

    @property
    def always_measures_kl(self) -> bool:
        """Always, whatever it costs."""
        return True

    @property
    def first_iteration(self) -> int:
        """The first iteration in which the actor learns."""
        return self.value_warmup_iterations

    @property
    def learns_by_step(self) -> bool:
        """Always: by what comes after a token."""
        return True

    @property
    def critic_steps(self) -> int:
        """Optimiser steps of the critic in all iterations."""
        return self.iterations * self.steps_per_iteration

    @property
    def inits(self) -> dict[str, str]:
        """Where the model of each role starts; the critic, unless it is told, where the reward model does."""
        models = (judge.init for judge in self.panel.values() if isinstance(judge, ScalarModelConfig))
        return {**super().inits, "critic": self.critic.init or next(models, "")}

    @property
    def logged(self) -> set[str]:
        """Metrics of every iteration in which both models learn."""
        return super().logged | names_of("value")

    def check_sizes(self) -> None:
        """Raise where the numbers of a run do not go together, before anything is read."""
        if self.value_warmup_iterations >= self.iterations:
            raise ConfigError(
                f"value_warmup_iterations={self.value_warmup_iterations} leaves none of the "
                f"iterations={self.iterations} to the actor; set value_warmup_iterations below {self.iterations}."
            )
        super().check_sizes()
        self.critic.optim.check(self.critic_steps, "critic.optim")


@dataclass(frozen=True, kw_only=True)
class PPOCast(Cast):
    """With a critic, which learns too."""

    critic: TrainableRole
    reference: FrozenRole

    @property
    def every(self) -> tuple[Role, ...]:
        """All models, the critic among them."""
        return (*super().every, self.critic)

    @property
    def learners(self) -> Mapping[str, TrainableRole]:
        """Both that learn, by name."""
        return {**super().learners, "critic": self.critic}


class Scored(NamedTuple):
    """What the four models say of rollouts, before anything is learnt: [B, T] fp32, and scores [B]."""

    rollout: Rollout
    logprobs: Tensor
    """The actor's, as old_logprobs says."""
    ref_logprobs: Tensor
    values: Tensor
    scores: Tensor
    """Before any penalty."""


@dataclass(frozen=True)
class PPOIteration(Iteration):
    """And what was said and estimated of its rollouts."""

    scored: Scored
    estimate: Advantages


def ppo_iteration(cast: PPOCast, prompts: Prompts, cfg: PPOConfig, turn: Turn) -> PPOIteration:
    """Roll out, score, estimate, optimise: once. Collective: every rank calls it with the same prompts."""
    # 1. Roll out. Only the actor is resident, so the KV cache may have the rest of the memory.
    with turn.clock("rollout"):
        rollout = cast.sampler.generate(prompts, cfg.sampling, seed=turn.seed("rollout"), group_size=cfg.group_size)

    # 2. Score. Forward only, one model resident at a time.
    with turn.clock("score"):
        judgement = cast.panel.judge(rollout)
        scored = Scored(
            rollout,
            logprobs=old_logprobs(cast.actor, rollout, cfg),
            ref_logprobs=cast.reference.score(rollout),
            values=cast.critic.score(rollout),
            scores=judgement.scores,
        )
        temperature = cfg.sampling.temperature
        exact = exact_metrics(cast.actor, cast.reference, rollout, temperature) if turn.due(cfg.exact_kl_every) else {}

    # 3. Estimate. fp32, pure, over the global batch, identical on every rank.
    with turn.clock("estimate"):
        kl_coef = cast.kl.value
        estimate = estimated(scored, cast.shaper.earned(judgement.token_scores, rollout), cfg, kl_coef=kl_coef)
        advantages, corrected = cfg.sampler_correction.correct(estimate.whitened, scored.logprobs, rollout)
        distance = reference_metrics(scored.logprobs, scored.ref_logprobs, rollout.response_mask, kl_coef=kl_coef)
        metrics = {
            **judgement.metrics,
            **rollout_metrics(rollout, scored.logprobs, scored.scores, estimate.token_level_rewards),
            **step_metrics(judgement, rollout),
            **distance,
            **exact,
            **corrected,
            **advantage_metrics(estimate.advantages, rollout.response_mask),
            **value_metrics(scored.values, estimate.returns, rollout.response_mask),
        }
        lessons = PolicyRows(rollout, scored.logprobs, advantages)
        targets = ValueRows(rollout, scored.values, estimate.returns)

    # 4. Optimise. Each learner sees the same mini-batches; one of them is resident at a time.
    with turn.clock("optimise"):
        actor = []
        if turn.number >= cfg.value_warmup_iterations:
            cast.kl.observe(metrics, len(rollout))  # before that nothing can move it
            actor = optimise(cast.actor, policy_loss(cast.actor, cfg), lessons, turn, cfg)
        critic = optimise(cast.critic, value_loss(cast.critic, cfg), targets, turn, cfg)

    learnt = {**policy_metrics(actor), **critic_metrics(critic)}
    return PPOIteration(rollout, judgement, {**metrics, **learnt}, scored, estimate)


def estimated(scored: Scored, earned: Earned, cfg: PPOConfig, *, kl_coef: float) -> Advantages:
    """Token-level rewards, advantages and returns of the global batch; `earned`: by its scores."""
    rollout = scored.rollout
    return shaped_gae(
        scored.logprobs,
        scored.values,
        rollout.response_mask,
        rollout.terminated,
        Shaping(scored.ref_logprobs, earned.last, kl_coef, earned.earlier),
        Discount(cfg.gamma, cfg.gae_lambda),
    )


def value_loss(critic: TrainableRole, cfg: PPOConfig) -> Loss[ValueRows]:
    """The clipped regression on returns, summed over response tokens."""

    def loss(states: States, rows: ValueRows) -> LossSums:
        total, metrics = clipped_value_loss(
            critic.reading(critic.model, states, rows),
            states.of(rows.values),
            states.of(rows.returns),
            value_clip_range=cfg.value_clip_range,
        )
        return LossSums(total, states.count, metrics, states.count)

    return loss


def models(cfg: PPOConfig, inputs: PolicyInputs, mesh: Mesh) -> PPOCast:
    """Load all four, one after another, each moved off the device before the next arrives. Collective."""
    others = build_cast(cfg, inputs, mesh)
    values = inputs.models["critic"].description.values()
    start, learns = inputs.models["critic"], cfg.critic
    critic = away(learner("critic", start, values, learns.optim, cfg.critic_steps, cfg, mesh, learns.lora))
    return PPOCast(**vars(others), critic=critic)  # reference among them: PPOConfig needs one


TRAINER = policy_trainer(
    PPOConfig,
    ppo_iteration,
    models=models,
    learners={"actor": Learner(PolicyRows, policy_loss), "critic": Learner(ValueRows, value_loss)},
)
