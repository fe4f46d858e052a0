"""Over-optimisation in what a run logs: the score rises while accuracy falls.

A score that rises is what PPO is for; it means something only while accuracy, where answers are known, does not pay for
it. Gao et al. 2022 measure the two parting on every reward model that is pushed far enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

CONFIDENCE = 0.95
"""That a run whose accuracy never falls gets no warning, however often it is looked at."""
BLOCK = 256
"""Verified prompts that are looked at together: a share of one half is then known to 6 points."""


class Seen(NamedTuple):
    """What one iteration measured. Prompts count, not rollouts: those of one prompt are not independent."""

    score: float
    """Mean over the rollouts, in reward."""
    score_std: float
    prompts: int
    accuracy: float
    """Share of the verified rollouts that are right; anything where `verified` is 0."""
    verified: int
    """Prompts with an answer."""


class Block(NamedTuple):
    """Iterations in a row, pooled."""

    last: int
    """The iteration that completed it, counted from 1."""
    score: float
    score_error: float
    """Standard error of `score`."""
    accuracy: float
    verified: int


class Fall(NamedTuple):
    """The best block so far and the latest one, whose accuracy is lower beyond doubt and whose score is higher."""

    best: Block
    now: Block
    low: float
    """Lower end of the interval of the difference in accuracy."""
    high: float
    """Upper end, below 0."""


def blocks(history: Sequence[Seen]) -> list[Block]:
    """Iterations in order, pooled until each block has at least BLOCK verified prompts; a rest is left out."""
    made: list[Block] = []
    rows: list[Seen] = []
    for number, seen in enumerate(history, start=1):
        rows.append(seen)
        verified = sum(row.verified for row in rows)
        if verified >= BLOCK:
            prompts = sum(row.prompts for row in rows)
            score = sum(row.score * row.prompts for row in rows) / prompts
            error = math.sqrt(sum(row.score_std**2 * row.prompts for row in rows)) / prompts
            correct = sum(row.accuracy * row.verified for row in rows if row.verified)
            made.append(Block(number, score, error, correct / verified, verified))
            rows = []
    return made


def accuracy_fall(history: Sequence[Seen]) -> Fall | None:
    """Whether accuracy in the latest block lies below the best block's, beyond the interval, while the score is above.

        difference = p_now - p_best  +-  z * sqrt(p_now q_now / n_now + p_best q_best / n_best)

    with one success and one failure added to each block (Agresti and Caffo 2000), which holds near 0 and 1 too. The
    k-th look has k earlier blocks to choose the best from, so z is that of (1 - CONFIDENCE) / (k^2 (k + 1)): a union
    bound over the choice and over all looks, for sum over k of 1 / (k (k + 1)) is 1.

    Ranks:    none (pure). None where accuracy holds, or nothing can be said yet.
    """
    made = blocks(history)
    if len(made) < 2:
        return None
    *earlier, now = made
    best = max(earlier, key=lambda block: block.accuracy)
    k = len(earlier)
    low, high = _difference(best, now, _quantile((1 - CONFIDENCE) / (k * k * (k + 1))))
    rise = now.score - best.score
    if high >= 0 or rise <= _quantile(1 - CONFIDENCE) * math.hypot(best.score_error, now.score_error):
        return None
    return Fall(best, now, low, high)


def _quantile(level: float) -> float:
    return NormalDist().inv_cdf(1 - level / 2)


def _difference(before: Block, after: Block, z: float) -> tuple[float, float]:
    shares = [(block.accuracy * block.verified + 1) / (block.verified + 2) for block in (before, after)]
    variances = [p * (1 - p) / (block.verified + 2) for p, block in zip(shares, (before, after), strict=True)]
    centre, half = shares[1] - shares[0], z * math.sqrt(sum(variances))
    return centre - half, centre + half
