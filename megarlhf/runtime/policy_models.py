"""The models of a policy: it, what draws its rollouts, and what it is kept near. Every rank holds its part of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megarlhf.models.role import FrozenRole, Role, TrainableRole
from megarlhf.rollout.engine import RolloutEngine


@dataclass(frozen=True, kw_only=True)
class PolicyModels:
    """Colocated: one model is resident at a time. The reference cannot learn: its type has no way to."""

    actor: TrainableRole
    sampler: RolloutEngine
    """Draws from the actor's own weights."""
    reference: FrozenRole | None
    """None where nothing asks for one."""

    @property
    def every(self) -> tuple[Role, ...]:
        """All models."""
        return (self.actor, *([] if self.reference is None else [self.reference]))

    @property
    def learners(self) -> Mapping[str, TrainableRole]:
        """Those that learn, by name; the first is what the run makes."""
        return {"actor": self.actor}

    def resident_bytes(self) -> int:
        """Bytes of weights, gradients and optimiser state on the device now."""
        return sum(role.resident_bytes() for role in self.every)
