"""Advantages of groups against a loop in fp64, and what a group of equal scores moves: nothing."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from megarlhf.ops.group_advantages import (
    GroupStd,
    equal_groups,
    group_advantages,
    leave_one_out,
    others_per_token,
    to_tokens,
)

SCORES = torch.tensor([1.0, 0.0, 0.5, 3.0, 0.1, 0.1, 0.1, 0.1, -2.0, 7.0, 7.0, 7.0])
GROUPS = [SCORES[start : start + 4].tolist() for start in (0, 4, 8)]


@pytest.mark.parametrize("std", [GroupStd(1, 1e-4), GroupStd(0, 1e-8)])
def test_a_response_is_compared_with_its_group(std: GroupStd) -> None:
    """Bessel's correction and eps 1e-4 are TRL's, no correction and 1e-8 open-instruct's."""
    spreads = [float(statistics.stdev(g) if std.correction else statistics.pstdev(g)) for g in GROUPS]
    expected = [(r - statistics.mean(g)) / (s + std.eps) for g, s in zip(GROUPS, spreads, strict=True) for r in g]
    assert group_advantages(SCORES, 4, std).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_at_eight_responses_the_two_corrections_differ_by_seven_per_cent() -> None:
    scores = torch.arange(8.0)
    ratio = group_advantages(scores, 8, GroupStd(0, 1e-9)) / group_advantages(scores, 8, GroupStd(1, 1e-9))
    assert ratio.tolist() == pytest.approx([math.sqrt(8 / 7)] * 8, rel=1e-6)


def test_without_a_divisor_the_difference_is_left() -> None:
    expected = [r - statistics.mean(g) for g in GROUPS for r in g]
    assert group_advantages(SCORES, 4, None).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_leave_one_out_is_the_score_less_the_mean_of_the_others() -> None:
    expected = [r - (sum(g) - r) / 3 for g in GROUPS for r in g]
    assert leave_one_out(SCORES, 4).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_a_token_of_the_others_is_worth_what_they_earned_over_their_tokens() -> None:
    lengths = [3, 1, 7, 2, 5, 5, 4, 9, 1, 1, 30, 2]
    expected = []
    for row in range(12):
        others = [other for other in range(row // 4 * 4, row // 4 * 4 + 4) if other != row]
        expected.append(sum(SCORES[other].item() for other in others) / sum(lengths[other] for other in others))
    assert others_per_token(SCORES, torch.tensor(lengths), 4).tolist() == pytest.approx(expected, rel=1e-5)
    for size in (1, 5):
        with pytest.raises(ValueError, match=f"group_size: {size} for 12 rewards; must be at least 2"):
            others_per_token(SCORES, torch.tensor(lengths), size)


@pytest.mark.parametrize("score", [0.1, -1e9, 1e-20, 1 / 3])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_a_group_of_equal_scores_moves_nothing(score: float, size: int) -> None:
    scores = torch.full((size,), score)
    for advantages in (
        group_advantages(scores, size, GroupStd(1, 1e-9)),
        group_advantages(scores, size, GroupStd(0, 1e-9)),
        group_advantages(scores, size, None),
        leave_one_out(scores, size),
    ):
        assert advantages.tolist() == [0.0] * size
    assert equal_groups(scores, size).tolist() == [True]


def test_equal_groups_are_told_apart() -> None:
    assert equal_groups(SCORES, 4).tolist() == [False, True, False]


def test_tokens_get_the_advantage_of_their_response() -> None:
    mask = torch.tensor([[False, True, True], [True, False, False]])
    advantages = to_tokens(torch.tensor([2.0, -3.0]), mask)
    assert advantages.tolist() == [[0.0, 2.0, 2.0], [-3.0, 0.0, 0.0]]


@pytest.mark.parametrize(("size", "says"), [(1, "must be at least 2"), (5, "for 12 scores")])
def test_groups_that_do_not_fit_are_refused(size: int, says: str) -> None:
    for formula in (lambda: group_advantages(SCORES, size, None), lambda: leave_one_out(SCORES, size)):
        with pytest.raises(ValueError, match=says):
            formula()
