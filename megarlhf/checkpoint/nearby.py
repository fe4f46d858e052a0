"""Paths that are no model directory but stand near one: a run, a state of it, a file inside. The right one is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megarlhf.errors import CheckpointError
from megarlhf.observe import run_files

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_place(init: str, *marks: str) -> None:
    """Raise CheckpointError where `init` has none of the files `marks`, and it is known what was meant instead."""
    path = Path(init)
    if any((path / mark).is_file() for mark in marks):
        return
    run = _run_of_state(path)
    places = _places(path) if run is None else [run / run_files.MODEL]
    meant = next((place for place in places if any((place / mark).is_file() for mark in marks)), None)
    if run is not None:
        remedy = f"name {meant}" if meant else f"the model will be in {run / run_files.MODEL} once the run is finished"
        raise CheckpointError(f"model {init!r} is what a run goes on from, not a model; {remedy}.")
    if meant is not None:
        raise CheckpointError(f"model {init!r} is no model directory; did you mean {meant}?")
    if not path.exists() and not path.parent.is_dir() and HUB_NAME.fullmatch(init):
        raise CheckpointError(
            f"model {init!r} is neither a directory nor a preset; check the path, or, if it is a name on the Hugging "
            f"Face Hub, have it here first (hf download {init} --local-dir {path.name}) and name {path.name}."
        )


def _run_of_state(path: Path) -> Path | None:
    """The run that `path` is a saved state of, or has the states of."""
    if path.name == run_files.STATES and run_files.steps_in(path):
        return path.parent
    named = path.name in (run_files.LATEST, run_files.BEST) or run_files.step_of(path.name) is not None
    return path.parent.parent if path.parent.name == run_files.STATES and named else None


def _places(path: Path) -> Iterator[Path]:
    """Where the model may be: in the run `path`, beside a slip of the pen, around a part of it, or in a stage's run."""
    yield path / run_files.MODEL
    for parent in (path.parent, path.parent.parent) if path.exists() else (path.parent,):
        yield parent / run_files.MODEL
        yield parent
    yield from sorted(path.glob(f"*/{run_files.MODEL}"))
    yield from sorted(path.glob("*/"))
