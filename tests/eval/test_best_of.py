"""The best of n without bias: against every subset, against exact fractions, and whatever the order."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb, log

import numpy as np
import pytest

from megarlhf.eval.best_of import best_of, chances, kl_of_best, pass_at

SIZES = [1, 2, 3, 5, 7]
PROXIES = [
    [0.3, -1.0, 2.0, 0.7, 5.0, 4.0, 0.0],
    [1.0, 1.0, 0.0, 2.0, 2.0, 2.0, 0.0],
    [-np.inf, 1.0, -np.inf, 1.0, 0.0, 3.0, 3.0],
    [1.0] * 7,
]
GOLD = [0.0, 1.0, 0.25, 1.0, -2.0, 3.0, 0.5]


def over_all_choices(proxy: list[float], gold: list[float], size: int) -> float:
    """By its definition: of every choice of `size`, the mean gold of those that share the highest proxy."""
    worth = []
    for chosen in combinations(range(len(proxy)), size):
        highest = max(proxy[at] for at in chosen)
        worth.append(np.mean([gold[at] for at in chosen if proxy[at] == highest]))
    return float(np.mean(worth))


@pytest.mark.parametrize("proxy", PROXIES)
def test_it_is_the_mean_over_every_choice(proxy: list[float]) -> None:
    expected = [over_all_choices(proxy, GOLD, size) for size in SIZES]
    np.testing.assert_allclose(best_of(proxy, GOLD, SIZES), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("proxy", PROXIES)
def test_the_order_of_the_file_is_nothing(proxy: list[float]) -> None:
    found = best_of(proxy, GOLD, SIZES)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(7)
        shuffled = best_of(np.array(proxy)[order], np.array(GOLD)[order], SIZES)
        np.testing.assert_allclose(shuffled, found, rtol=0, atol=1e-14)


def test_of_one_it_is_the_policy_and_of_all_the_highest() -> None:
    one, every = best_of(PROXIES[0], GOLD, [1, 7])
    assert one == pytest.approx(np.mean(GOLD), abs=1e-15)
    assert every == GOLD[4]


@pytest.mark.parametrize("size", [1, 2, 31, 256, 511, 512])
def test_chances_among_512_are_exact(size: int) -> None:
    exact = [float(Fraction(comb(at - 1, size - 1), comb(512, size))) for at in range(1, 513)]
    np.testing.assert_allclose(chances(512, size), exact, rtol=1e-11, atol=0)
    assert chances(512, size).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("count", "right"), [(7, 0), (7, 3), (7, 7), (512, 1), (512, 200), (512, 511)])
def test_one_of_k_is_right(count: int, right: int) -> None:
    sizes = [size for size in (1, 2, 3, 7, 64, 312, 313, 512) if size <= count]
    exact = [float(1 - Fraction(comb(count - right, size), comb(count, size))) for size in sizes]
    np.testing.assert_allclose(pass_at(count, right, sizes), exact, rtol=0, atol=1e-12)
    # Which is the best of k by what is right itself.
    worth = np.arange(count) < right
    np.testing.assert_allclose(best_of(worth, worth, sizes), exact, rtol=0, atol=1e-12)


def test_more_than_there_are_cannot_be_chosen() -> None:
    with pytest.raises(ValueError, match="size=8: there are 7 responses; choose 1 to 7"):
        best_of(PROXIES[0], GOLD, [8])


def test_the_kl_is_that_of_the_best_among_many_continuous_scores() -> None:
    """The density of the best of n over the policy's, at the score of quantile u, is n u^(n - 1)."""
    quantiles = (np.arange(200_000) + 0.5) / 200_000
    for size in (1, 2, 16, 512):
        density = size * quantiles ** (size - 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            integrand = np.where(density > 0, density * np.log(density), 0.0)
        assert kl_of_best(size) == pytest.approx(integrand.mean(), abs=1e-3)
    assert kl_of_best(4) == log(4) - 0.75
