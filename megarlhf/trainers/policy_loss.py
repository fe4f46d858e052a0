"""The clipped surrogate on a role: fused with the vocabulary projection, or composed of its parts."""

from __future__ import annotations

import torch

from megarlhf.batch.rollouts import PolicyRows
from megarlhf.models.role import TrainableRole
from megarlhf.ops.policy_loss import clipped_policy_loss
from megarlhf.parallel.micro_batches import Loss, LossSums, States
from megarlhf.trainers.policy_config import PolicyConfig
from megarlhf_kernels import PolicyTerms


def policy_loss(actor: TrainableRole, cfg: PolicyConfig) -> Loss[PolicyRows]:
    """The clipped surrogate summed over response tokens: fused with the vocabulary projection, or composed of parts."""

    def fused(states: States, rows: PolicyRows) -> LossSums:
        terms = PolicyTerms(
            states.of(rows.logprobs),
            states.of(rows.advantages),
            clip_range=cfg.clip_range,
            temperature=cfg.sampling.temperature,
            entropy_coef=cfg.entropy_coef,
        )
        total, metrics = actor.model.policy_loss(states.hidden, states.of(rows.labels), terms)
        return LossSums(total, states.count, metrics)

    def composed(states: States, rows: PolicyRows) -> LossSums:
        new_logprobs, entropy = actor.model.label_logprobs(
            states.hidden, states.of(rows.labels), temperature=cfg.sampling.temperature, with_entropy=True
        )
        total, metrics = clipped_policy_loss(
            new_logprobs, states.of(rows.logprobs), states.of(rows.advantages), clip_range=cfg.clip_range
        )
        bonus = entropy.sum(dtype=torch.float64)
        if cfg.entropy_coef:
            total = total - cfg.entropy_coef * bonus
        return LossSums(total, states.count, {**metrics, "entropy": bonus.detach()})

    return fused if cfg.policy_loss == "fused" else composed
