"""Settings of algorithms that keep their policy near a reference."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from megarlhf.config.base import FreeToChange
from megarlhf.errors import ConfigError
from megarlhf.observe.metrics import names_of
from megarlhf.trainers.kl_coefficient import KLCoefficient
from megarlhf.trainers.policy_config import PolicyConfig


class AnchoredConfig(PolicyConfig):
    """A policy with a KL to its reference."""

    first: ClassVar[tuple[str, ...]] = (*PolicyConfig.first, "kl_coef")

    kl_coef: float = Field(default=0.05, ge=0)
    """Cost of the KL to the reference in the reward, per nat. Source: Huang et al. 2024."""
    kl_target_per_response: float | None = Field(default=None, gt=0)
    """Nats a response, kl/reference_mean, towards which kl_coef is steered from where it starts; null: it stays there.
    Source: Ziegler et al. 2019, who aim at 6."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Rollouts in which kl_coef can change by about a fifth. Source: Ziegler et al. 2019."""
    exact_kl_every: Annotated[int, FreeToChange()] = Field(default=0, ge=0)
    """Iterations between two measurements of the KL to the reference over the whole vocabulary, `kl/reference_exact`: a
    forward pass of either model more. 0 measures none. Where nothing else asks for a reference (`kl_coef=0`, and no
    `reference.init`), one is loaded for this, and read in these iterations alone: they alone log a KL then."""

    @property
    def kl_coefficient(self) -> KLCoefficient:
        """What a nat costs, from the start."""
        return KLCoefficient(self.kl_coef, self.kl_target_per_response, self.kl_horizon)

    @property
    def always_measures_kl(self) -> bool:
        """Whether the distance to a reference is asked for in every iteration, not in those of exact_kl_every alone."""
        return super().needs_reference or self.kl_coef > 0

    @property
    def needs_reference(self) -> bool:
        """Whether the distance to a reference is asked for."""
        return self.always_measures_kl or self.exact_kl_every > 0

    @property
    def measures_kl(self) -> bool:
        """Whether kl/reference_mean is logged, in some iterations at least."""
        return self.needs_reference

    @property
    def logged(self) -> set[str]:
        """Metrics of every iteration in which all learners learn."""
        sometimes = {"kl/reference_exact"} if self.exact_kl_every != 1 else set()
        always = self.always_measures_kl or self.exact_kl_every == 1
        return super().logged | (names_of("kl") - sometimes if always else set())

    def check_sizes(self) -> None:
        """Raise where the numbers of a run do not go together, before anything is read."""
        if self.kl_target_per_response is not None and self.kl_coef == 0:
            raise ConfigError(
                f"kl_target_per_response={self.kl_target_per_response:g} with kl_coef=0: it is multiplied, and stays "
                "0; set kl_coef to where it shall start."
            )
        usual = type(self).model_fields["kl_horizon"].default
        if self.kl_target_per_response is None and self.kl_horizon != usual:
            raise ConfigError(f"kl_horizon={self.kl_horizon} is of a target; set kl_target_per_response too.")
        if self.kl_target_per_response is not None and self.kl_horizon < self.rollouts_per_iteration:
            raise ConfigError(
                f"kl_horizon={self.kl_horizon} is less than an iteration's {self.rollouts_per_iteration} rollouts, and "
                "kl_coef could change its sign in one; raise it."
            )
        super().check_sizes()
