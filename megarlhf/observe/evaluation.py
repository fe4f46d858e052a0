"""The page of an evaluation: how often a model is right, with intervals, and responses of both kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from megarlhf.observe.about import About
from megarlhf.observe.facts import data_table, models_table, settings_table
from megarlhf.observe.files import write_whole
from megarlhf.observe.page import facts, fold, minus, row, section, table, tabs, tile, whole_page
from megarlhf.observe.samples import SHOWN, Rollout, cards

KIND = "megarlhf eval"
"""What such a page says that it is."""
Measured = tuple[float, float, float]
"""A mean, and the ends of its 95 % interval."""


@dataclass(frozen=True)
class Decoding:
    """What came of one way to draw responses."""

    name: str
    accuracy: Measured
    score: Measured | None
    """The reward model's; None without one."""
    tokens: float
    """Of a response, on average."""
    cut: float
    """Share of the responses that did not end."""
    rollouts: Sequence[Rollout]


def page_of(output: Path) -> Path:
    """Beside the file of the responses."""
    return output.with_name(f"{output.name}.html")


def write_evaluation(
    page: Path, model: str, verifier: str, command: str, about: About, ways: Sequence[Decoding]
) -> None:
    """Write the page. verifier: what decided that a response is right. command: the command line."""
    title = f"Evaluation of {model}"
    known = [("Problems", f"{len(ways[0].rollouts):,}"), ("Verifier", verifier)]
    known.append(("Ran on", f"{about.ranks} rank{'s' if about.ranks > 1 else ''}, {about.device}"))
    sections = [
        f"<header class=head><h1>{escape(title)}</h1><dl class=facts>{facts(known)}</dl></header>",
        f"<div class=tiles>{''.join(_tile(way) for way in ways)}</div>",
        section("Numbers, with 95 % intervals", _numbers(ways)),
        section("Responses", _responses(ways)),
        section("Models", models_table(about)),
        section("Data", data_table(about)),
        section("Settings that differ from the defaults", settings_table(about)),
        section("How to run this again", fold("Command", f"<pre class=file>{escape(command)}</pre>")),
    ]
    write_whole(page, whole_page(title, KIND, sections))


def _tile(way: Decoding) -> str:
    share, low, high = way.accuracy
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    return tile(f"Accuracy, {way.name}", f"{100 * share:.1f} %", interval)


def _numbers(ways: Sequence[Decoding]) -> str:
    rows = (
        row(
            way.name,
            _interval(way.accuracy),
            _interval(way.score) if way.score else "–",
            f"{way.tokens:.1f}",
            f"{100 * way.cut:.1f} %",
        )
        for way in ways
    )
    return table(("Responses", "Accuracy", "Mean score", "Tokens", "Cut"), rows)


def _interval(of: Measured) -> str:
    return minus(f"{of[0]:.3f} [{of[1]:.3f}, {of[2]:.3f}]")


def _responses(ways: Sequence[Decoding]) -> str:
    """The first that are wrong, and the first that are right, of each way."""
    parts = []
    for way in ways:
        for right, word in ((False, "wrong"), (True, "right")):
            found = [each for each in way.rollouts if each.correct is right]
            count = f"{len(found):,} {word}, the first {min(len(found), SHOWN)} of them"
            if found:
                parts.append((f"{way.name}, {word}", f"<p class=note>{count}</p>{cards(found[:SHOWN])}"))
    return tabs("responses", parts, shown=0) if parts else ""
