"""The policy loss on a role: fused with the vocabulary projection, or composed of its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

from torch import Tensor

from megarlhf.batch.rollouts import PolicyRows
from megarlhf.models.role import TrainableRole
from megarlhf.ops.policy_loss import sequence_logprobs
from megarlhf.parallel.micro_batches import Loss, LossSums, States
from megarlhf.trainers.policy_config import PolicyConfig
from megarlhf_kernels import PolicyTerms
from megarlhf_kernels.linear_ppo import METRICS

Rows = TypeVar("Rows", bound=PolicyRows)


def policy_loss(actor: TrainableRole, cfg: PolicyConfig) -> Loss[PolicyRows]:
    """The clipped surrogate of PPO, and what is added to it."""
    return loss_of(actor, cfg, partial(policy_terms, cfg))


def policy_terms(cfg: PolicyConfig, states: States, rows: PolicyRows) -> PolicyTerms:
    """What the settings say of each token, without those of one algorithm."""
    return PolicyTerms(
        states.of(rows.logprobs),
        states.of(rows.advantages),
        clip=cfg.clip,
        weights=token_weights(cfg, states, rows),
        temperature=cfg.sampling.temperature,
        entropy_coef=cfg.entropy_coef,
    )


def loss_of(
    actor: TrainableRole,
    cfg: PolicyConfig,
    terms_of: Callable[[States, Rows], PolicyTerms],
    *,
    by_sequence: bool = False,
) -> Loss[Rows]:
    """The loss that its terms describe, summed over response tokens, and what it is to be divided by.

    terms_of: what it says of the states of some rows. by_sequence: the ratio is that of whole responses, which the
    chunks of a fused loss would cut.
    """

    def fused(states: States, rows: Rows) -> LossSums:
        total, metrics = actor.model.policy_loss(states.hidden, states.of(rows.labels), terms_of(states, rows))
        return LossSums(total, loss_count(cfg, states, rows), metrics, states.count)

    def composed(states: States, rows: Rows) -> LossSums:
        new_logprobs, entropy = actor.model.label_logprobs(
            states.hidden, states.of(rows.labels), temperature=cfg.sampling.temperature, with_entropy=True
        )
        terms = terms_of(states, rows)
        if by_sequence:
            logprobs = sequence_logprobs(new_logprobs.detach(), terms.logprobs, states.row, len(rows))
            terms = replace(terms, logprobs=logprobs)
        total, metrics = terms.loss(new_logprobs, entropy, slice(None), impl="auto")
        named: dict[str, Tensor] = dict(zip(METRICS, metrics.unbind(), strict=True))
        return LossSums(total, loss_count(cfg, states, rows), named, states.count)

    return composed if cfg.policy_loss == "composed" or by_sequence else fused


def token_weights(cfg: PolicyConfig, states: States, rows: PolicyRows) -> Tensor | None:
    """[n]: of each token in the sum that `loss_count` divides; None: 1."""
    match cfg.loss_mean:
        case "token":
            return None
        case "sequence":
            return (1.0 / rows.rollout.response_lengths.float())[states.row]
        case "constant":
            return states.of(rows.advantages).new_full((states.count,), 1.0 / cfg.sampling.max_new_tokens)


def loss_count(cfg: PolicyConfig, states: States, rows: PolicyRows) -> int:
    """What a micro-batch adds to the divisor of its step: its tokens, or its rows."""
    return states.count if cfg.loss_mean == "token" else len(rows)
