"""Weights of tokens that were sampled with other log-probs, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf.errors import ConfigError
from megarlhf.ops.sampler_correction import Rule, sampler_corrections, token_mult_prob_error
from megarlhf.trainers.correction import SamplerCorrectionConfig

GAPS = torch.tensor([[0.0, math.log(3), -math.log(4), 9.0], [0.001, -0.001, 9.0, 9.0]])
"""Of log-probs: weights 1, 3, 1/4; and two near 1."""
MASK = torch.tensor([[True, True, True, False], [True, True, False, False]])
SAMPLER = torch.full((2, 4), -2.0)
E = math.exp(0.001)


@pytest.mark.parametrize(
    ("rule", "bounds", "weights", "changed"),
    [
        ("none", (0.0, 0.0), [[1, 1, 1, 0], [1, 1, 0, 0]], 0),
        ("truncate", (0.0, 2.0), [[1, 2, 0.25, 0], [E, 1 / E, 0, 0]], 1),
        ("truncate", (0.5, 2.0), [[1, 2, 0.5, 0], [E, 1 / E, 0, 0]], 2),
        ("mask", (0.5, 5.0), [[1, 3, 0, 0], [E, 1 / E, 0, 0]], 1),
        ("sequence_mask", (0.999, 1.002), [[0, 0, 0, 0], [E, 1 / E, 0, 0]], 3),
        ("sequence_mask", (0.9, 1.1), [[1, 3, 0.25, 0], [E, 1 / E, 0, 0]], 0),  # (3/4)^(1/3) = 0.909
    ],
)
def test_rules_by_hand(rule: Rule, bounds: tuple[float, float], weights: list[list[float]], changed: int) -> None:
    found = sampler_corrections(SAMPLER + GAPS, SAMPLER, MASK, rule=rule, low=bounds[0], high=bounds[1])
    torch.testing.assert_close(found.weights, torch.tensor(weights, dtype=torch.float32), rtol=1e-5, atol=0)
    assert found.changed.item() == pytest.approx(changed / 5)
    own = torch.tensor(weights, dtype=torch.float64)
    assert found.effective.item() == pytest.approx(float(own.sum() ** 2 / (5 * (own**2).sum())), rel=1e-5)


def test_a_batch_without_weights_has_no_effective_sample() -> None:
    found = sampler_corrections(SAMPLER + 3.0, SAMPLER, MASK, rule="mask", low=0.5, high=5.0)
    assert (found.weights.sum(), found.effective, found.changed) == (0.0, 0.0, 1.0)


def test_log_weights_that_overflow_stay_finite() -> None:
    found = sampler_corrections(SAMPLER + 1e5, SAMPLER - 1e5, MASK, rule="truncate", low=0.0, high=2.0)
    assert found.weights[MASK].tolist() == [2.0] * 5
    assert token_mult_prob_error(SAMPLER + 1e5, SAMPLER, MASK).isfinite()


def test_the_error_of_probabilities_is_a_mean_of_ratios() -> None:
    error = token_mult_prob_error(SAMPLER + GAPS, SAMPLER, MASK)
    assert error.item() == pytest.approx((1 + 3 + 4 + E + E) / 5, rel=1e-6)
    assert token_mult_prob_error(SAMPLER, SAMPLER, MASK) == 1.0


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"high": 2.0}, r"low and high are of a rule; set sampler_correction.rule too"),
        ({"rule": "truncate", "low": 1.5}, r"1 is not within low=1.5 and high=2, and it is the weight of a token on"),
        ({"rule": "mask", "high": 0.9}, r"1 is not within low=0.5 and high=0.9"),
    ],
)
def test_bounds_that_mean_nothing_are_refused(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SamplerCorrectionConfig.model_validate(settings).check()
