"""What a page says before anything else: that a run failed, what it warned of, and what else looks wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape

from megarlhf.observe.page import minus
from megarlhf.observe.status import Status
from megarlhf.observe.writers import logged

WARNINGS = {
    "warning/over_optimised": (
        "The score rises while accuracy falls: the reward model is over-optimised",
        ("rollout/score_mean", "rollout/accuracy"),
    ),
    "warning/kl_over_bound": ("The policy is farther from the reference than kl_bound", ("kl/reference_mean",)),
}
AT_FIRST = 3
"""So many iterations say how many steps a response has before anything is learnt of them."""
NEVER_RIGHT = 3
"""So many iterations without a right response, and none at all, are worth a word."""


def cautions_of(status: Status, rows: Sequence[Mapping[str, float]], *, of: str = "") -> str:
    """Each in a paragraph; nothing where nothing looks wrong. of: the run, where there are several."""
    lines = [(status.text, "; ".join(status.reasons))] if status.word == "failed" else []
    lines += [line for name in WARNINGS if (line := _held(name, rows))]
    if skipped := _most("train/skipped_steps", rows):
        lines.append((f"{skipped:.0f} optimiser steps were skipped", "their loss or gradient was not finite."))
    for name in (name for name in logged(rows) if re.fullmatch(r"judge/\w+_failures", name)):
        judge = name.removeprefix("judge/").removesuffix("_failures")
        if failures := sum(row.get(name, 0.0) for row in rows):
            lines.append(
                (
                    f"Judge {judge} did not judge {failures:.0f} rollouts as meant",
                    "it took too long, or was asked again.",
                )
            )
    lines += [line for name in logged(rows) if (line := _other_steps(name, rows))]
    accuracy = [row["rollout/accuracy"] for row in rows if "rollout/accuracy" in row]
    if len(accuracy) >= NEVER_RIGHT and not any(accuracy):
        lines.append(("No response was ever right", "does the verifier fit the answers of the prompts?"))
    whose = f"{escape(of)}: " if of else ""
    return "".join(f"<p class=warning>{whose}<b>{escape(text)}</b> {escape(more)}</p>" for text, more in lines)


def _held(name: str, rows: Sequence[Mapping[str, float]]) -> tuple[str, str] | None:
    """What the run warned of, from which step to which, and what became of the quantities that it is about."""
    text, about = WARNINGS[name]
    held = [row for row in rows if row.get(name)]
    if not held:
        return None
    first = {quantity: next((row[quantity] for row in rows if quantity in row), None) for quantity in about}
    values = "; ".join(
        minus(f"{quantity} {before:.3g} → {held[-1][quantity]:.3g}")
        for quantity, before in first.items()
        if before is not None and quantity in held[-1]
    )
    return text, f"(steps {held[0]['step']:.0f} to {held[-1]['step']:.0f}). {values}"


def _other_steps(name: str, rows: Sequence[Mapping[str, float]]) -> tuple[str, str] | None:
    """That responses have half as many steps as they had at first, or twice as many."""
    judge = re.fullmatch(r"steps/(\w+)_per_response", name)
    counts = [row[name] for row in rows if name in row]
    if judge is None or len(counts) <= AT_FIRST:
        return None
    before, now = sum(counts[:AT_FIRST]) / AT_FIRST, counts[-1]
    if before / 2 < now < before * 2:
        return None
    how = "fewer" if now < before else "more"
    values = f"{before:.3g} in the first {AT_FIRST} iterations, {now:.3g} in the last: are they rewarded for that?"
    return f"Responses have far {how} steps than at first, by judge {judge[1]}", values


def _most(name: str, rows: Sequence[Mapping[str, float]]) -> float:
    return max((row.get(name, 0.0) for row in rows), default=0.0)
