"""Curves as inline SVG that takes its colours and font from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megarlhf.observe.metrics import meaning


class Panel(NamedTuple):
    """One chart: a title and the metrics it draws, all of one unit."""

    title: str
    metrics: tuple[str, ...]


PANELS = (
    Panel("Score", ("rollout/score_mean", "rollout/reward_mean", "eval/score_mean")),
    Panel("Accuracy", ("rollout/accuracy", "eval/accuracy")),
    Panel("Groups of equal scores", ("group/equal_fraction",)),
    Panel("KL to the reference", ("kl/reference_mean", "eval/kl_mean")),
    Panel("Response length", ("rollout/response_length_mean", "eval/response_length_mean")),
    Panel("Truncated responses", ("rollout/truncated_fraction", "eval/truncated_fraction")),
    Panel("Entropy", ("policy/entropy_mean",)),
    Panel("Clip fraction", ("policy/clip_fraction", "value/clip_fraction")),
    Panel("Policy loss", ("policy/loss",)),
    Panel("Value loss", ("value/loss",)),
    Panel("Explained variance", ("value/explained_variance",)),
    Panel("Gradient norm", ("policy/grad_norm", "value/grad_norm")),
    Panel("Sampler against trainer", ("rollout/sampler_gap_max",)),
    Panel("SFT loss", ("sft/loss", "sft/heldout_loss")),
    Panel("Reward-model loss", ("reward/loss",)),
    Panel("Loss of pairs", ("reward/pairwise_loss", "reward/heldout_pairwise_loss")),
    Panel("Reward-model accuracy", ("reward/pair_accuracy", "reward/heldout_pair_accuracy", "reward/auc")),
    Panel("Margin of pairs", ("reward/margin_mean", "reward/heldout_margin_mean")),
    Panel("Calibration error, held out", ("reward/heldout_calibration_error",)),
    Panel("DPO loss", ("dpo/loss", "dpo/heldout_loss")),
    Panel("Pairs in the right order", ("dpo/accuracy", "dpo/heldout_accuracy")),
    Panel("Implicit rewards", ("dpo/chosen_reward_mean", "dpo/rejected_reward_mean", "dpo/margin_mean")),
    Panel("Margin of implicit rewards, held out", ("dpo/heldout_margin_mean",)),
    Panel("Gradient norm, DPO", ("dpo/grad_norm",)),
)
"""What a report draws, in this order; a panel none of whose metrics was logged is left out."""

# Matplotlib wants colours, the page has variables (it turns dark with the reader's system): these stand in for them.
_INK, _GRID = "#010203", "#040506"
_SERIES = ("#0a0101", "#0a0102", "#0a0103")
_VARIABLES = {
    _INK: "var(--muted)",
    _GRID: "var(--grid)",
    **{colour: f"var(--series-{i})" for i, colour in enumerate(_SERIES, 1)},
}
_MARKED = 60
"""Up to so many points each gets a dot; beyond, dots would hide the line."""


def panels_of(rows: Sequence[Mapping[str, float]]) -> list[Panel]:
    """PANELS, and where a run has several judges theirs, as many in one as there are colours."""
    names = tuple(dict.fromkeys(name for row in rows for name in row if re.fullmatch(r"judge/\w+_mean", name)))
    starts = range(0, len(names) if len(names) > 1 else 0, len(_SERIES))
    judges = (
        Panel(f"Judges from {first + 1}" if first else "Judges", names[first:][: len(_SERIES)]) for first in starts
    )
    return [PANELS[0], *judges, *PANELS[1:]]


def drawable(panel: Panel, rows: Sequence[dict[str, float]]) -> Panel:
    """Keep the metrics of `panel` that were logged at least once."""
    return Panel(panel.title, tuple(name for name in panel.metrics if any(name in row for row in rows)))


def curves_svg(panel: Panel, rows: Sequence[dict[str, float]], *, prefix: str) -> str:
    """Draw the metrics over `step` as an `<svg>` element whose ids begin with `prefix`; `rows` as in metrics.jsonl."""
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "megarlhf", "font.family": "sans-serif", "font.size": 9}
    ):
        figure = Figure(figsize=(4.2, 2.35), layout="constrained")
        axes = figure.add_subplot()
        for colour, name, label in zip(_SERIES, panel.metrics, _labels(panel.metrics), strict=False):
            points = [(row["step"], row[name]) for row in rows if name in row]
            steps, values = zip(*points, strict=True)
            marker = "o" if len(points) <= _MARKED else ""
            axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, markersize=3, label=label)
        _style(axes, lines=len(panel.metrics))
        _bound(axes, [row[name] for row in rows for name in panel.metrics if name in row], unit_of(panel))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), prefix=re.sub(r"\W+", "-", f"{prefix} {panel.title}".lower()))


def unit_of(panel: Panel) -> str:
    """Return the unit of the panel's axis."""
    return meaning(panel.metrics[0]).unit


def _labels(names: Sequence[str]) -> list[str]:
    """Name the lines by what tells them apart: the family, the quantity, or where both differ both."""
    pairs = [name.removesuffix("_mean").split("/") for name in names]
    told_by = [place for place, parts in enumerate(zip(*pairs, strict=True)) if len(set(parts)) > 1] or [1]
    return [" ".join(pair[place] for place in told_by).replace("_", " ") for pair in pairs]


def _style(axes: Axes, *, lines: int) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(colors=_INK, length=0, labelsize=8.5)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.02, y=0.1)
    if lines > 1:
        # Above the axes: inside, it would lie on a curve sooner or later.
        above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": lines, "borderaxespad": 0.0}
        axes.legend(frameon=False, fontsize=8.5, labelcolor=_INK, handlelength=1.2, **above)


def _bound(axes: Axes, values: Sequence[float], unit: str) -> None:
    """Show no number that the quantity cannot have: none below 0 where none was logged, and fractions in 0 to 1."""
    low, high = min(values), max(values)
    if low < 0:
        return
    fraction = unit == "fraction" and high <= 1
    if fraction and low == high:
        axes.set_ylim(-0.04, 1.04)  # a flat line has no scale of its own
    bottom, top = axes.get_ylim()
    axes.set_yticks([tick for tick in axes.get_yticks() if max(bottom, 0.0) <= tick <= (1.0 if fraction else top)])
    axes.set_ylim(bottom, top)


def _inline(document: str, prefix: str) -> str:
    """Cut the XML prologue, make ids unique on the page, let size, font and colours come from the style sheet."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg.strip()
