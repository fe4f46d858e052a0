"""Calibration by hand, and of what is calibrated by construction."""

from __future__ import annotations

import pytest
import torch

from megarlhf.ops.calibration import BINS, calibration


def test_by_hand() -> None:
    """Two bins: said 0.05 and 0.15 on average 0.1 of one bin each, and certainty that is right half of the time."""
    found = calibration(torch.tensor([0.05, 0.15, 1.0, 0.95]), torch.tensor([0.0, 1.0, 1.0, 0.0]))
    assert found.weight.tolist() == [0.25, 0.25, *[0.0] * 7, 0.5]
    assert found.said.tolist() == pytest.approx([0.05, 0.15, *[0.0] * 7, 0.975])
    assert found.found.tolist() == [0.0, 1.0, *[0.0] * 7, 0.5]
    assert found.error == pytest.approx(0.25 * 0.05 + 0.25 * 0.85 + 0.5 * 0.475)


def test_what_is_drawn_by_its_probability_is_calibrated() -> None:
    """And what says more than it knows is not: an error near the mean of |p^2 - p|, which is 1/6."""
    draws = torch.Generator().manual_seed(1)
    p = torch.rand(20_000, generator=draws)
    came = (torch.rand(20_000, generator=draws) < p).float()
    assert calibration(p, came).error < 0.02
    assert calibration(p**2, came).error == pytest.approx(1 / 6, abs=0.02)
    assert float(calibration(p, came).weight.sum()) == pytest.approx(1.0)
    assert len(calibration(p, came).weight) == BINS


def test_soft_outcomes_count_by_their_share() -> None:
    assert calibration(torch.tensor([0.4, 0.4]), torch.tensor([0.3, 0.5])).error == pytest.approx(0.0, abs=1e-7)


def test_an_event_of_weight_two_counts_as_two_and_one_of_half_as_half() -> None:
    said, came = torch.tensor([0.1, 0.45, 0.15, 0.9]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    twice = calibration(torch.cat([said, said[1:2]]), torch.cat([came, came[1:2]]), bins=20)
    for scale in (1.0, 0.1):
        weighed = calibration(said, came, scale * torch.tensor([1.0, 2.0, 1.0, 1.0]), bins=20)
        for one, other in zip(weighed, twice, strict=True):
            torch.testing.assert_close(one, other)
    assert len(twice.weight) == 20


def test_nothing_has_no_calibration() -> None:
    with pytest.raises(ValueError, match="at least one"):
        calibration(torch.zeros(0), torch.zeros(0))
