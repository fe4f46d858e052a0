"""Intervals for what evaluation measures: a share, and the difference of two policies on the same problems."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from torch import Tensor

from megarlhf.ops.first_error import harmonic

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def share(correct: Tensor) -> Interval:
    """The share of True in `correct` [N] bool, with Wilson's interval."""
    return share_of(int(correct.sum()) / len(correct), len(correct))


def share_of(found: float, count: float) -> Interval:
    """A share of `count` independent things, with Wilson's interval (Wilson 1927).

    Where rows are not independent, as the responses to one prompt, `count` is that of what is, the prompts: their share
    need not be a whole number of them, and the interval is at least as wide as theirs.
    """
    z = _normal()
    centre, half = found + z**2 / (2 * count), z * math.sqrt(found * (1 - found) / count + (z / (2 * count)) ** 2)
    low, high = (centre - half) / (1 + z**2 / count), (centre + half) / (1 + z**2 / count)
    return Interval(found, 0.0 if found == 0 else low, 1.0 if found == 1 else high)


def mean_of(found: float, spread: float, count: float) -> Interval:
    """A mean of `count` independent values of that standard deviation (of those values), with Student's interval."""
    half = _student(count - 1) * spread / math.sqrt(count - 1)
    return Interval(found, found - half, found + half)


def mean(values: Tensor) -> Interval:
    """The mean of `values` [N], with Student's interval."""
    return _of_values(values.double().numpy())


def within(found: float, error: float, low: float = -math.inf, high: float = math.inf) -> Interval:
    """An estimate with its standard error, as the normal distribution has it, cut at what it can be."""
    half = _normal() * error
    return Interval(found, max(found - half, low), min(found + half, high))


def auc_of(scores: Tensor, right: Tensor) -> float:
    """The share of all right-wrong couples of which the right one scores more, a tie half: the area under the curve.

    Shapes:   scores [N], right [N] bool. NaN where all or none are right. Source: Mann and Whitney 1947.
    """
    import scipy.stats

    rights, wrongs = scores[right].numpy(), scores[~right].numpy()
    if not len(rights) or not len(wrongs):
        return math.nan
    return float(scipy.stats.mannwhitneyu(rights, wrongs).statistic) / (len(rights) * len(wrongs))


def auc_error(auc: float, right: int, wrong: int) -> float:
    """The standard error of the area under the curve of so many right and wrong ones (Hanley and McNeil 1982)."""
    two_right, two_wrong = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (right - 1) * (two_right - auc**2) + (wrong - 1) * (two_wrong - auc**2)
    return math.sqrt(max(variance, 0.0) / (right * wrong))


def harmonic_of(first: Interval, second: Interval) -> Interval:
    """The harmonic mean of two shares that are independent, with the interval that theirs make together.

    Also of shares of 0 and 1, whose standard errors are 0, but whose intervals are not.
    Source:   Zou and Donner 2008 (MOVER): how far the mean would move with each share at its limit, squared and added.
    """
    found = harmonic(first.mean, second.mean)
    down = math.hypot(found - harmonic(first.low, second.mean), found - harmonic(first.mean, second.low))
    up = math.hypot(harmonic(first.high, second.mean) - found, harmonic(first.mean, second.high) - found)
    return Interval(found, max(found - down, 0.0), min(found + up, 1.0))


def harmonic_error(first: float, second: float, of_first: int, of_second: int) -> float:
    """The standard error of the harmonic mean of two shares, of so many independent things each, to first order.

    d(2ab / (a + b)) / da = 2 b^2 / (a + b)^2.
    """
    whole = (first + second) ** 2
    if whole == 0:
        return 0.0
    variances = [share * (1 - share) / count for share, count in ((first, of_first), (second, of_second))]
    return 2 * math.hypot(second**2 * math.sqrt(variances[0]), first**2 * math.sqrt(variances[1])) / whole


def ratio_error(sums: Tensor, counts: Tensor) -> float:
    """The standard error of sum(sums) / sum(counts), [N] each, over N independent rows (Cochran 1977, eq. 2.46).

    The tokens of a row are not independent; the rows are. 0 for a single one.
    """
    sums, counts, rows = sums.double(), counts.double(), len(sums)
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float((residuals.square().sum() * rows / max(rows - 1, 1)).sqrt() / counts.sum())


def effective(weights: Tensor) -> float:
    """How many rows of equal weight are worth as much as those of `weights` [N]: (sum w)^2 / sum w^2 (Kish 1965)."""
    weights = weights.double()
    return float(weights.sum().square() / weights.square().sum())


def paired_difference(before: Tensor, after: Tensor) -> Interval:
    """Mean of after - before over the same N problems, with Student's interval of the paired differences.

    Shapes:   before, after [N], bool or float, in the same order. Raises ValueError when the lengths differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"before {list(before.shape)} and after {list(after.shape)} are not of the same problems.")
    return _of_values((after.double() - before.double()).numpy())


def _of_values(values: np.ndarray) -> Interval:
    centre = float(values.mean())
    half = _student(len(values) - 1) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return Interval(centre, centre - half, centre + half)


# scipy is imported where it is called: it would take a fifth of the time that a command takes to start.


def _normal() -> float:
    """Standard errors on either side of an estimate that is distributed normally."""
    import scipy.special

    return float(scipy.special.ndtri(0.5 + CONFIDENCE / 2))


def _student(degrees: float) -> float:
    """Standard errors on either side of a mean, of so many degrees of freedom."""
    import scipy.special

    return float(scipy.special.stdtrit(degrees, 0.5 + CONFIDENCE / 2))
