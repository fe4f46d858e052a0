"""The gap between sampler and trainer, made up for by a factor on the advantages."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.config import Config
from megarlhf.errors import ConfigError
from megarlhf.observe.metrics import Metrics
from megarlhf.ops.sampler_correction import Rule, sampler_corrections

_BOUNDS: dict[Rule, tuple[float, float]] = {
    "none": (0.0, 0.0),
    "truncate": (0.0, 2.0),
    "mask": (0.5, 5.0),
    "sequence_mask": (0.999, 1.002),
}


class SamplerCorrectionConfig(Config):
    """With w = exp(logprobs - sampler_logprobs) of a token."""

    rule: Rule = "none"
    """`truncate`: the advantage is multiplied by w, cut to low and high (TIS); `mask`: by w, and by 0 outside of low
    and high (IcePop); `sequence_mask`: by w in responses whose geometric mean of w is between them, else by 0. Tokens
    multiplied by 0 stay in the loss's divisor, and pay a KL in the loss."""
    low: float | None = Field(default=None, ge=0)
    """Null: 0 for truncate, 0.5 for mask, 0.999 for sequence_mask."""
    high: float | None = Field(default=None, gt=0)
    """Null: 2 for truncate, 5 for mask, 1.002 for sequence_mask. Source: verl, slime, NeMo RL."""

    @property
    def bounds(self) -> tuple[float, float]:
        """Low and high in force."""
        low, high = _BOUNDS[self.rule]
        return low if self.low is None else self.low, high if self.high is None else self.high

    def check(self) -> None:
        """Raise ConfigError where bounds have no rule, or no weight lies between them."""
        if self.rule == "none" and (self.low, self.high) != (None, None):
            raise ConfigError("sampler_correction.low and high are of a rule; set sampler_correction.rule too.")
        low, high = self.bounds
        if self.rule != "none" and not low <= 1.0 <= high:
            raise ConfigError(
                f"sampler_correction: 1 is not within low={low:g} and high={high:g}, and it is the weight of a token "
                "on which sampler and trainer agree; change them."
            )

    def correct(self, advantages: Tensor, logprobs: Tensor, rollout: Rollout) -> tuple[Tensor, Metrics]:
        """The advantages [B, T] with their factors, and what is logged of these."""
        if self.rule == "none":
            return advantages, {}
        low, high = self.bounds
        found = sampler_corrections(
            logprobs, rollout.sampler_logprobs, rollout.response_mask, rule=self.rule, low=low, high=high
        )
        metrics = {
            "sampler/changed_fraction": float(found.changed),
            "sampler/effective_sample_fraction": float(found.effective),
        }
        return advantages * found.weights, metrics
