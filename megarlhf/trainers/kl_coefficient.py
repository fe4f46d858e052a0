"""What a nat of distance to the reference costs: a constant, or steered towards a distance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megarlhf.checkpoint.number_bits import bits_of, float_of
from megarlhf.errors import CheckpointError
from megarlhf.observe.metrics import Metrics

STEP = 0.2
"""Largest relative error that is acted on. Source: Ziegler et al. 2019."""


@dataclass
class KLCoefficient:
    """In force now; a part of the run's state where it is steered."""

    value: float
    """Cost of a nat, in reward or in the loss."""
    target: float | None = None
    """Nats a response to steer towards; None steers nowhere."""
    horizon: int = 10_000
    """Rollouts over which an error of STEP multiplies the coefficient by about e^STEP; at least an iteration's."""

    def observe(self, metrics: Metrics, rollouts: int) -> None:
        """Take in kl/reference_mean of an iteration's rollouts, in nats a response: the next iteration's coefficient.

            value <- value (1 + clip(kl / target - 1, -0.2, 0.2) rollouts / horizon)

        A KL that is not finite, of an iteration whose step is skipped, changes nothing.
        Source:   Ziegler et al. 2019, section 2.2.
        """
        kl = metrics.get("kl/reference_mean", math.nan)
        if self.target is not None and math.isfinite(kl):
            error = min(max(kl / self.target - 1.0, -STEP), STEP)
            self.value *= 1.0 + error * rollouts / self.horizon

    @property
    def parts(self) -> dict[str, KLCoefficient]:
        """What survives a stop, by name."""
        return {} if self.target is None else {"kl_coef": self}

    def state(self) -> dict[str, int]:
        """Everything needed to go on from here."""
        return {"value": bits_of(self.value)}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from `state`. Raises CheckpointError where it is of something else."""
        value = float_of(state.get("value", -1))
        if state.keys() != self.state().keys() or value < 0 or not math.isfinite(value):
            raise CheckpointError(f"the KL coefficient is damaged ({dict(state)}); resume from another state.")
        self.value = value
