"""Public data as they are: the shapes of their rows, and pure functions from such a row to the columns of ours.

docs/data.md has a row of each. A shape is found by the columns of the first row, and holds for all rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megarlhf.data.sources import shown

RawRow = Mapping[str, Any]
Turn = dict[str, Any]


class MisfitError(Exception):
    """A row is not of its data's shape: the column, and what is wrong with it."""

    def __init__(self, column: str, problem: str) -> None:
        """`problem` has its remedy."""
        super().__init__(problem)
        self.column, self.problem = column, problem


@dataclass(frozen=True)
class Shape:
    """Rows of one form."""

    said: str
    """What a run says of them at its start."""
    columns: tuple[str, ...]
    """What the data must have."""
    took: Mapping[str, str] = field(default_factory=dict[str, str])
    """Columns of ours, by the data's column that each is, or is made from."""
    read: Callable[[RawRow], dict[str, Any]] = lambda _: {}
    """Makes columns of ours from those of the data, where it takes more than a name. Raises MisfitError."""
    when: Callable[[RawRow], bool] = lambda _: True
    """What must hold besides."""
    several: Callable[[RawRow], list[dict[str, Any]]] | None = None
    """Rows of ours in one of the data, where it holds more than one; after `read`. Raises MisfitError."""
    own: bool = False
    """Whether it is the library's own form, which is preferred to others."""

    def fits(self, row: RawRow) -> bool:
        """Whether a row is of this form."""
        return all(row.get(name) is not None for name in self.columns) and self.when(row)

    def of(self, row: RawRow) -> dict[str, Any]:
        """The row with the columns of ours added."""
        renamed = {name: row.get(own) for name, own in self.took.items()}
        if "response" in renamed:
            renamed["response"] = as_text(renamed["response"])
        return {**row, **renamed, **self.read(row)}


def as_text(value: Any) -> Any:
    """A number as JSON writes it; anything else as it is."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
    return str(value) if is_number else value


def _is_list(*columns: str) -> Callable[[RawRow], bool]:
    return lambda row: all(isinstance(row[name], list) for name in columns)


def _turns(row: RawRow, column: str) -> list[Turn]:
    turns = row[column]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise MisfitError(column, f"{shown(turns)} is not a conversation; give [{{role, content}}, ...]")
    return turns


def _said_by_user(content: Any) -> list[Turn]:
    return [{"role": "user", "content": content}]


def _with_input(row: RawRow) -> dict[str, Any]:
    """Alpaca's: the instruction, an empty line, and the input where there is one."""
    instruction, given = row["instruction"], row.get("input")
    for column, value in (("instruction", instruction), ("input", given or "")):
        if not isinstance(value, str):
            raise MisfitError(column, f"{shown(value)} is not text; put it in quotes")
    return {"prompt": f"{instruction}\n\n{given}" if given and given.strip() else instruction}


def _completed(row: RawRow) -> dict[str, Any]:
    """TRL's prompt and completion: both text, or either of them a conversation."""
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(completion, list):
        return {"response": as_text(completion)}
    before = _turns(row, "prompt") if isinstance(prompt, list) else _said_by_user(prompt)
    return {"messages": [*before, *_turns(row, "completion")]}


_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}


def _from_value(row: RawRow) -> dict[str, Any]:
    """ShareGPT's turns {from, value}; {role, content} is taken as it is."""
    turns = []
    for turn in _turns(row, "conversations"):
        speaker = turn.get("from")
        if speaker is not None and speaker not in _ROLES:
            known = ", ".join(_ROLES)
            raise MisfitError(
                "conversations", f"a turn is from {shown(speaker)}; there are {known}: remove the row, or the turn"
            )
        turns.append(turn if speaker is None else {"role": _ROLES[speaker], "content": turn.get("value")})
    return {"messages": turns}


def _asked(row: RawRow) -> dict[str, Any]:
    """The turns that are answered: all, or all but the last where that is the assistant's."""
    turns = _turns(row, "messages") if "messages" in row else _from_value(row)["messages"]
    return {"prompt": turns[:-1] if turns and turns[-1].get("role") == "assistant" else turns}


def _apart(row: RawRow) -> dict[str, Any]:
    """Chosen and rejected conversations: the turns that both have are the prompt, what comes after are the responses.

    A prompt that stands in a column of its own comes first, unless the conversations begin with it already.
    """
    chosen, rejected, prompt = _turns(row, "chosen"), _turns(row, "rejected"), row.get("prompt")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    asked, left = chosen[:shared], (chosen[shared:], rejected[shared:])
    if prompt is not None and not _begins_with(asked, prompt):
        if asked:
            raise MisfitError("prompt", "chosen and rejected begin with another one; remove one of the two")
        asked = prompt if isinstance(prompt, list) else _said_by_user(prompt)
    if not asked or asked[-1].get("role") != "user":
        last = f"ends with {shown(asked[-1].get('role'))}" if asked else "is empty"
        raise MisfitError("chosen", f"what it has in common with rejected {last}, where a user must have asked")
    if any(len(turns) != 1 for turns in left):
        raise MisfitError("rejected", "differs from chosen in more than the last turn; remove the row")
    return {"prompt": asked, "chosen": left[0], "rejected": left[1]}


