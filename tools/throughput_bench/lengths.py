"""How long made-up prompts and responses are, and the sampler that ends responses there."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from megarlhf.batch.rollouts import Prompts
from megarlhf.errors import ConfigError
from megarlhf.rollout.controller import Ledger
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import SamplingConfig, uniforms
from tools.step_bench.workload import ending_at

FORM = re.compile(r"(?P<kind>fixed|uniform|lognormal):(?P<a>\d+)(?::(?P<b>[\d.]+))?")


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths, cut to [1, most].

    `fixed:N`, `uniform:A:B` (both included) or `lognormal:MEDIAN:SIGMA` (of the logarithm).
    """

    text: str
    most: int

    def __post_init__(self) -> None:
        found = FORM.fullmatch(self.text)
        kind = found["kind"] if found else ""
        if found is None or (kind == "fixed") != (found["b"] is None) or int(found["a"]) < 1:
            raise ConfigError(f"lengths {self.text!r}; give fixed:N, uniform:A:B or lognormal:MEDIAN:SIGMA.")
        if kind == "uniform" and not int(found["a"]) <= float(found["b"]):
            raise ConfigError(f"lengths {self.text!r}: the least is above the most; give uniform:A:B with A <= B.")
        if int(found["a"]) > self.most or (kind == "uniform" and float(found["b"]) > self.most):
            raise ConfigError(
                f"lengths {self.text!r} go beyond the {self.most} tokens that the run allows; lower them."
            )

    def of(self, draws: Tensor) -> Tensor:
        """[n] int64: the lengths at the quantiles `draws` [n] in [0, 1)."""
        found = FORM.fullmatch(self.text)
        assert found is not None
        least = int(found["a"])
        if found["kind"] == "fixed":
            lengths = [least] * len(draws)
        elif found["kind"] == "uniform":
            lengths = [least + int(draw * (int(found["b"]) - least + 1)) for draw in draws.tolist()]
        else:
            normal = NormalDist(math.log(least), float(found["b"]) or 1e-9)
            lengths = [round(math.exp(normal.inv_cdf(min(max(draw, 1e-6), 1 - 1e-6)))) for draw in draws.tolist()]
        return torch.tensor(lengths).clamp(1, self.most)


class EndsWhereTold(RolloutEngine):
    """Draws EOS at chosen lengths.

    A response's length follows from its stream of random numbers, as its tokens do: it is the same in every layout.
    """

    lengths: Lengths

    def _ledger(self, rows: Prompts, streams: Tensor, sampling: SamplingConfig, seed: int) -> Ledger:
        ledger = super()._ledger(rows, streams, sampling, seed)
        quantiles = uniforms(seed + 1, streams[:, None], torch.zeros(1, dtype=torch.int64, device=streams.device))[:, 0]
        lengths = self.lengths.of(quantiles.cpu()).to(rows.lengths.device)
        return ending_at(ledger, lengths, sampling)
