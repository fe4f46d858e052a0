"""A gate: one number that a correct run keeps within a bound, and what to do where it does not."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megarlhf.errors import TrainingError
from megarlhf.models.role import Role
from megarlhf.parallel.collectives import all_reduce
from megarlhf.parallel.mesh import Mesh


@dataclass(frozen=True)
class Gate:
    """One number, and how large a correct run lets it become."""

    name: str
    value: float
    bound: float
    measure: str
    """What the number is, with its unit."""
    remedy: str
    """What to do when it is too large."""
    skipped: str = ""
    """Why it was not measured; such a gate neither holds nor fails."""

    @property
    def holds(self) -> bool:
        """Whether it was measured and is in bounds; a NaN is not."""
        return not self.skipped and self.value <= self.bound

    @property
    def fails(self) -> bool:
        """Whether it was measured and is out of bounds."""
        return not self.skipped and not self.holds

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name}: skipped, {self.skipped}"
        return f"{self.name}: {self.measure} is {self.value:.3g}, allowed {self.bound:.3g}"


@dataclass(frozen=True)
class Bounds:
    """How far rounding alone can move each number."""

    sampler: float
    """Log-prob of one token, nats."""
    first_pass: float
    """Ratio, clip fraction, and KL in nats."""
    reference: float
    """Log-prob of one token, nats."""
    gradient: float
    """Of the norm of one tensor's gradient."""
    logits: float
    """Of the largest logit."""
    layout: float
    """Log-prob of one token, nats."""


FLOAT32 = Bounds(sampler=1e-4, first_pass=0.0, reference=1e-4, gradient=1e-3, logits=1e-3, layout=1e-4)
"""Sums in another order: tiny models show 1e-6, the reference too, whose weights are aligned otherwise in memory. The
first pass repeats the same sums on the same weights: on a CPU to the bit."""
FLOAT32_GPU = replace(FLOAT32, first_pass=1e-4)
"""A GPU may choose other kernels with gradients than without, which is another order of sums."""
BFLOAT16 = Bounds(sampler=0.5, first_pass=1e-2, reference=0.05, gradient=0.05, logits=0.1, layout=0.5)
"""8 bits round a logit of 16 by up to 0.06, layers add to that, and the worst of a hundred tokens is several times the
typical one. Models of random weights, 8 layers on a CPU, show 0.02 to 0.1 for the sampler, 0.01 to 0.04 for logits and
0.003 for gradients. The first pass has room for a GPU, as in FLOAT32_GPU."""
FP8 = Bounds(sampler=1.0, first_pass=0.05, reference=1.0, gradient=1.0, logits=0.5, layout=1.0)
"""4 bits, of numbers whose scale is the largest of the batch. Small models of random weights, rounded so on a CPU, show
0.01 to 0.4 for the sampler, 0.1 to 0.6 for gradients, and 0 for the first pass; weights that are one step old show 0.4
to 13. No GPU has been measured."""


def bounds_of(role: Role) -> Bounds:
    """The bounds for a role's number formats and device."""
    compute = role.settings.compute
    if compute.fp8 is not None:
        return FP8
    if compute.dtype != torch.float32:
        return BFLOAT16
    return FLOAT32_GPU if role.mesh.device.type == "cuda" else FLOAT32


def skip(name: str, reason: str) -> Gate:
    """A gate that cannot be measured here."""
    return Gate(name, math.nan, math.nan, "", "", skipped=reason)


def check_gates(gates: Iterable[Gate]) -> None:
    """Raise TrainingError naming every gate that fails, its number, its bound and its remedy."""
    failing = [f"gate {gate}; {gate.remedy}." for gate in gates if gate.fails]
    if failing:
        raise TrainingError("\n".join(failing))


def worst(values: Tensor, mesh: Mesh) -> float:
    """The largest of all ranks' values, 0 where there are none. A NaN counts as infinite: a maximum could lose it."""
    finite = values.detach().double().nan_to_num(nan=math.inf, posinf=math.inf)
    largest = finite.max() if finite.numel() else finite.new_zeros(())
    return float(all_reduce(largest.to(mesh.device), mesh, "world", "max"))
