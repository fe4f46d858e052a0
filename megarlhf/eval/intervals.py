"""Intervals for what evaluation measures: a share, and the difference of two policies on the same problems."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.stats
from torch import Tensor

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
    z = float(scipy.stats.norm.ppf(0.5 + CONFIDENCE / 2))
    centre, half = found + z**2 / (2 * count), z * math.sqrt(found * (1 - found) / count + (z / (2 * count)) ** 2)
    low, high = (centre - half) / (1 + z**2 / count), (centre + half) / (1 + z**2 / count)
    return Interval(found, max(low, 0.0), min(high, 1.0))


def mean_of(found: float, spread: float, count: float) -> Interval:
    """A mean of `count` independent values of that standard deviation (of those values), with Student's interval."""
    half = float(scipy.stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * spread / math.sqrt(count - 1)
    return Interval(found, found - half, found + half)


def mean(values: Tensor) -> Interval:
    """The mean of `values` [N], with Student's interval."""
    return _student(values.double().numpy())


def paired_difference(before: Tensor, after: Tensor) -> Interval:
    """Mean of after - before over the same N problems, with Student's interval of the paired differences.

    Shapes:   before, after [N], bool or float, in the same order. Raises ValueError when the lengths differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"before {list(before.shape)} and after {list(after.shape)} are not of the same problems.")
    return _student((after.double() - before.double()).numpy())


def _student(values: np.ndarray) -> Interval:
    centre, error = float(values.mean()), float(scipy.stats.sem(values))
    if error == 0.0:  # all equal: scipy would answer NaN
        return Interval(centre, centre, centre)
    low, high = scipy.stats.t.interval(CONFIDENCE, len(values) - 1, loc=centre, scale=error)
    return Interval(centre, float(low), float(high))
