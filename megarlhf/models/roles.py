"""The four roles of PPO, colocated: every rank holds its part of each, one of them resident at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megarlhf.models.role import FrozenRole, TrainableRole


@dataclass(frozen=True)
class Roles:
    """Actor and critic learn; reference and reward model cannot: their type has no way to."""

    actor: TrainableRole
    critic: TrainableRole
    reference: FrozenRole
    reward: FrozenRole
    wrong_score: float = math.inf
    """Mean score that the reward model gives to wrong responses; inf where nobody measured it."""

    @property
    def every(self) -> tuple[TrainableRole | FrozenRole, ...]:
        """All four."""
        return (self.actor, self.critic, self.reference, self.reward)

    def resident_bytes(self) -> int:
        """Bytes of weights, gradients and optimiser state on the device now."""
        return sum(role.resident_bytes() for role in self.every)
