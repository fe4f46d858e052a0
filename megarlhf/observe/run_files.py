"""What a run leaves in its directory, and how its steps are numbered there: the one place where the names are spelt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

CONFIG = "config.yaml"
"""The resolved settings."""
COMMAND = "command.txt"
TRAINER = "trainer.txt"
"""The module of the trainer that the run is of."""
STARTS = "starts.jsonl"
"""One line a start: when, after which step, the command, and which settings were others before."""
ABOUT = "about.json"
"""What the run says of its models, data and settings, for its page."""
VERSIONS = "versions.json"
"""Of the packages that decide the numbers, and the commit."""
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TENSORBOARD = "tensorboard"
WANDB = "wandb.txt"
"""The id that Weights & Biases knows the run by."""
STATES = "checkpoints"
"""Directory of training states, one a step that was saved."""
LATEST, BEST = "latest", "best"
"""Files in STATES, each with the name of one of them."""
CAPSULES = "capsules"
"""Directory of what failed steps left, one a step."""
MODEL = "model"
"""The trained model, once the run is finished."""
REPORT, REPORT_DATA = "report.html", "report.json"
"""The page, and what a command that compares runs adds to it."""
LOCK = "lock"
"""Held by the run that writes here; also the suffix of a file's lock."""

LOGS = (METRICS, SAMPLES)
"""What a run appends to."""
TRACES = (METRICS, CONFIG, MODEL, STATES)
"""Any of these in a directory means that a run has used it."""

_STEP = re.compile(r"step_(\d{8,})")


def step_name(step: int) -> str:
    """The directory of what belongs to the run after `step` steps."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a directory so named; None for any other name, one that is still being written among them."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found and step_name(int(found[1])) == name else None


def steps_in(directory: Path) -> dict[int, Path]:
    """What `directory` has of each step, in their order; what is elsewhere, and only linked here, is left out."""
    return dict(sorted((step, path) for step, path in _steps(directory)))


def _steps(directory: Path) -> Iterator[tuple[int, Path]]:
    for path in directory.glob("step_*"):
        step = step_of(path.name)
        if step is not None and not path.is_symlink():
            yield step, path