def _begins_with(turns: Sequence[Turn], prompt: Any) -> bool:
    """Whether the column prompt says what the turns have: all of them, or the text of one of the user's."""
    if isinstance(prompt, list):
        return bool(turns) and turns == prompt
    return any(turn.get("role") == "user" and turn.get("content") == prompt for turn in turns)


_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def _hh(row: RawRow) -> dict[str, Any]:
    """HH-RLHF's texts: turns, each begun by an empty line and who speaks."""
    return _apart({side: _hh_turns(row[side], side) for side in ("chosen", "rejected")})


def _hh_turns(text: Any, column: str) -> list[Turn]:
    before, *parts = _HH_TURN.split(text) if isinstance(text, str) else [shown(text)]
    if before.strip() or not parts:
        raise MisfitError(column, f"{shown(text)} does not begin with an empty line and Human:")
    said = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": "user" if who == "Human" else "assistant", "content": what.strip()} for who, what in said]


def _begins_as_hh(row: RawRow) -> bool:
    return row.get("prompt") is None and isinstance(row["chosen"], str) and row["chosen"].startswith("\n\nHuman:")


_GRADES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
_MARKED_TURN = re.compile(r"\n*<extra_id_1>(User|Assistant)\n")


def _is_graded(row: RawRow) -> bool:
    return all(row.get(name) is not None for name in _GRADES)


def _marked(row: RawRow) -> dict[str, Any]:
    """HelpSteer2's prompts: text, or turns of which all but the first are begun by a mark and who speaks."""
    if not isinstance(row["prompt"], str):
        return {}
    first, *parts = _MARKED_TURN.split(row["prompt"])
    said = zip(parts[::2], parts[1::2], strict=True)
    later = [{"role": who.lower(), "content": what} for who, what in said]
    return {"prompt": [*_said_by_user(first), *later]} if later else {}


def _not(condition: Callable[[RawRow], bool]) -> Callable[[RawRow], bool]:
    return lambda row: not condition(row)


PROMPTS = (
    Shape("prompt", ("prompt",), when=_not(_is_graded), own=True),
    Shape("HelpSteer2's prompt, <extra_id_1> begins a turn", ("prompt", *_GRADES), read=_marked, own=True),
    Shape("question, answer", ("question",), took={"prompt": "question"}),
    Shape("instruction, an empty line, input", ("instruction",), took={"prompt": "instruction"}, read=_with_input),
    Shape(
        "the turns of messages before the last response",
        ("messages",),
        took={"prompt": "messages"},
        read=_asked,
        when=_is_list("messages"),
    ),
    Shape(
        "the turns of conversations before the last response",
        ("conversations",),
        took={"prompt": "conversations"},
        read=_asked,
        when=_is_list("conversations"),
    ),
)
"""Of prompts."""

DEMONSTRATIONS = (
    Shape("messages", ("messages",), own=True),
    Shape("prompt, response", ("prompt", "response"), when=_not(_is_graded), own=True),
    Shape(
        "HelpSteer2's prompt and response, <extra_id_1> begins a turn",
        ("prompt", "response", *_GRADES),
        read=_marked,
        own=True,
    ),
    Shape("conversations", ("conversations",), took={"messages": "conversations"}, read=_from_value),
    Shape("prompt, completion", ("prompt", "completion"), took={"response": "completion"}, read=_completed),
    Shape(
        "instruction, an empty line, input; output",
        ("instruction", "output"),
        took={"prompt": "instruction", "response": "output"},
        read=_with_input,
    ),
    Shape("question, answer", ("question", "answer"), took={"prompt": "question", "response": "answer"}),
)
"""Of demonstrations."""

PAIRS = (
    Shape(
        "prompt, chosen, rejected",
        ("prompt", "chosen", "rejected"),
        when=_not(_is_list("chosen", "rejected")),
        own=True,
    ),
    Shape(
        "conversations chosen and rejected after prompt (or beginning with it)",
        ("prompt", "chosen", "rejected"),
        when=_is_list("chosen", "rejected"),
        read=_apart,
    ),
    Shape(
        "conversations chosen and rejected (prompt: all turns but the last)",
        ("chosen", "rejected"),
        when=lambda row: row.get("prompt") is None and _is_list("chosen", "rejected")(row),
        read=_apart,
    ),
    Shape(
        "texts chosen and rejected of Human: and Assistant: (prompt: all turns but the last)",
        ("chosen", "rejected"),
        when=_begins_as_hh,
        read=_hh,
    ),
)
"""Of preference pairs."""

JUDGED = (
    Shape("prompt, response, correct", ("prompt", "response", "correct"), when=_not(_is_graded), own=True),
    Shape(
        "HelpSteer2's prompt and response, <extra_id_1> begins a turn",
        ("prompt", "response", *_GRADES),
        read=_marked,
        own=True,
    ),
)
"""Of judged responses."""
