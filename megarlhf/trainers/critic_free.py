"""The floor that the pages without a critic stand on: what is scored, rewarded and learnt from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from megarlhf.batch.rollouts import Anchored, Rollout
from megarlhf.config import Config
from megarlhf.errors import ConfigError
from megarlhf.judges.panel import Judgement
from megarlhf.models.compute import Choice
from megarlhf.models.role import TrainableRole
from megarlhf.observe.metrics import Metrics, names_of
from megarlhf.ops.group_advantages import GroupStd, equal_groups
from megarlhf.ops.kl import kl_estimate
from megarlhf.ops.rewards import add_kl_penalty
from megarlhf.parallel.micro_batches import Loss, States
from megarlhf.trainers.anchored import AnchoredConfig
from megarlhf.trainers.policy_loop import Cast, Iteration, Turn, old_logprobs
from megarlhf.trainers.policy_loss import loss_of, policy_terms
from megarlhf.trainers.policy_metrics import (
    advantage_metrics,
    exact_metrics,
    reference_metrics,
    rollout_metrics,
    step_metrics,
)
from megarlhf.trainers.trainer import Learner
from megarlhf_kernels import Anchor, PolicyTerms
from megarlhf_kernels.linear_ppo import Estimator, Surrogate


class GroupStdConfig(Config):
    """What a group's advantages are divided by: its standard deviation + eps."""

    correction: Literal[0, 1] = 1
    """The squares are divided by the responses less this. Source: 1 in TRL, verl, OpenRLHF; 0 in open-instruct."""
    eps: float = Field(default=1e-6, gt=0)
    """Source: 1e-6 in verl, slime, ROLL; 1e-4 in TRL."""

    @property
    def divisor(self) -> GroupStd:
        """For the formula."""
        return GroupStd(self.correction, self.eps)


class CriticFreeConfig(AnchoredConfig):
    """A policy that learns from several responses to each prompt, or from the batch, without a critic."""

    compares_groups: ClassVar[bool] = True
    """Whether one response to a prompt says nothing."""

    group_size: int = Field(default=8, ge=1)
    """Responses per prompt."""
    epochs: int = Field(default=1, ge=1)
    """Passes over an iteration's rollouts. Source: 1 in GRPO (arXiv 2402.03300)."""
    kl_coef: float = Field(default=0.04, ge=0)
    """Cost of the KL to the reference, per nat; 0 needs no reference. Source: 0.04 in GRPO."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL is paid: token by token in the loss, or in the reward that advantages are made of."""
    kl_estimator: Estimator | None = None
    """k1, k2 or k3 of a token; null: k1 in the reward, where the others have another gradient than the KL's, and k3 in
    the loss, where each is weighed by the ratio, so that its mean gradient is the KL's: the same one for k2 and k3."""
    surrogate: Surrogate = "clip"
    """`clip`: a token whose ratio was clipped loses its gradient; `cispo`: it keeps it, with the clipped weight."""
    ratio: Literal["token", "sequence"] = "token"
    """Whose ratio is clipped: each token's, or the geometric mean of its response, which the chunks of a fused
    policy_loss would cut."""

    @property
    def fuses_loss(self) -> bool:
        """Whether the actor's loss makes its gradients while the logits are there."""
        return super().fuses_loss and self.ratio == "token"

    @property
    def policy_loss_choice(self) -> Choice:
        """How the actor's loss is computed, for the table of what a run uses."""
        if self.ratio == "token":
            return super().policy_loss_choice
        return Choice("policy loss", "from log-probs, 4 matmuls", "ratio=sequence")

    @property
    def estimator(self) -> Estimator:
        """Of the KL, as chosen or by default."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")

    @property
    def passes(self) -> int:
        """Over an iteration's rollouts."""
        return self.epochs

    @property
    def logged(self) -> set[str]:
        """Metrics of every iteration."""
        return super().logged | (names_of("group") if self.group_size > 1 else set())

    def check_sizes(self) -> None:
        """Raise where the numbers of a run do not go together, before anything is read."""
        if self.compares_groups and self.group_size == 1:
            raise ConfigError(
                "group_size=1: a response is compared with the others to its prompt, and there is none; set it to 2 or "
                "more, or take reinforce, which compares with the batch."
            )
        if self.kl_in == "loss" and self.kl_target_per_response is not None:
            raise ConfigError(
                f"kl_target_per_response={self.kl_target_per_response:g} steers a KL in the reward; set kl_in=reward, "
                "or leave it out."
            )
        if self.ratio == "sequence" and self.policy_loss == "fused":
            raise ConfigError(
                "policy_loss=fused with ratio=sequence: its chunks would cut responses, whose ratio is of all their "
                "tokens; set policy_loss to auto or composed."
            )
        if self.surrogate == "cispo" and self.dual_clip is not None:
            raise ConfigError(f"dual_clip={self.dual_clip:g} is of surrogate=clip, cispo has none; leave it out.")
        super().check_sizes()


