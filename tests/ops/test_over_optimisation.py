"""When a series of scores and accuracies is called over-optimised, and when not."""

from __future__ import annotations

import math
from random import Random

import pytest

from megarlhf.ops.over_optimisation import BLOCK, Seen, accuracy_fall, blocks


def series(accuracies: list[float], scores: list[float], prompts: int = BLOCK, rng: Random | None = None) -> list[Seen]:
    """Iterations with these true accuracies: drawn with `rng`, exact without."""
    found = []
    for accuracy, score in zip(accuracies, scores, strict=True):
        hits = accuracy if rng is None else sum(rng.random() < accuracy for _ in range(prompts)) / prompts
        noise = 0.0 if rng is None else rng.gauss(0, 1 / math.sqrt(prompts))
        found.append(Seen(score + noise, 1.0, prompts, hits, prompts))
    return found


def first_alarm(history: list[Seen]) -> int:
    """Number of the first iteration after which the rule speaks; 0 if it never does."""
    return next((n for n in range(1, len(history) + 1) if accuracy_fall(history[:n])), 0)


def line(start: float, end: float, count: int) -> list[float]:
    return [start + (end - start) * i / (count - 1) for i in range(count)]


@pytest.mark.parametrize("seed", range(10))
def test_score_up_and_accuracy_down_is_seen(seed: int) -> None:
    history = series(line(0.3, 0.05, 10), line(0, 2, 10), rng=Random(seed))
    assert 3 <= first_alarm(history) <= 8


def test_a_fall_from_a_peak_is_seen_too() -> None:
    up_and_down = [*line(0.2, 0.8, 10), *line(0.75, 0.45, 10)]
    assert 12 <= first_alarm(series(up_and_down, line(0, 2, 20), rng=Random(1))) <= 16
    fall = accuracy_fall(series(up_and_down, line(0, 2, 20)))
    assert fall is not None
    assert (fall.best.last, fall.best.accuracy, fall.now.last) == (10, 0.8, 20)


def test_what_is_no_over_optimisation_is_let_pass() -> None:
    rng = Random(2)
    assert first_alarm(series(line(0.4, 0.95, 25), line(0, 1.3, 25), rng=rng)) == 0  # PPO at its best
    assert first_alarm(series(line(0.5, 0.2, 25), line(0, -2, 25), rng=rng)) == 0  # worse, and the score says so
    assert first_alarm(series([0.0] * 25, line(0, 2, 25), rng=rng)) == 0  # never right: nothing to lose
    assert first_alarm(series([1.0] * 25, line(0, 2, 25), rng=rng)) == 0
    assert first_alarm([Seen(float(i), 1.0, BLOCK, math.nan, 0) for i in range(25)]) == 0  # no answers
    assert accuracy_fall([]) is None


def test_a_steady_accuracy_is_seldom_suspected_however_long_the_run() -> None:
    """At most 5 of 100 runs by construction; the union bound makes it fewer."""
    alarms = sum(first_alarm(series([0.5] * 60, line(0, 3, 60), prompts=BLOCK, rng=Random(s))) > 0 for s in range(20))
    assert alarms <= 1


def test_the_interval_by_hand() -> None:
    fall = accuracy_fall(series([0.25, 0.125], [0.0, 1.0]))
    assert fall is not None
    before, after, z = 65 / 258, 33 / 258, 2.241403  # z of 0.05 / (1 * 2): the first look
    half = z * math.sqrt(before * (1 - before) / 258 + after * (1 - after) / 258)
    assert (fall.low, fall.high) == pytest.approx((after - before - half, after - before + half), abs=1e-6)
    # The same fall is no news at a score within its error (1 / 16 each) of the first.
    assert accuracy_fall(series([0.25, 0.125], [0.0, 0.1])) is None


def test_small_iterations_are_pooled_and_a_rest_waits() -> None:
    history = series([0.5, 0.25, 0.25] * 10, [1.0, 0.0, 0.5] * 10, prompts=BLOCK // 3 + 1)
    made = blocks(history[:8])
    assert [block.last for block in made] == [3, 6]
    assert made[0].accuracy == pytest.approx(1 / 3)
    assert made[0].score == pytest.approx(0.5)
    assert made[0].verified == 3 * (BLOCK // 3 + 1)
    assert made[0].score_error == pytest.approx(1 / math.sqrt(made[0].verified))
