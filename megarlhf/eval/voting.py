"""The answer that most of k responses give, and how often it is right: for every k, from N responses to one prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
MOST_EXACT = 1000
"""Responses up to which binomial coefficients fit in fp64: C(1000, 500) is 3e299."""
MOST_WORK = 1e8
"""Multiplications that an exact count may take: a second. 512 responses with 40 answers take a hundredth of it."""
DRAWS = 1000
"""Orders drawn for an estimate."""


class Vote(NamedTuple):
    """For each k."""

    values: Numbers
    errors: Numbers
    """Standard errors of estimates; 0 where the value is exact."""


def majority(answers: Sequence[str], right: Sequence[float], sizes: Sequence[int], seed: int) -> Vote:
    """How often the answer that most of k responses give is right, over all choices of k of the N responses.

    Answers with equally many votes share the win. An answer that is right in some responses and wrong in others (it may
    be right and badly put) counts by its share.

    right: 1 or 0 a response. sizes: every k, 1 <= k <= N. seed: of the estimate, where counting would take too long.
    """
    names, places = np.unique(np.asarray(answers), return_inverse=True)
    held = np.bincount(places, minlength=len(names))
    worth = np.bincount(places, weights=np.asarray(right, dtype=np.float64), minlength=len(names)) / held
    if len(answers) <= MOST_EXACT and work(held.tolist()) <= MOST_WORK:
        return Vote(counted(held.tolist(), worth, sizes), np.zeros(len(sizes)))
    return estimated(places, worth, sizes, seed)


def counted(held: Sequence[int], worth: Numbers, sizes: Sequence[int]) -> Numbers:
    """What the winner of a vote is worth, over all choices of k responses, exactly.

    For each number of votes v that may win, a generating function in z counts the choices by their size: an answer that
    m responses give has (1 + z)^m cut before z^v where it loses, and C(m, v) z^v where it wins. Answers that fewer than
    v give lose whatever is chosen. Winners are counted, since t of them share the win.

    held: how many responses give each answer. worth: of each answer, 0 to 1. Returns one number for each k.
    """
    count = sum(held)
    total = np.zeros(count + 1)
    for votes in range(1, max(held) + 1):
        losing = sum(size for size in held if size < votes)
        rivals = [(size, float(each)) for size, each in zip(held, worth, strict=True) if size >= votes]
        # [t] counts choices of which t answers win, and adds up what these are worth.
        ways = [_padded(_row(losing), count)]
        sums = [np.zeros(count + 1)]
        for size, value in rivals:
            ways, sums = _with(size, value, votes, ways, sums)
        total += sum((each / winners for winners, each in enumerate(sums[1:], start=1)), np.zeros(count + 1))
    return np.array([total[size] / float(comb(count, size)) for size in sizes])


def work(held: Sequence[int]) -> float:
    """Multiplications that `counted` takes, about."""
    count, needed = sum(held), 0.0
    for votes in range(1, max(held) + 1):
        rivals = sum(size >= votes for size in held)
        needed += rivals * min(rivals, count // votes) * count * votes
    return needed


def estimated(places: NDArray[np.intp], worth: Numbers, sizes: Sequence[int], seed: int) -> Vote:
    """The same over orders drawn at random, of which the first k responses vote.

    places: the answer of each response, by its number.
    """
    rng = np.random.default_rng(seed)
    drawn = np.empty((DRAWS, len(sizes)))
    for draw in range(DRAWS):
        order = rng.permutation(places)
        for at, size in enumerate(sizes):
            votes = np.bincount(order[:size], minlength=len(worth))
            drawn[draw, at] = worth[votes == votes.max()].mean()
    return Vote(drawn.mean(0), drawn.std(0, ddof=1) / np.sqrt(DRAWS))


def _with(
    size: int, value: float, votes: int, ways: Sequence[Numbers], sums: Sequence[Numbers]
) -> tuple[list[Numbers], list[Numbers]]:
    """The counts with one more answer, that `size` responses give: it loses, or it wins with `votes`."""
    count = len(ways[0]) - 1
    below, won = _row(size)[:votes], float(comb(size, votes))
    # Choices of which t answers win have at least t * votes responses.
    more_ways = [_times(each, below, winners * votes) for winners, each in enumerate(ways)]
    more_sums = [_times(each, below, winners * votes) for winners, each in enumerate(sums)]
    if len(ways) * votes <= count:
        more_ways.append(np.zeros(count + 1))
        more_sums.append(np.zeros(count + 1))
    for winners in range(1, len(more_ways)):
        before = slice((winners - 1) * votes, count + 1 - votes)
        after = slice(winners * votes, None)
        more_ways[winners][after] += won * ways[winners - 1][before]
        more_sums[winners][after] += won * (sums[winners - 1][before] + value * ways[winners - 1][before])
    return more_ways, more_sums


def _times(counts: Numbers, factor: Numbers, first: int) -> Numbers:
    """Two series multiplied, cut where the first one ends; it is 0 before `first`."""
    product = counts.copy()
    if len(factor) > 1:  # the factor of one term is 1
        product[first:] = np.convolve(counts[first:], factor)[: len(counts) - first]
    return product


@cache
def _row(size: int) -> Numbers:
    """C(size, 0), C(size, 1), ..."""
    return np.array([float(comb(size, taken)) for taken in range(size + 1)])


def _padded(counts: Numbers, last: int) -> Numbers:
    return np.pad(counts, (0, last + 1 - len(counts)))
