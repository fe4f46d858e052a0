"""Where the first error is, and ProcessBench's F1, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf.eval.intervals import harmonic_error
from megarlhf.ops.first_error import first_errors, harmonic, labelled_up_to

ENDS = torch.tensor([[0, 1, 0, 1, 1], [1, 0, 0, 0, 1], [0, 1, 0, 0, 1]]).bool()
VALUES = torch.tensor([[0.1, 0.5, 0.0, 0.49, 0.2], [0.9, 0.1, 0.1, 0.1, 0.6], [0.9, 0.3, 0.9, 0.9, 0.9]])


def test_the_first_error_is_the_first_end_below_one_half() -> None:
    """Values where no step ends say nothing, one half is no error, and a later error is not the first."""
    assert first_errors(VALUES, ENDS).tolist() == [3, -1, 1]
    assert first_errors(VALUES.double(), ENDS).tolist() == [3, -1, 1]
    assert first_errors(VALUES, torch.zeros_like(ENDS)).tolist() == [-1, -1, -1]


def test_a_first_error_is_known_where_every_step_up_to_it_is_labelled() -> None:
    first = torch.tensor([3, -1, 1])
    assert labelled_up_to(ENDS, ENDS, first).tolist() == [True, True, True]
    after = ENDS.clone()
    after[:, 4] = False  # the last step of each has no label
    assert labelled_up_to(ENDS, after, first).tolist() == [True, False, True]
    before = ENDS.clone()
    before[0, 1] = before[2, 1] = False
    assert labelled_up_to(ENDS, before, first).tolist() == [False, True, False]


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[3, 4\], mask is \[3, 5\]"):
        first_errors(VALUES[:, :4], ENDS)
    with pytest.raises(ValueError, match="bool"):
        first_errors(VALUES, ENDS.int())


def test_f1_is_the_harmonic_mean_of_both_shares() -> None:
    """The smaller share weighs more."""
    assert harmonic(0.531, 0.953) == pytest.approx(0.682, abs=5e-4)
    assert harmonic(0.0, 1.0) == harmonic(0.0, 0.0) == 0.0
    assert harmonic(0.6, 0.6) == pytest.approx(0.6)


def test_its_standard_error_is_that_of_many_draws() -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = [
        torch.binomial(torch.full((100_000,), float(n)), torch.tensor(p).expand(100_000), generator=generator) / n
        for p, n in ((0.6, 200), (0.9, 100))
    ]
    spread = float((2 * drawn[0] * drawn[1] / (drawn[0] + drawn[1])).std())
    assert harmonic_error(0.6, 0.9, 200, 100) == pytest.approx(spread, rel=0.02)
    assert harmonic_error(0.0, 0.0, 5, 5) == 0.0
    assert math.isclose(harmonic_error(0.5, 1.0, 100, 10), 2 * 0.05 / 1.5**2)
