"""Public data of judged steps as they are: the shapes of their rows, and how such a row becomes prompt, steps, labels.

docs/data.md has a row of each. A label is 1 for a right step, 0 for a wrong one, or null where nobody said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from megarlhf.data.shapes import MisfitError, RawRow, Shape
from megarlhf.data.sources import shown

TAG = "ки"
"""After each step in Math-Shepherd's rows."""
EXTRA = "<extra_0>"
"""After each step in Qwen's."""
_FIRST_STEP = re.compile(r"\bStep 1:")
_SIGNS = {"+": 1.0, "-": 0.0}


def step_shapes(neutral: float | None) -> tuple[Shape, ...]:
    """Of judged steps. neutral: the label of a step that PRM800K rates 0."""
    return (
        Shape("prompt, steps, labels", ("prompt", "steps", "labels"), own=True),
        Shape("prompt, completions, labels (TRL)", ("prompt", "completions", "labels"), took={"steps": "completions"}),
        Shape(
            "PRM800K's question and label (an alternative to a step is a row of its own)",
            ("question", "label"),
            took={"prompt": "question", "steps": "label", "labels": "label"},
            when=lambda row: isinstance(row["question"], Mapping) and isinstance(row["label"], Mapping),
            read=_asked,
            several=partial(_branches, neutral=neutral),
        ),
        Shape(
            f"Math-Shepherd's input and label, {TAG} after each step",
            ("input", "label"),
            took={"prompt": "input", "steps": "input", "labels": "label"},
            when=lambda row: isinstance(row["input"], str) and TAG in row["input"],
            read=_tagged,
        ),
        Shape(
            "conversations of steps and their signs (RLHFlow)",
            ("conversations",),
            took={"prompt": "conversations", "steps": "conversations", "labels": "conversations"},
            when=lambda row: isinstance(row["conversations"], list),
            read=_signed,
        ),
        Shape(
            f"prompt, response, labels, {EXTRA} after each step (Qwen)",
            ("prompt", "response", "labels"),
            took={"steps": "response"},
            when=lambda row: isinstance(row["response"], str) and EXTRA in row["response"],
            read=_marked,
        ),
        Shape(
            "ProcessBench's problem and steps (label: the first wrong one, from 0, or -1)",
            ("problem", "steps", "label", "final_answer_correct"),
            took={"prompt": "problem", "labels": "label"},
            read=_up_to_first_error,
        ),
    )


def _asked(row: RawRow) -> dict[str, Any]:
    return {"prompt": row["question"].get("problem")}


