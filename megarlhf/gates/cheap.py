"""Gates that are cheap enough to be measured before a run's first step.

Each is a function that returns a `Gate`, equal on every rank. None of them takes an optimiser step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from megarlhf.batch.rollouts import PolicyRows, Prompts, Rollout
from megarlhf.data.prompts import PromptSet
from megarlhf.gates.gate import Gate, bounds_of, skip, worst
from megarlhf.models.role import Role, TrainableRole
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Cut, Loss
from megarlhf.parallel.pipeline import LossMeans
from megarlhf.parallel.rng import derive_seed, generator
from megarlhf.rollout.sampling import SamplingConfig
from megarlhf.rollout.shards import WORDS
from megarlhf.runtime.policy_models import PolicyModels

PROMPTS, SAMPLES, TOKENS = 4, 2, 16
"""Of a gate's batch: prompts a data rank, responses a prompt (so that a prefilled prompt is forked), response tokens at
most. Some hundred tokens show every fault of the arithmetic and cost less than one step of training."""
CHUNK = 2**22
"""Numbers that are fingerprinted at once; bounds the memory that it takes."""


class Lesson(NamedTuple):
    """What the actor learns from, and how."""

    rows: type[PolicyRows]
    loss: Loss
    """Over such rows. It reports `ratio`, `clip_fraction` and `approx_kl`."""


def cheap_gates(
    cast: PolicyModels,
    prompts: Prompts,
    lesson: Lesson,
    sampling: SamplingConfig,
    *,
    seed: int,
    reference_is_actor: bool,
) -> list[Gate]:
    """What a run measures before its first step: seconds, and no trace in weights, optimiser state or random numbers.

    prompts: those of `gate_prompts`; reference_is_actor: both have the same weights now.
    Memory:   one role is resident at a time, as in training. Ranks: collective over the mesh; equal on every rank.
    """
    actor, device = cast.actor, cast.actor.mesh.device
    offload = offload_gate(cast.every)
    if offload.fails:  # the others would measure what is left of the weights
        return [offload]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        rollout = fresh_rollout(cast, prompts, sampling, seed=seed)
        return [
            offload,
            sampler_gate(actor, rollout),
            first_pass_gate(actor, rollout, lesson, seed=seed),
            reference_gate(cast, rollout, reference_is_actor=reference_is_actor),
        ]


def gate_prompts(prompts: PromptSet, mesh: Mesh) -> Prompts:
    """The first prompts of the set, as many as a gate's batch has on the ranks of `mesh`."""
    return prompts.batch(torch.arange(PROMPTS * mesh.layout.data) % len(prompts))


def fresh_rollout(cast: PolicyModels, prompts: Prompts, sampling: SamplingConfig, *, seed: int) -> Rollout:
    """Short responses of the actor, as the run samples them."""
    short = sampling.model_copy(update={"max_new_tokens": min(TOKENS, sampling.max_new_tokens)})
    return cast.sampler.generate(prompts, short, seed=derive_seed(seed, "gates"), group_size=SAMPLES)


def sampler_gate(actor: TrainableRole, rollout: Rollout) -> Gate:
    """The sampler and the trainer give each sampled token the same log-prob."""
    gap = (rollout.sampler_logprobs - actor.score(rollout))[rollout.response_mask]
    return Gate(
        "sampler",
        worst(gap.abs(), actor.mesh),
        bounds_of(actor).sampler,
        "largest difference of a token's log-prob between sampler and trainer, in nats",
        "ratios would start away from 1: try compute.layers=local and compute.cuda_graphs=false to find which "
        "implementation is off, or compute.dtype=float32 to rule out rounding",
    )


