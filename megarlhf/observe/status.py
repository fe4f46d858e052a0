"""How it stands with a run: finished, running, stopped or failed, as its directory tells."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megarlhf.observe.about import About
from megarlhf.observe.files import own_file
from megarlhf.observe.lock import is_written_by_another
from megarlhf.observe.run_files import CAPSULES, LOCK, MODEL, STATES, steps_in
from megarlhf.observe.starts import read_starts

Word = Literal["finished", "running", "stopped", "failed"]


class Status(NamedTuple):
    """One word, and a sentence."""

    word: Word
    text: str
    reasons: tuple[str, ...] = ()
    """What the ranks of a failed step said."""


def status_of(run_dir: Path, rows: Sequence[Mapping[str, float]], about: About | None) -> Status:
    """How it stands now. rows: what the run has logged.

    Raises:   DataError where what a failed step left cannot be read.
    """
    done, unit = int(rows[-1]["step"]) if rows else 0, about.unit if about else "steps"
    planned = about.steps if about else 0
    after = f"after {done:,} of {planned:,} {unit}" if planned else f"after {done:,} {unit}"
    if (run_dir / MODEL).is_dir():
        return Status("finished", f"Finished {'early, ' if done < planned else ''}{after}.")
    if is_written_by_another(run_dir / LOCK):
        return Status("running", f"Running: {after}, when this page was made." if done else "Running: before step 1.")
    failed = [(step, path.relative_to(run_dir)) for step, path in steps_in(run_dir / CAPSULES).items() if step >= done]
    if failed and _is_of_last_start(run_dir, failed[-1][1]):
        step, place = failed[-1]
        where = "before its first step" if not step else f"in the step {after}"
        return Status("failed", f"Failed {where}; what the ranks left is in {place}.", _reasons(run_dir, place))
    if not done:
        return Status("stopped", "No step was logged.")
    states = [step for step in steps_in(run_dir / STATES) if step <= done]
    goes_on = f"the same command goes on after step {states[-1]:,}" if states else "no state is saved to go on from"
    return Status("stopped", f"Stopped {after}; {goes_on}.")


def _is_of_last_start(run_dir: Path, capsule: Path) -> bool:
    """Whether the capsule is not of a failure after which the run was started again."""
    starts = [re.sub(r"\D", "", start.at)[:14] for start in read_starts(run_dir)]
    attempts = [re.sub(r"\D", "", str(note.get("attempt", "")))[:14] for note in _notes(run_dir, capsule)]
    return not starts or not any(attempts) or max(attempts) >= starts[-1]


def _reasons(run_dir: Path, capsule: Path) -> tuple[str, ...]:
    """Why the step failed, each rank that says something else than the others."""
    found: dict[str, None] = {}
    for said in _notes(run_dir, capsule):
        if isinstance(said.get("reason"), str):
            where = said["where"] if isinstance(said.get("where"), str) else ""
            found[f"{said['reason']}{f' ({where})' if where else ''}"] = None
    return tuple(found)


def _notes(run_dir: Path, capsule: Path) -> Iterator[dict[str, Any]]:
    """What each rank left, where it can be read."""
    for path in sorted((run_dir / capsule).glob("rank_*.json")):
        note = own_file(run_dir, str(capsule / path.name))
        try:
            said = json.loads(note.read_bytes()) if note else None
        except (ValueError, RecursionError):
            continue
        if isinstance(said, dict):
            yield said
