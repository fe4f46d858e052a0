"""Paths that are no model directory but stand near one: of a run or a state of it the model is taken, else named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megarlhf.errors import CheckpointError
from megarlhf.observe import run_files

MODEL = "model.json"
"""In every model directory of ours."""
ACTOR = "actor"
"""Whose model a state of several is."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_of(init: str) -> str:
    """The model directory that `init` leads to: a run to its model, or while it has none to its newest state; and a
    state to the model that a run is named for. Any other path is returned as it is.

        RUN        RUN/checkpoints        RUN/checkpoints/{latest,best}        RUN/checkpoints/step_12

    Raises:   CheckpointError where it is of a run, but no model is there.
    """
    path = Path(init)
    if (path / MODEL).is_file() or not init:
        return init
    if (path / run_files.CONFIG).is_file():
        finished = path / run_files.MODEL
        if (finished / MODEL).is_file():
            return str(finished)
        if (path / run_files.STATES).is_dir():
            return str(_in_state(init, _pointed(path / run_files.STATES)))
    if path.name == run_files.STATES and run_files.steps_in(path):
        return str(_in_state(init, _pointed(path)))
    if path.parent.name != run_files.STATES or not path.parent.is_dir():
        return init
    if path.name in (run_files.LATEST, run_files.BEST):
        return str(_in_state(init, _pointed(path.parent, path.name)))
    step = re.fullmatch(r"step_0*(\d+)", path.name)
    return str(_in_state(init, path.parent / run_files.step_name(int(step[1])))) if step else init


def _pointed(states: Path, name: str = run_files.LATEST) -> Path:
    """The state that the file `name` names; without a `latest` the newest."""
    pointer, there = states / name, run_files.steps_in(states)
    if name == run_files.LATEST and not pointer.is_file() and there:
        return list(there.values())[-1]
    try:
        named = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = "the run keeps none (keep_best)" if name == run_files.BEST else type(error).__name__
        raise CheckpointError(f"{pointer} cannot be read: {why}; {_instead(states)}.") from None
    if run_files.step_of(named) is None:
        raise CheckpointError(f"{pointer} names {named[:80]!r}, which is no state; {_instead(states)}.")
    return states / named


def _in_state(init: str, state: Path) -> Path:
    """Of the models in a state the one that learnt alone, or the actor."""
    if state not in run_files.steps_in(state.parent).values():
        raise CheckpointError(f"model {init!r}: {state} is not there; {_instead(state.parent)}.")
    models = {path.parent.name: path.parent for path in state.glob(f"*/{MODEL}")}
    found = models.get(ACTOR) or (next(iter(models.values())) if len(models) == 1 else None)
    if found is None:
        names = f"several, {', '.join(sorted(models))}, and no {ACTOR}" if models else "none"
        raise CheckpointError(f"model {init!r}: of models {state} has {names}; {_instead(state.parent)}.")
    return found


def _instead(states: Path) -> str:
    """What may be named in place of a state that is not there."""
    there = ", ".join(path.name for path in list(run_files.steps_in(states).values())[-3:])
    model = states.parent / run_files.MODEL
    names = [f"one of {states}: {there}"] if there else []
    names += [str(model)] if (model / MODEL).is_file() else []
    return f"name {' or '.join(names)}" if names else f"the model will be in {model} once the run is finished"


def check_place(init: str, *marks: str) -> None:
    """Raise CheckpointError where `init` has none of the files `marks`, and it is known what was meant instead."""
    path = Path(init)
    if any((path / mark).is_file() for mark in marks):
        return
    meant = next((place for place in _places(path) if any((place / mark).is_file() for mark in marks)), None)
    if meant is not None:
        raise CheckpointError(f"model {init!r} is no model directory; did you mean {meant}?")
    if not path.exists() and not path.parent.is_dir() and HUB_NAME.fullmatch(init):
        raise CheckpointError(
            f"model {init!r} is neither a directory nor a preset; check the path, or, if it is a name on the Hugging "
            f"Face Hub, have it here first (hf download {init} --local-dir {path.name}) and name {path.name}."
        )


def _places(path: Path) -> Iterator[Path]:
    """Where the model may be: in the run `path`, beside a slip of the pen, around a part of it, or in a stage's run."""
    yield path / run_files.MODEL
    for parent in (path.parent, path.parent.parent) if path.exists() else (path.parent,):
        yield parent / run_files.MODEL
        yield parent
    yield from sorted(path.glob(f"*/{run_files.MODEL}"))
    yield from sorted(path.glob("*/"))
