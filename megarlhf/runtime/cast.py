"""The models that a page of reinforcement learning is handed: every rank holds its part of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megarlhf.models.role import FrozenRole, Role, TrainableRole
from megarlhf.rollout.engine import RolloutEngine


@dataclass(frozen=True, kw_only=True)
class Cast:
    """A policy, what it is measured by, and what draws its rollouts, colocated: one model is resident at a time.

    Reference and reward model cannot learn: their type has no way to. An algorithm with more models adds them to
    `every` and, where they learn, to `learners`.
    """

    actor: TrainableRole
    sampler: RolloutEngine
    """Draws from the actor's own weights."""
    reference: FrozenRole
    reward: FrozenRole
    wrong_score: float = math.inf
    """Mean score that the reward model gives to wrong responses; inf where nobody measured it."""

    @property
    def every(self) -> tuple[Role, ...]:
        """All models."""
        return (self.actor, self.reference, self.reward)

    @property
    def learners(self) -> Mapping[str, TrainableRole]:
        """Those that learn, by name; the first is what the run makes."""
        return {"actor": self.actor}

    def resident_bytes(self) -> int:
        """Bytes of weights, gradients and optimiser state on the device now."""
        return sum(role.resident_bytes() for role in self.every)