def first_pass_gate(actor: TrainableRole, rollout: Rollout, lesson: Lesson, *, seed: int) -> Gate:
    """On rows that were just scored the ratio is 1, nothing is clipped and the policy has not moved."""
    batch = probe_rows(actor, rollout, lesson, seed=seed)
    with gradients(actor, batch, lesson.loss, actor.settings.cut) as means:
        told = means.metrics
    return Gate(
        "first pass",
        worst(torch.tensor([told["ratio"] - 1.0, told["clip_fraction"], told["approx_kl"]]).abs(), actor.mesh),
        bounds_of(actor).first_pass,
        "largest of |mean ratio - 1|, clip fraction and approximate KL on rows just scored",
        "scoring and training disagree on the same weights: try policy_loss=composed and compute.layers=local to find "
        "which forward is off",
    )


def reference_gate(cast: PolicyModels, rollout: Rollout, *, reference_is_actor: bool) -> Gate:
    """A reference with the actor's weights has the actor's log-probs, so the KL penalty starts at 0."""
    name = "reference"
    if cast.reference is None:
        return skip(name, "nothing keeps the policy near a reference, so there is none")
    if not reference_is_actor:
        return skip(name, "the reference and the actor have different weights")
    gap = (cast.actor.score(rollout) - cast.reference.score(rollout))[rollout.response_mask]
    return Gate(
        name,
        worst(gap.abs(), cast.actor.mesh),
        bounds_of(cast.actor).reference,
        "largest difference of a token's log-prob between the actor and a reference of the same weights, in nats",
        "the KL penalty would pull towards another model: check that nothing is writing to actor.init, and try "
        "offload=none",
    )


def offload_gate(roles: Sequence[Role]) -> Gate:
    """Weights and optimiser state come back from the host as they went. Every role is away afterwards."""
    name = "offload"
    if roles[0].settings.offload == "none":
        return skip(name, "offload=none moves nothing")
    return Gate(
        name,
        worst(torch.tensor([_lost_in_transit(role) for role in roles]), roles[0].mesh),
        0.0,
        "tensors of one role that changed on the way to the host and back",
        "weights would be lost between phases: set offload=none, and check the machine's memory",
    )


def _lost_in_transit(role: Role) -> int:
    prints = []
    for _ in range(2):
        with role.resident(*role.parts):
            prints.append(state_of(role))
        role.leave()
    return sum(then != now or now is None for then, now in zip(*prints, strict=True))


def state_of(role: Role) -> list[int | None]:
    """Fingerprints of weights and optimiser state, which must be resident; gradients are dropped on purpose."""
    return [fingerprint(tensor) for part in role.parts if part != "gradients" for tensor in role.tensors(part)]


def fingerprint(tensor: Tensor) -> int | None:
    """64 bits that any change of a single number changes; None for a tensor whose bytes are gone.

        sum_i (2 i + 1) bits_i   modulo 2^64

    Memory:   16 bytes for each of `CHUNK` numbers.
    """
    if tensor.numel() and not tensor.untyped_storage().nbytes():
        return None
    words = tensor.detach().reshape(-1).view(WORDS[tensor.element_size()])
    total = 0
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK].long()
        odd = torch.arange(start, start + len(part), device=part.device) * 2 + 1
        total += int((part * odd).sum())
    return total % 2**64


def probe_rows(role: TrainableRole, rollout: Rollout, lesson: Lesson, *, seed: int) -> PolicyRows:
    """Rows of a rollout with the log-probs that the role gives it now, and random numbers else. Collective."""
    return lesson.rows.random(rollout, role.score(rollout), generator(seed, "gates", "rows"))


@contextmanager
def gradients(role: TrainableRole, batch: PolicyRows, loss: Loss, cut: Cut) -> Iterator[LossMeans]:
    """The gradient of the mean loss in the role's buffers inside the block; zeroed after it, and no step taken.

    Ranks:    all of the gradient is on each, whether the optimiser is distributed or not.
    """
    with role.resident("weights", "gradients"):
        _zero_gradients(role)
        yield role.accumulate(batch, loss, cut, everywhere=True)
        _zero_gradients(role)


def _zero_gradients(role: TrainableRole) -> None:
    for wrapped in role.wrapped:
        wrapped.zero_grad_buffer()