@dataclass(frozen=True)
class CriticFreeIteration(Iteration):
    """And what was learnt from; where more was drawn, that is not all of the rollouts."""

    rows: Anchored
    token_level_rewards: Tensor


@dataclass(frozen=True)
class Scored:
    """What is said of rollouts before anything is learnt: [B, T] fp32."""

    rollout: Rollout
    judgement: Judgement
    logprobs: Tensor
    """The actor's, as old_logprobs says."""
    ref_logprobs: Tensor | None
    """None where no reference is read."""
    exact: Metrics
    """The distance to it over the whole vocabulary, in iterations in which it is measured."""


def score(cast: Cast, rollout: Rollout, judgement: Judgement, cfg: CriticFreeConfig, turn: Turn) -> Scored:
    """Ask the actor and, where there is one, the reference. Collective; one model is resident at a time."""
    logprobs, reference = old_logprobs(cast.actor, rollout, cfg), cast.reference
    due = turn.due(cfg.exact_kl_every)
    if reference is None or not (cfg.always_measures_kl or due):
        return Scored(rollout, judgement, logprobs, None, {})
    temperature = cfg.sampling.temperature
    exact = exact_metrics(cast.actor, reference, rollout, temperature) if due else {}
    return Scored(rollout, judgement, logprobs, reference.score(rollout), exact)


def token_level_rewards(scored: Scored, cast: Cast, cfg: CriticFreeConfig) -> Tensor:
    """[B, T]: the shaped score where it was earned and, with kl_in=reward, the KL's cost at every response token."""
    earned = cast.shaper.earned(scored.judgement.token_scores, scored.rollout)
    ref = scored.logprobs if scored.ref_logprobs is None or cfg.kl_in == "loss" else scored.ref_logprobs
    kl = kl_estimate(scored.logprobs, ref, cfg.estimator)
    mask = scored.rollout.response_mask
    return add_kl_penalty(earned.last, kl, mask, kl_coef=cast.kl.value, earlier=earned.earlier)


def lessons(scored: Scored, advantages: Tensor, cfg: CriticFreeConfig) -> tuple[Anchored, Metrics]:
    """What the actor learns from, of advantages [B, T]; and what is logged of the sampler's correction."""
    corrected, metrics = cfg.sampler_correction.correct(advantages, scored.logprobs, scored.rollout)
    ref = scored.logprobs if scored.ref_logprobs is None else scored.ref_logprobs
    return Anchored(scored.rollout, scored.logprobs, corrected, ref), metrics


def estimate_metrics(cast: Cast, scored: Scored, rewards: Tensor, advantages: Tensor, cfg: CriticFreeConfig) -> Metrics:
    """Of an iteration's rollouts, their rewards and advantages [B, T]."""
    rollout, scores = scored.rollout, scored.judgement.scores
    metrics = {
        **scored.judgement.metrics,
        **rollout_metrics(rollout, scored.logprobs, scores, rewards),
        **step_metrics(scored.judgement, rollout),
        **group_metrics(scores, cfg.group_size),
        **advantage_metrics(advantages, rollout.response_mask),
        **scored.exact,
    }
    if scored.ref_logprobs is not None:
        mask, coef = rollout.response_mask, cast.kl.value
        metrics |= reference_metrics(scored.logprobs, scored.ref_logprobs, mask, kl_coef=coef, estimator=cfg.estimator)
    return metrics


def group_metrics(scores: Tensor, group_size: int) -> Metrics:
    """Of scores [B], those to one prompt adjacent; nothing where there is one a prompt."""
    if group_size == 1:
        return {}
    return {
        "group/equal_fraction": float(equal_groups(scores, group_size).float().mean()),
        "group/score_std_mean": float(scores.view(-1, group_size).std(1, correction=0).mean()),
    }


def critic_free_loss(actor: TrainableRole, cfg: CriticFreeConfig) -> Loss[Anchored]:
    """The surrogate, and the KL where it is in the loss."""
    return loss_of(actor, cfg, partial(_terms, cfg), by_sequence=cfg.ratio == "sequence")


def _terms(cfg: CriticFreeConfig, states: States, rows: Anchored) -> PolicyTerms:
    terms = replace(policy_terms(cfg, states, rows), surrogate=cfg.surrogate)
    if cfg.kl_in == "reward" or cfg.kl_coef == 0:
        return terms
    anchor = Anchor(terms.logprobs, states.of(rows.ref_logprobs), cfg.kl_coef, cfg.estimator)
    return replace(terms, anchor=anchor)


LEARNERS = {"actor": Learner(Anchored, critic_free_loss)}
"""Who learns what, in every algorithm without a critic."""
