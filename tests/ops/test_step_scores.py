"""What a response is worth, by what its steps are worth, on examples computed by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from megarlhf.ops.step_scores import Aggregate, aggregated, soft_min

VALUES = torch.tensor([[9.0, 0.9, 0.5, 9.0, 0.8], [0.6, 9.0, 9.0, 9.0, 9.0]])
ENDS = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])


def test_by_hand():
    """0.9, 0.5, 0.8: the two orders by min and by product part where many steps are each nearly sure."""
    by_hand: dict[Aggregate, float] = {"min": 0.5, "product": 0.36, "mean": 2.2 / 3, "last": 0.8}
    for how, found in by_hand.items():
        assert aggregated(VALUES, ENDS, how).tolist() == pytest.approx([found, 0.6])
    many, few = torch.full((1, 10), 0.9), torch.tensor([[0.8, *[0.0] * 9]])
    steps = torch.cat([torch.ones(1, 10), torch.tensor([[1.0, *[0.0] * 9]])]).bool()
    both = torch.cat([many, few])
    assert aggregated(both, steps, "min").argmax() == 0
    assert aggregated(both, steps, "product").argmax() == 1


def test_soft_min_by_hand():
    """0.9, 0.5, 0.8 at temperature 0.1: weights e^-9, e^-5, e^-8 over their sum, so that 0.5 has nearly all."""
    e = [math.exp(-10 * value) for value in (0.9, 0.5, 0.8)]
    expected = [0.0, 0.9 * e[0] / sum(e), 0.5 * e[1] / sum(e), 0.0, 0.8 * e[2] / sum(e)]
    found = soft_min(VALUES, ENDS, temperature=0.1)
    assert found[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert found[0].sum().item() == pytest.approx(0.5, abs=0.04)
    assert found[1].tolist() == pytest.approx([0.6, 0.0, 0.0, 0.0, 0.0])
    # The colder, the nearer to the least.
    assert soft_min(VALUES, ENDS, temperature=1e-3).sum(1).tolist() == pytest.approx([0.5, 0.6])


def test_one_step_is_its_value_to_the_bit():
    """Whatever the way, so that a process model of one step is an outcome model."""
    values, ends = torch.randn(64, 7), torch.zeros(64, 7, dtype=torch.bool)
    ends[torch.arange(64), torch.randint(0, 7, (64,))] = True
    for how in get_args(Aggregate):
        assert torch.equal(aggregated(values, ends, how), values[ends])
    assert torch.equal(soft_min(values, ends, temperature=0.1)[ends], values[ends])


def test_a_response_without_steps_is_refused():
    """It would be worth infinity by one way, and 1 by another."""
    with pytest.raises(ValueError, match="row 1 has no step"):
        aggregated(VALUES, ENDS & torch.tensor([[True], [False]]), "min")
