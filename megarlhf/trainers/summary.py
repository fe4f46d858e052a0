"""What a run says of its last metrics, each with the 95 % interval that its sample allows."""

from __future__ import annotations

import math

from megarlhf.eval.intervals import Interval, mean_of, share_of, within
from megarlhf.observe.metrics import Metrics


def plainly(metrics: Metrics, *names: str) -> list[str]:
    """Those of the metrics that were logged."""
    return [f"{name} {metrics[name]:.4g}" for name in names if name in metrics]


def as_share(metrics: Metrics, name: str, count: float) -> list[str]:
    """A share of `count` independent rows, or pairs, or prompts."""
    return _within(name, share_of(metrics[name], count)) if name in metrics and count >= 1 else []


def as_mean(metrics: Metrics, name: str, spread: str, count: float) -> list[str]:
    """A mean over `count` independent values, whose standard deviation is the metric `spread`."""
    # Values that are all alike say nothing of how others would vary.
    known = name in metrics and metrics.get(spread, 0.0) > 0 and count >= 2
    return _within(name, mean_of(metrics[name], metrics[spread], count)) if known else plainly(metrics, name)


def as_estimate(metrics: Metrics, name: str, low: float = -math.inf, high: float = math.inf) -> list[str]:
    """What is logged with its standard error, as NAME_stderr, and lies from low to high."""
    error = f"{name}_stderr"
    return _within(name, within(metrics[name], metrics[error], low, high)) if error in metrics else []


def _within(name: str, found: Interval) -> list[str]:
    return [f"{name} {found.mean:.4g} [{found.low:.4g}, {found.high:.4g}]"]
