"""The vote of k responses: against every choice of them, against exact fractions, and an estimate against both."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from megarlhf.eval import voting
from megarlhf.eval.voting import majority


def over_all_choices(answers: list[str], right: list[float], size: int) -> float:
    """By its definition."""
    worth = {name: np.mean([w for a, w in zip(answers, right, strict=True) if a == name]) for name in set(answers)}
    found = []
    for chosen in combinations(answers, size):
        votes = Counter(chosen)
        found.append(np.mean([worth[name] for name, count in votes.items() if count == max(votes.values())]))
    return float(np.mean(found))


@pytest.mark.parametrize("seed", range(12))
def test_it_is_the_mean_over_every_choice(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, kinds = int(rng.integers(1, 10)), int(rng.integers(1, 6))
    answers = [f"answer {each}" for each in rng.integers(0, kinds, count)]
    right = rng.integers(0, 2, count).astype(float).tolist()
    sizes = list(range(1, count + 1))
    found = majority(answers, right, sizes, seed=0)
    expected = [over_all_choices(answers, right, size) for size in sizes]
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-13)
    assert not found.errors.any()
    assert found.values[0] == pytest.approx(np.mean(right)), "the vote of one is the policy"


def test_two_answers_of_512_are_exact() -> None:
    """The right one wins where it has more than half of the votes, and half of the time where it has half."""
    answers, right = ["5"] * 300 + ["6"] * 212, [1.0] * 300 + [0.0] * 212
    sizes = [1, 2, 7, 64, 256, 511, 512]
    exact = []
    for size in sizes:
        ways = Fraction(0)
        for votes in range(max(0, size - 212), min(size, 300) + 1):
            share = Fraction(int(2 * votes > size)) + Fraction(int(2 * votes == size), 2)
            ways += share * comb(300, votes) * comb(212, size - votes)
        exact.append(float(ways / comb(512, size)))
    np.testing.assert_allclose(majority(answers, right, sizes, seed=0).values, exact, rtol=0, atol=1e-12)


def test_where_counting_takes_too_long_the_error_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    answers = [str(each) for each in rng.integers(0, 9, 60)]
    right = [float(each == "4") for each in answers]
    sizes = [1, 2, 8, 30, 60]
    exact = majority(answers, right, sizes, seed=0)
    monkeypatch.setattr(voting, "MOST_WORK", 0)
    found = majority(answers, right, sizes, seed=0)
    assert (np.abs(found.values - exact.values) <= 4 * found.errors + 1e-12).all()
    assert (found.errors[:-1] > 0).all()
    assert found.errors[-1] == 0, "all of them is one choice"
    again = majority(answers, right, sizes, seed=0)
    assert (again.values == found.values).all()
    assert (majority(answers, right, sizes, seed=1).values != found.values).any()
