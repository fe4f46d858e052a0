"""Intervals against textbook values, and against what they promise: to cover the truth 95 times in 100."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

from megarlhf.eval.intervals import (
    auc_error,
    auc_of,
    effective,
    mean,
    mean_of,
    paired_difference,
    ratio_error,
    share,
    share_of,
    within,
)


def test_wilson_interval_of_a_share():
    # Wilson 1927 for 81 of 263, the example of Newcombe 1998, table I: 0.2553 to 0.3662.
    correct = torch.zeros(263, dtype=torch.bool)
    correct[:81] = True
    found = share(correct)
    assert found.mean == pytest.approx(81 / 263)
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (0, 20), (7, 20), (20, 20), (999, 1000)])
def test_a_share_by_its_number_is_that_of_scipy(hits: int, count: int) -> None:
    found = share_of(hits / count, count)
    bounds = scipy.stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert found == pytest.approx((hits / count, bounds.low, bounds.high), abs=1e-12)
    wider = share_of(hits / count, count / 4)
    assert wider.high - wider.low > found.high - found.low


def test_a_mean_by_its_spread_is_that_of_its_values() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    assert mean_of(4.0, float(values.std(correction=0)), 4) == pytest.approx(tuple(mean(values)))


def test_a_share_of_all_or_none_keeps_an_open_side():
    assert share(torch.ones(10, dtype=torch.bool)).low < 0.8
    assert share(torch.zeros(10, dtype=torch.bool)).high > 0.2


def test_an_area_is_the_share_of_couples_in_order() -> None:
    scores, right = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0]), torch.tensor([True, False, True, False, True])
    couples = [float(a > b) + float(a == b) / 2 for a in scores[right] for b in scores[~right]]
    assert auc_of(scores, right) == sum(couples) / len(couples)
    assert math.isnan(auc_of(scores, torch.ones(5, dtype=torch.bool)))


def test_the_error_of_an_area_is_that_of_hanley_and_mcneil() -> None:
    """Their example (1982, table II): 0.893 of 51 abnormal and 58 normal images has 0.032."""
    assert auc_error(0.893, 51, 58) == pytest.approx(0.032, abs=1e-3)
    assert auc_error(1.0, 5, 5) == 0.0


def test_the_error_of_a_mean_over_tokens_is_over_rows() -> None:
    """Rows of one length: the error of their means; many tokens in a row make it no smaller."""
    means = torch.tensor([1.0, 2.0, 4.0, 9.0])
    assert ratio_error(means * 50, torch.full((4,), 50)) == pytest.approx(float(means.std()) / 2)
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        counts = torch.randint(1, 20, (100,), generator=generator)
        sums = counts * (1 + 0.5 * torch.randn(100, generator=generator))
        found = within(float(sums.sum() / counts.sum()), ratio_error(sums, counts))
        covered += found.low <= 1 <= found.high
    assert 0.9 <= covered / 400 <= 0.98


def test_weights_that_differ_are_worth_fewer_rows() -> None:
    assert effective(torch.full((7,), 3.0)) == pytest.approx(7)
    assert effective(torch.tensor([1.0, 0.0, 1.0])) == pytest.approx(2)
    assert effective(torch.tensor([1.0, 3.0])) == pytest.approx(16 / 10)


def test_student_interval_by_hand():
    # Mean 2.5, standard error sqrt(5/3 / 4), and t = 3.182446 at 3 degrees of freedom.
    found = mean(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    half = 3.182446305 * (5 / 3 / 4) ** 0.5
    assert found == pytest.approx((2.5, 2.5 - half, 2.5 + half), rel=1e-6)


def test_pairing_sees_what_two_shares_cannot():
    before = torch.zeros(200, dtype=torch.bool)
    before[:100] = True
    after = before.clone()
    after[100:110] = True  # ten problems gained, none lost
    found = paired_difference(before, after)
    assert found.mean == pytest.approx(0.05)
    assert found.low > 0
    assert share(after).low < share(before).high  # unpaired, the intervals overlap


def test_equal_policies_differ_by_exactly_nothing():
    correct = torch.tensor([True, False, True])
    assert paired_difference(correct, correct) == (0.0, 0.0, 0.0)


def test_different_problems_cannot_be_paired():
    with pytest.raises(ValueError, match=r"before \[2\] and after \[3\]"):
        paired_difference(torch.zeros(2), torch.zeros(3))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        before = torch.rand(200, generator=generator) < 0.4
        after = torch.rand(200, generator=generator) < 0.6
        found = paired_difference(before, after)
        covered += found.low <= 0.2 <= found.high
    # 95 % of 400 with three standard errors of 4.4.
    assert 366 <= covered <= 394
