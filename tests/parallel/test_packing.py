"""Rows are dealt and packed whole, once, and as evenly and tightly as the numbers allow."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megarlhf.parallel.packing import dealt, first_fit, in_multiples


def some(rows: int, seed: int, least: int = 1, most: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(least, most + 1, rows)


@pytest.mark.parametrize(("rows", "hands"), [(1, 1), (8, 2), (64, 4), (65, 4), (3, 4), (0, 2), (257, 8)])
@pytest.mark.parametrize("seed", range(4))
def test_hands_get_every_row_once_and_nearly_the_same_work(rows: int, hands: int, seed: int) -> None:
    costs = [int(cost) ** 2 for cost in some(rows, seed)]
    parts = dealt(costs, hands)
    assert sorted(itertools.chain.from_iterable(map(list, parts))) == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    sums = [sum(costs[row] for row in part) for part in parts]
    # Deal by deal, the spread of the hands is at most that of what is dealt; nothing is dealt beside a last row.
    ordered = sorted(costs, reverse=True) + [0] * (-rows % hands)
    deals = [ordered[first : first + hands] for first in range(0, len(ordered), hands)]
    assert max(sums) - min(sums) <= max([0, *(deal[0] - deal[-1] for deal in deals)])


def test_work_is_dealt_and_not_rows_in_their_order() -> None:
    costs = [100, 90, 80, 70, 4, 3, 2, 1]
    assert [sum(costs[row] for row in part) for part in dealt(costs, 2)] == [175, 175]  # consecutive rows: 340 and 10


@pytest.mark.parametrize(("rows", "budget"), [(1, 256), (64, 256), (64, 2048), (300, 1000), (0, 16)])
@pytest.mark.parametrize("seed", range(4))
def test_packs_hold_every_row_once_within_the_budget_and_few_are_made(rows: int, budget: int, seed: int) -> None:
    lengths = some(rows, seed)
    packs = first_fit(lengths, budget)
    assert sorted(itertools.chain.from_iterable(map(list, packs))) == list(range(rows))
    sums = [int(lengths[pack].sum()) for pack in packs]
    assert max([0, *sums]) <= budget
    # A row opened a pack because none before it had room: what is free before is less than the least row after.
    for earlier, later in itertools.combinations(range(len(packs)), 2):
        assert budget - sums[earlier] < min(lengths[packs[later]])
    fewest = -(-int(lengths.sum()) // budget)
    assert len(packs) <= 11 / 9 * fewest + 6 / 9 or len(packs) == fewest


def test_first_fit_of_a_case_by_hand() -> None:
    packs = first_fit(np.array([2, 5, 4, 7, 1, 3]), 10)
    assert [pack.tolist() for pack in packs] == [[3, 5], [1, 2, 4], [0]]  # 7 + 3, 5 + 4 + 1, 2


def test_a_row_longer_than_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match="a row has 11 tokens, but micro_batch_tokens=10; raise it to 11 or more"):
        first_fit(np.array([2, 11]), 10)


def test_a_multiple_of_packs_is_made_by_halving() -> None:
    packs = [np.arange(5), np.arange(5, 7), np.array([7])]
    made = in_multiples(packs, 4)
    assert [pack.tolist() for pack in made] == [[0, 2, 4], [1, 3], [5, 6], [7]]
    assert in_multiples(made, 2) == made
    with pytest.raises(ValueError, match="3 rows do not make a multiple of 4 packs"):
        in_multiples([np.arange(3)], 4)
