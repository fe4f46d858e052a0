"""When a run was started, and what had been changed by then: starts.jsonl."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megarlhf.observe.files import json_line, json_lines, own_file, writing
from megarlhf.observe.run_files import STARTS


class Start(NamedTuple):
    """One start of a run."""

    at: str
    """Local time, with its distance from UTC."""
    after_step: int
    """Steps that were done before."""
    changes: Mapping[str, tuple[Any, Any]]
    """Settings that were others before, by name: what they were, and what they are."""


def note_start(run_dir: Path, argv: Sequence[str], after_step: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Add a line to `starts.jsonl`. Rank 0 only; `argv` is the command line without the program's name."""
    at = time.strftime("%Y-%m-%d %H:%M:%S %z")
    line = {"at": at, "after_step": after_step, "command": shlex.join(["megarlhf", *argv]), "changes": changes}
    path = run_dir / STARTS
    with writing(path):
        run_dir.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json_line(line))


def read_starts(run_dir: Path) -> list[Start]:
    """Every start of a run, in order; lines that no run writes are left out. Raises DataError as `own_file`."""
    found = (_start(line) for line in json_lines(own_file(run_dir, STARTS)) if line is not None)
    return [start for start in found if start is not None]


def _start(line: Mapping[str, Any]) -> Start | None:
    match line:
        case {"at": str(at), "after_step": int(step), "changes": dict(changes)}:
            pairs = {name: pair for name, pair in changes.items() if isinstance(pair, list) and len(pair) == 2}
            return Start(at, step, {name: (then, now) for name, (then, now) in pairs.items()})
        case _:
            return None
