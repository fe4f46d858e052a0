"""Rollouts as text on a report's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from megarlhf.observe.files import json_lines, own_file
from megarlhf.observe.run_files import SAMPLES

SHOWN = 8
"""Rollouts of a step on the page."""


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


def compared_section(rows: Sequence[SampleRow]) -> str:
    """Prompts with the responses before and after training."""
    if not rows:
        return ""
    cards = "".join(
        _card(
            row.prompt,
            row.answer,
            f"<div class=pair>{_judged('Before', row.before)}{_judged('After', row.after)}</div>",
        )
        for row in rows
    )
    return f"<h2>Sample rollouts</h2><p class=note>The same held-out prompts before and after.</p>{cards}"


def rollouts_section(run_dir: Path) -> str:
    """The rollouts of the first and of the last step that samples.jsonl has; lines that no run writes are counted."""
    first: list[Rollout] = []
    last: list[Rollout] = []
    unread = 0
    for row in json_lines(own_file(run_dir, SAMPLES)):
        rollout = None if row is None else _rollout(row)
        if rollout is None:
            unread += 1
            continue
        if last and rollout.step != last[0].step:
            last = []
        if not first or rollout.step == first[0].step:
            first.append(rollout)
        last.append(rollout)
    parts = [last, first] if last and last[0].step != first[0].step else [last]
    shown = "".join(_of_step(part, open_=part is last) for part in parts if part)
    unread_note = f"<p class=note>{unread} lines of {SAMPLES} that no run writes are left out.</p>"
    return f"<h2>Sample rollouts</h2>{unread_note if unread else ''}{shown}" if shown or unread else ""


class Rollout(NamedTuple):
    """A line of samples.jsonl."""

    step: int
    prompt: str
    response: str
    answer: str
    score: float | None
    correct: bool | None


def _rollout(row: Mapping[str, Any]) -> Rollout | None:
    """The rollout of a line, None where it has no step, prompt or response."""
    step, prompt, response, answer = row.get("step"), _said(row.get("prompt")), row.get("response"), row.get("answer")
    if type(step) is not int or prompt is None or not isinstance(response, str):
        return None
    score, correct = row.get("score"), row.get("correct")
    return Rollout(
        step,
        prompt,
        response,
        answer if isinstance(answer, str) else "",
        score if isinstance(score, float) else None,
        correct if isinstance(correct, bool) else None,
    )


def _said(prompt: Any) -> str | None:
    """A prompt as one text: itself, or the turns of a conversation."""
    if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt):
        return "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in prompt)
    return prompt if isinstance(prompt, str) else None


def _of_step(rollouts: Sequence[Rollout], *, open_: bool) -> str:
    cards = "".join(
        _card(row.prompt, row.answer, _response("Response", row.response, row.score, row.correct))
        for row in rollouts[:SHOWN]
    )
    summary = f"Step {rollouts[0].step}, {min(len(rollouts), SHOWN)} rollouts"
    return f"<details class=samples{' open' if open_ else ''}><summary>{summary}</summary>{cards}</details>"


def _card(prompt: str, answer: str, responses: str) -> str:
    reference = f"<p class=answer>Reference answer: <b>{escape(answer)}</b></p>" if answer else ""
    return f"<article class='sample card'><p class=prompt>{escape(prompt)}</p>{reference}{responses}</article>"


def _judged(when: str, response: JudgedResponse) -> str:
    return _response(when, response.text, response.score, response.correct)


def _response(title: str, text: str, score: float | None, correct: bool | None) -> str:
    mark, word = ("✓", "right") if correct else ("✗", "wrong")
    badge = "" if correct is None else f" <span class='badge {word}'>{mark} {word}</span>"
    number = "" if score is None else f"<span class=score>score {f'{score:+.2f}'.replace('-', '−')}</span>"
    return f"<div class=response><header>{title}{badge}{number}</header><pre>{escape(text)}</pre></div>"
