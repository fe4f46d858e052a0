"""Prompts and responses as text on a page. What files and models say is shown, and does nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from megarlhf.errors import printable
from megarlhf.observe.files import json_lines, own_file
from megarlhf.observe.page import TABS, minus, section, tabs
from megarlhf.observe.run_files import SAMPLES

SHOWN = 8
"""Rollouts of a step on the page."""
HEAD, TAIL = 2000, 1000
"""Characters shown of a long text: where it begins, and how it ends."""
TURNS = 10
"""Turns shown of a long conversation: the first, and the last."""
STEPS = 12
"""Steps of a response of which the page says what they are worth."""
_CONTROL = re.compile(r"&lt;\|[^|\s]{1,60}\|&gt;")
"""A control token of Llama 3 and its like, in HTML."""

Said = str | tuple[tuple[str, str], ...]
"""A prompt: text, or the turns of a conversation, each a role and what it says."""


@dataclass(frozen=True)
class JudgedResponse:
    """A response with the reward model's score and the verifier's verdict."""

    text: str
    score: float
    correct: bool


@dataclass(frozen=True)
class SampleRow:
    """One prompt, its reference answer, and what the policy said before and after training."""

    prompt: str
    answer: str
    before: JudgedResponse
    after: JudgedResponse


@dataclass(frozen=True)
class Rollout:
    """A prompt, a response to it, and what was said of that."""

    prompt: Said
    response: str
    answer: str = ""
    score: float | None = None
    correct: bool | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    """By judge, where there are several."""
    steps: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """By judge of steps, what each step is worth."""


def compared_section(rows: Sequence[SampleRow]) -> str:
    """Prompts with the responses before and after training."""
    cards = "".join(
        _card(
            row.prompt,
            row.answer,
            f"<div class=pair>{_judged('Before', row.before)}{_judged('After', row.after)}</div>",
        )
        for row in rows
    )
    note = "<p class=note>The same held-out prompts before and after.</p>"
    return section("Sample rollouts", f"{note}{cards}" if cards else "")


def rollouts_section(run_dir: Path) -> str:
    """The rollouts of samples.jsonl by step, the last step's shown; lines that no run writes are counted."""
    steps: dict[int, list[Rollout]] = {}
    unread = 0
    for row in json_lines(own_file(run_dir, SAMPLES)):
        rollout = None if row is None else _rollout(row)
        step = None if row is None else row.get("step")
        if rollout is None or type(step) is not int:
            unread += 1
            continue
        steps.setdefault(step, [])
        if len(steps[step]) < SHOWN:
            steps[step].append(rollout)
    notes = [f"{unread} lines of {SAMPLES} that no run writes are left out."] if unread else []
    chosen = spread(sorted(steps), TABS)
    if len(chosen) < len(steps):
        notes.append(f"{len(chosen)} of the {len(steps)} steps that {SAMPLES} has.")
    parts = [(f"step {step}", cards(steps[step])) for step in chosen]
    shown = tabs("samples", parts, shown=len(parts) - 1) if parts else ""
    return section("Sample rollouts", "".join(f"<p class=note>{note}</p>" for note in notes) + shown)


def spread(items: Sequence[int], most: int) -> list[int]:
    """At most so many of the items: the first, the last, and others evenly between them."""
    if len(items) <= most:
        return list(items)
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def _rollout(row: Mapping[str, Any]) -> Rollout | None:
    """The rollout of a line, None where it has no prompt or response."""
    prompt, response, answer = prompt_of(row.get("prompt")), row.get("response"), row.get("answer")
    if prompt is None or not isinstance(response, str):
        return None
    score, correct, scores = row.get("score"), row.get("correct"), row.get("scores")
    return Rollout(
        prompt,
        response,
        answer if isinstance(answer, str) else "",
        score if isinstance(score, float) else None,
        correct if isinstance(correct, bool) else None,
        {str(name): one for name, one in scores.items() if isinstance(one, float)} if isinstance(scores, dict) else {},
        _steps(row.get("steps")),
    )


def _steps(value: Any) -> dict[str, list[float]]:
    """What judges said of steps; nothing where that is anything else."""
    lists = {str(name): of for name, of in value.items() if isinstance(of, list)} if isinstance(value, dict) else {}
    return {name: of for name, of in lists.items() if all(isinstance(one, float) for one in of)}


def prompt_of(value: Any) -> Said | None:
    """A prompt as rows have it, text or a conversation [{role, content}, ...]; None for anything else."""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        return tuple((str(turn.get("role")), str(turn.get("content"))) for turn in value)
    return value if isinstance(value, str) else None


def cards(rollouts: Sequence[Rollout]) -> str:
    """Each prompt once, with the responses to it that follow each other."""
    return "".join(
        _card(prompt, answer, "".join(_response("Response", each) for each in group))
        for (prompt, answer), group in groupby(rollouts, lambda each: (each.prompt, each.answer))
    )


def _card(prompt: Said, answer: str, responses: str) -> str:
    reference = f"<p class=answer>Reference answer: <b>{_text(answer)}</b></p>" if answer else ""
    turns = [("", prompt)] if isinstance(prompt, str) else _turns(prompt)
    roles = (f"<span class=role>{_text(role)}</span>" if role else "" for role, _ in turns)
    texts = (f"<p class=prompt>{_text(said, share=len(turns))}</p>" for _, said in turns)
    shown = "".join(role + text for role, text in zip(roles, texts, strict=True))
    return f"<article class='sample card'>{shown}{reference}{responses}</article>"


def _turns(turns: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    left_out = len(turns) - TURNS
    return (turns[0], ("", f"[… {left_out:,} turns …]"), *turns[1 - TURNS :]) if left_out > 0 else turns


def _judged(when: str, said: JudgedResponse) -> str:
    return _response(when, Rollout("", said.text, score=said.score, correct=said.correct))


def _response(title: str, of: Rollout) -> str:
    mark, word = ("✓", "right") if of.correct else ("✗", "wrong")
    badge = "" if of.correct is None else f" <span class='badge {word}'>{mark} {word}</span>"
    each = "".join(f"<span>{_text(name)} {minus(f'{one:+.2f}')}</span>" for name, one in of.scores.items())
    whole = "" if of.score is None else f"<span>score {minus(f'{of.score:+.2f}')}</span>"
    each += "".join(f"<span>{_text(name)} by step {_each(values)}</span>" for name, values in of.steps.items())
    scores = f"<span class=score>{each}{whole}</span>" if each or whole else ""
    return f"<div class=response><header>{title}{badge}{scores}</header><pre>{_text(of.response)}</pre></div>"


def _each(values: Sequence[float]) -> str:
    shown = [minus(f"{value:+.2f}") for value in values[:STEPS]]
    return " ".join([*shown, f"… {len(values) - STEPS:,} more"] if len(values) > STEPS else shown)


def _text(text: str, *, share: int = 1) -> str:
    """`text` in HTML: control tokens marked, what cannot be seen as its escape, a long one without its middle.

    share: texts that the room for one is for.
    """
    head, tail = HEAD // share, TAIL // share
    left_out = len(text) - head - tail
    if left_out > 0:
        text = f"{text[:head]}\n[… {left_out:,} characters …]\n{text[-tail:]}"
    return _CONTROL.sub(lambda token: f"<span class=token>{token[0]}</span>", escape(printable(text)))
