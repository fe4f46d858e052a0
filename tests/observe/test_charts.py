"""Charts: no number that a quantity cannot have, thin curves of values that were logged, labels that tell apart."""

from __future__ import annotations

import html
import json
import math
import re
from typing import Any

import pytest

from megarlhf.observe.charts import MOST, Series, chart, thinned
from megarlhf.observe.panels import labels


def numbers_of(drawn: str) -> dict[str, Any]:
    """What a chart hands to the page's script."""
    return json.loads(html.unescape(re.findall(r'data-chart="(.*?)"', drawn)[0]))


def ticks_of(drawn: str) -> list[float]:
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    return [float(text.replace("−", "-")) for text in texts]


@pytest.mark.parametrize(
    ("unit", "values", "lowest", "highest"),
    [
        ("fraction", [0.0, 0.0], 0, 1),
        ("fraction", [1.0, 1.0], 0, 1),
        ("fraction", [0.0, 0.01], 0, 1),
        ("fraction", [0.9, 1.0], 0, 1),
        ("tokens", [0.0, 40.0], 0, 100),
        ("reward", [0.0, 0.0], 0, 2),
        ("1", [1e-8, 3e-8], 0, 1),
        ("fraction", [-0.5, 0.5], -1, 1),
    ],
)
def test_an_axis_names_no_number_that_the_quantity_cannot_have(
    unit: str, values: list[float], lowest: float, highest: float
) -> None:
    drawn = chart([Series("a", range(len(values)), values)], unit, (0, 1))
    ticks = ticks_of(drawn)
    assert len(ticks) >= 4
    assert all(lowest <= tick <= highest for tick in ticks), ticks
    assert min(values) < 0 or numbers_of(drawn)["y"][0] >= 0


@pytest.mark.parametrize("value", [0.0, 1.0, 0.3])
def test_a_flat_fraction_has_the_whole_axis_and_zeros_lie_on_it(value: float) -> None:
    drawn = chart([Series("a", [20, 30], [value, value])], "fraction", (20, 30))
    assert sorted(tick for tick in ticks_of(drawn) if tick < 20) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert numbers_of(drawn)["y"][0] == 0.0


def test_a_large_axis_says_thousands() -> None:
    drawn = chart([Series("a", [1, 2], [20_000.0, 2.5e6])], "tokens/s", (1, 2))
    assert {"0", "1M", "2M"} <= set(re.findall(r"<text[^>]*>([^<]*)</text>", drawn))


def test_where_a_pointer_is_told_is_where_the_curve_is_drawn() -> None:
    """The last point of a rising curve: by the numbers, and in the drawing."""
    drawn = chart([Series("a", list(range(100)), [math.sqrt(at) for at in range(100)])], "1", (0, 99))
    told = numbers_of(drawn)
    left, top, right, bottom = told["box"]
    x = left + (99 - told["x"][0]) / (told["x"][1] - told["x"][0]) * (right - left)
    y = bottom - (math.sqrt(99) - told["y"][0]) / (told["y"][1] - told["y"][0]) * (bottom - top)
    (line,) = re.findall(r'<g class="curve s1"><path d="M([^"]*)"', drawn)
    assert [float(number) for number in line.split("L")[-1].split()] == pytest.approx([x, y], abs=0.06)


def test_a_long_curve_is_thinned_to_points_that_were_logged_its_extremes_among_them() -> None:
    values = [math.sin(at / 7) + (5 if at == 4321 else 0) for at in range(10_000)]
    thin = thinned(Series("a", range(10_000), values))
    assert MOST - 4 <= len(thin.values) <= MOST
    assert all(values[int(step)] == value for step, value in zip(thin.steps, thin.values, strict=True))
    assert (thin.steps[0], thin.steps[-1]) == (0, 9999)
    assert 4321 in thin.steps
    assert list(thin.steps) == sorted(thin.steps)


def test_a_legend_names_each_of_several_curves_and_stands_above_them() -> None:
    two = [Series("policy", [1, 2], [0.1, 0.2]), Series("<value>", [1], [0.3])]
    drawn = chart(two, "fraction", (1, 2))
    assert drawn.startswith("<ul class=legend><li><i class=s1></i>policy<li><i class=s2></i>&lt;value&gt;</ul>")
    assert "legend" not in chart(two[:1], "fraction", (1, 2))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("rollout/score_mean", "rollout/reward_mean"), ["score", "reward"]),
        (("policy/grad_norm", "value/grad_norm"), ["policy", "value"]),
        (("dpo/loss", "dpo/heldout_loss"), ["loss", "heldout loss"]),
        (("throughput/rollout_tokens_per_s", "throughput/score_tokens_per_s"), ["rollout", "score"]),
        (("kl/reference_mean",), ["kl reference mean"]),
        (("reward/pair_accuracy", "reward/accuracy"), ["pair accuracy", "accuracy"]),
    ],
)
def test_labels_say_what_tells_the_metrics_of_a_chart_apart(names: tuple[str, ...], told: list[str]) -> None:
    assert labels(names) == told