def _branches(row: RawRow, neutral: float | None) -> list[dict[str, Any]]:
    """PRM800K's tree: the solution that was gone on with, then each alternative to one of its steps.

    A person's step is right, for people wrote one where all others were wrong. At the last step nothing may be chosen:
    then the first alternative ends the solution. What comes before an alternative is labelled in the solution alone.
    """
    steps = row["label"].get("steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, Mapping) for step in steps):
        raise MisfitError("label", f"its steps are {shown(steps)}, not a list of at least one; remove the row")
    taken: list[Any] = []
    labels: list[float | None] = []
    others: list[tuple[list[Any], list[float | None]]] = []
    for number, step in enumerate(steps, start=1):
        rated = [_rated(each, neutral) for each in step.get("completions") or []]
        person, chosen = step.get("human_completion"), step.get("chosen_completion")
        if chosen is None and person is not None:
            text, label = (person.get("text") if isinstance(person, Mapping) else person), 1.0
        else:
            chosen = 0 if chosen is None and number == len(steps) else chosen
            if not isinstance(chosen, int) or not 0 <= chosen < len(rated):
                raise MisfitError(
                    "label", f"step {number} goes on with completion {chosen} of {len(rated)}; remove the row"
                )
            text, label = rated.pop(chosen)
        others += [([*taken, other], [*[None] * len(taken), rating]) for other, rating in rated]
        taken, labels = [*taken, text], [*labels, label]
    found = [each for each in [(taken, labels), *others] if any(label is not None for label in each[1])]
    if not found:
        raise MisfitError("label", "no step has a rating; remove the row")
    return [{**row, "steps": texts, "labels": known} for texts, known in found]


def _rated(completion: Any, neutral: float | None) -> tuple[Any, float | None]:
    """The text and the label of one of PRM800K's completions."""
    rating = completion.get("rating") if isinstance(completion, Mapping) else completion
    known = {1: 1.0, 0: neutral, -1: 0.0, None: None}
    if not isinstance(completion, Mapping) or rating not in known:
        raise MisfitError("label", f"the rating {shown(rating)} is none of -1, 0, 1; remove the row")
    return completion.get("text"), known[rating]


def _tagged(row: RawRow) -> dict[str, Any]:
    """Math-Shepherd's: the same text twice, where one has the tag after each step, the other its sign.

    What comes after the last tag is a step that nobody judged.
    """
    *pieces, rest = row["input"].split(TAG)
    left = row["label"] if isinstance(row["label"], str) else ""
    labels: list[float | None] = []
    for number, piece in enumerate(pieces, start=1):
        sign = left[len(piece) : len(piece) + 1]
        if not left.startswith(piece) or sign not in _SIGNS:
            tag = f"its tag {number} of {len(pieces)}"
            raise MisfitError("label", f"not the text of input with + or - in place of {tag}; remove the row")
        labels.append(_SIGNS[sign])
        left = left[len(piece) + 1 :]
    if left != rest:
        raise MisfitError("label", f"not the text of input after its {len(pieces)} tags; remove the row")
    prompt, first = _parted(pieces[0], "input", f"the first {TAG}")
    steps = [first, *(piece.strip() for piece in pieces[1:]), *([rest.strip()] if rest.strip() else [])]
    return {"prompt": prompt, "steps": steps, "labels": labels + [None] * (len(steps) - len(labels))}


def _parted(text: str, column: str, until: str, remedy: str = "") -> tuple[str, str]:
    """The prompt, and the first step, which its number begins. remedy: what helps besides."""
    found = _FIRST_STEP.search(text)
    if found is None or not text[: found.start()].strip():
        raise MisfitError(column, f"no prompt and Step 1: before {until}; remove the row{remedy}")
    return text[: found.start()].strip(), text[found.start() :].strip()


def _signed(row: RawRow) -> dict[str, Any]:
    """RLHFlow's: a user says a step, the assistant its sign.

    The first step follows the prompt, from which its number, or the column prompt, tells it apart.
    """
    turns = row["conversations"]
    if not all(isinstance(turn, Mapping) and isinstance(turn.get("content"), str) for turn in turns):
        raise MisfitError("conversations", f"{shown(turns)} is not a conversation; give [{{role, content}}, ...]")
    roles, said = [turn.get("role") for turn in turns], [turn["content"].strip() for turn in turns]
    steps, signs = said[0::2], said[1::2]
    if not signs or roles != ["user", "assistant"] * len(signs) or not set(signs) <= _SIGNS.keys():
        raise MisfitError("conversations", "not a user's step and the assistant's + or - in turn; remove the row")
    known = row.get("prompt")
    if known is None:
        remedy = ", or name a column that has the prompt alone, by columns.prompt"
        known, first = _parted(steps[0], "conversations", "the first sign", remedy)
    elif isinstance(known, str) and steps[0].startswith(known.strip()):
        first = steps[0][len(known.strip()) :].strip()
    else:
        raise MisfitError("conversations", f"does not begin with the prompt {shown(known)}; remove the row")
    return {"prompt": known, "steps": [first, *steps[1:]], "labels": [_SIGNS[sign] for sign in signs]}


def _marked(row: RawRow) -> dict[str, Any]:
    """Qwen's: a mark after each step, and a label for each."""
    *steps, rest = (piece.strip() for piece in row["response"].split(EXTRA))
    return {"steps": [*steps, rest] if rest else steps}


def _up_to_first_error(row: RawRow) -> dict[str, Any]:
    """ProcessBench's: right before the first wrong step; after it nobody said."""
    steps, first = row["steps"], row["label"]
    count = len(steps) if isinstance(steps, list) else 0
    if not isinstance(first, int) or isinstance(first, bool) or not -1 <= first < count:
        raise MisfitError("label", f"{shown(first)} is no step of {count}, from 0, nor -1; remove the row")
    return {"labels": [1.0] * count if first < 0 else [*[1.0] * first, 0.0, *[None] * (count - first - 1)]}
