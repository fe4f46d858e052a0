"""What steers the KL's coefficient: Ziegler's rule by hand, and what must not move it."""

from __future__ import annotations

import math

import pytest

from megarlhf.errors import CheckpointError
from megarlhf.trainers.kl_coefficient import KLCoefficient


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.6, 1 + 0.1 * 512 / 10_000), (5.7, 1 - 0.05 * 512 / 10_000), (60.0, 1.01024), (0.0, 0.98976), (6.0, 1.0)],
)
def test_a_nat_becomes_dearer_where_there_are_too_many(kl: float, factor: float) -> None:
    """The error is relative, and at most a fifth is acted on."""
    coefficient = KLCoefficient(0.05, target=6.0)
    coefficient.observe({"kl/reference_mean": kl}, 512)
    assert coefficient.value == pytest.approx(0.05 * factor, rel=1e-12)


@pytest.mark.parametrize("metrics", [{"kl/reference_mean": math.nan}, {"kl/reference_mean": math.inf}, {}])
def test_what_is_no_distance_changes_nothing(metrics: dict[str, float]) -> None:
    coefficient = KLCoefficient(0.05, target=6.0)
    coefficient.observe(metrics, 512)
    assert coefficient.value == 0.05


def test_a_constant_stays_and_is_no_state() -> None:
    coefficient = KLCoefficient(0.05)
    coefficient.observe({"kl/reference_mean": 60.0}, 512)
    assert (coefficient.value, coefficient.parts) == (0.05, {})


def test_it_goes_on_to_the_bit() -> None:
    coefficient, other = KLCoefficient(0.1 / 3, target=6.0), KLCoefficient(0.05, target=6.0)
    other.load_state(coefficient.state())
    assert (other.value, other.parts) == (0.1 / 3, {"kl_coef": other})


@pytest.mark.parametrize(
    "state", [{}, {"value": -1}, {"value": 1 << 64}, {"value": 0x7FF8000000000000}, {"value": 0xBFF0000000000000}]
)
def test_a_damaged_state_is_refused(state: dict[str, int]) -> None:
    """Nothing, no bits of a double, too many, NaN, -1."""
    with pytest.raises(CheckpointError, match="the KL coefficient is damaged"):
        KLCoefficient(0.05, target=6.0).load_state(state)
