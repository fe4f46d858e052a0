"""Intervals for what evaluation measures: a share, and the difference of two policies on the same problems."""

from __future__ import annotations

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
    hits, count = int(correct.sum()), len(correct)
    bounds = scipy.stats.binomtest(hits, count).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(hits / count, float(bounds.low), float(bounds.high))


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
