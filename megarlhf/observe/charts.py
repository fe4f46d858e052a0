"""Curves as inline SVG that takes its colours and font from the page around it, and their numbers for its script.

Drawn here, and not by matplotlib, which takes 140 ms for each chart and ten times the bytes; its ticks are taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from matplotlib.ticker import EngFormatter, MaxNLocator


class Series(NamedTuple):
    """One curve; it may be without points, to leave its colour to nobody else."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]


MOST = 300
"""Points of a curve that are drawn."""
SERIES = 6
"""Colours that the style sheet has."""
WIDTH, HEIGHT = 310, 150
"""Units of the drawing."""
_TOP, _RIGHT, _BOTTOM, _LETTER = 8, 8, 20, 5.4
"""Room around the plot, and what a letter of a number takes on its left."""
_MARKED = 60
"""Up to so many points each gets a dot; beyond, dots would hide the line."""
_SMALL, _LARGE = 1e-3, 1e4
"""Below, an axis has powers of ten; from the other on it says k, M, G."""
_NEAR = 0.4
"""Of the highest value: an axis begins at 0 where the lowest is below this."""
_STEPS = (1, 2, 2.5, 5, 10)
"""Between two ticks, by their first digits."""
Ends = tuple[float, float]


class Axes(NamedTuple):
    """What the plot shows, and where: the ends of both axes in the data, its box (left, top, right, bottom) in the
    drawing."""

    x: Ends
    y: Ends
    box: tuple[float, float, float, float]

    def at(self, step: float, value: float) -> tuple[float, float]:
        """The place of a point in the drawing."""
        left, top, right, bottom = self.box
        across = (step - self.x[0]) / (self.x[1] - self.x[0])
        up = (value - self.y[0]) / (self.y[1] - self.y[0])
        return round(left + across * (right - left), 1), round(bottom - up * (bottom - top), 1)


def chart(series: Sequence[Series], unit: str, steps: Ends) -> str:
    """The curves over their steps as HTML: a legend where there are several, the drawing, and what a script may show.

    steps: the first and the last of the axis, the same in all charts of a page. Curves of more than MOST points are
    thinned.
    """
    thin = [thinned(each) for each in series]
    y = _ends([value for each in thin for value in each.values], unit)
    ticks = _ticks(y, unit)
    names = _names(ticks)
    left = 8 + _LETTER * max(map(len, names), default=0)
    axes = Axes(_spread(*steps, 0.02), y, (left, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM))
    numbers = {"box": axes.box, "x": axes.x, "y": axes.y, "series": [_numbers(each) for each in thin]}
    said = ", ".join(f"{each.label}: {each.values[-1]:.4g} at last" for each in thin if each.values)
    legend = "".join(f"<li><i class=s{at}></i>{escape(each.label)}" for at, each in enumerate(series, 1))
    return (
        f"{f'<ul class=legend>{legend}</ul>' if len(series) > 1 else ''}"
        f'<div class=plot data-chart="{escape(json.dumps(numbers, separators=(",", ":")))}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="{escape(said)}">'
        f"{_grid(axes, ticks, names)}{''.join(_curve(axes, each, at) for at, each in enumerate(thin, 1))}</svg></div>"
    )


def thinned(series: Series) -> Series:
    """At most MOST points of the curve, all of them in the log: of each stretch those of its lowest and highest value,
    and the two ends."""
    count = len(series.values)
    if count <= MOST:
        return series
    kept = sorted({0, count - 1, *_extremes(series.values, (MOST - 2) // 2)})
    return Series(series.label, [series.steps[i] for i in kept], [series.values[i] for i in kept])


def _extremes(values: Sequence[float], stretches: int) -> Iterator[int]:
    for part in range(stretches):
        stretch = range(len(values) * part // stretches, len(values) * (part + 1) // stretches)
        yield min(stretch, key=values.__getitem__)
        yield max(stretch, key=values.__getitem__)


def _ends(values: Sequence[float], unit: str) -> Ends:
    """Of the axis: below 0 only where a value is, from 0 where that is near, and all of it for a flat fraction."""
    low, high = min(values), max(values)
    if low == high == 0 or (unit == "fraction" and 0 <= low == high <= 1):
        return 0.0, 1.04
    bottom, top = _spread(low, high, 0.1)
    return (0.0 if 0 <= low < _NEAR * high or 0 < low == high else bottom), top


def _spread(low: float, high: float, margin: float) -> Ends:
    """Ends with a margin, a share of what is between them, around both."""
    room = margin * (high - low) if high > low else max(0.1 * abs(high), 1e-12)
    return low - room, high + room


def _ticks(ends: Ends, unit: str) -> list[float]:
    most = min(ends[1], 1.0) if unit == "fraction" and ends[1] <= 1.1 else ends[1]
    return [float(at) for at in MaxNLocator(6, steps=_STEPS).tick_values(*ends) if ends[0] <= at <= most]


def _names(ticks: Sequence[float]) -> list[str]:
    """In one notation, with as many letters as they need."""
    most = max(map(abs, ticks), default=0)
    if most >= _LARGE:
        return [EngFormatter(sep="").format_eng(tick) if tick else "0" for tick in ticks]
    return [_small(tick) if 0 < most < _SMALL and tick else f"{tick:.6g}".replace("-", "−") for tick in ticks]


def _small(value: float) -> str:
    digits, _, exponent = f"{value:.5e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}".replace("-", "−")


def _numbers(series: Series) -> dict[str, object]:
    values = [float(f"{value:.6g}") for value in series.values]
    return {"label": series.label, "steps": [int(step) for step in series.steps], "values": values}


def _grid(axes: Axes, ticks: Sequence[float], names: Sequence[str]) -> str:
    """Both axes: a line for each tick of the values, the steps below."""
    left, _, right, bottom = axes.box
    drawn = f'<path class=axis d="M{left} {bottom}H{right}"/>'
    for tick, name in zip(ticks, names, strict=True):
        _, y = axes.at(axes.x[0], tick)
        drawn += f'<path class=grid d="M{left} {y}H{right}"/><text x="{left - 5}" y="{y + 3}">{name}</text>'
    for tick in MaxNLocator(6, integer=True).tick_values(*axes.x):
        if axes.x[0] <= tick <= axes.x[1]:
            x, _ = axes.at(tick, axes.y[0])
            drawn += f'<text class=step x="{x}" y="{bottom + 13}">{tick:g}</text>'
    return drawn


def _curve(axes: Axes, series: Series, colour: int) -> str:
    points = [axes.at(step, value) for step, value in zip(series.steps, series.values, strict=True)]
    if not points:
        return ""
    path = "".join(f"{'L' if at else 'M'}{x:g} {y:g}" for at, (x, y) in enumerate(points))
    dots = "".join(f'<circle cx="{x:g}" cy="{y:g}" r="1.8"/>' for x, y in points) if len(points) <= _MARKED else ""
    return f'<g class="curve s{colour}"><path d="{path}"/>{dots}</g>'
