"""What a run says of itself at its start, for its page: about.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megarlhf.errors import DataError
from megarlhf.observe.files import own_file, write_whole
from megarlhf.observe.run_files import ABOUT


@dataclass(frozen=True)
class Setting:
    """A setting as the run has it, and its default, both in words."""

    name: str
    value: str
    default: str
    differs: bool


@dataclass(frozen=True)
class ModelFacts:
    """A model of the run."""

    role: str
    init: str
    """Where its weights start."""
    head: str
    parameters: int


@dataclass(frozen=True)
class DataFacts:
    """A set of rows."""

    name: str
    """Its setting."""
    source: str
    split: str
    rows: int
    dropped: int
    """Rows left out because they are too long."""
    bad: int
    """Rows left out because they cannot be used."""
    tokens: int
    template: str
    shape: str = ""
    """What the rows were read as; empty for rows that are made here."""
    epochs: float | None = None
    """Passes over it; None for what is only measured on."""


@dataclass(frozen=True)
class About:
    """What is known of a run before its first step."""

    unit: str
    """What its steps are: steps, or iterations."""
    steps: int
    """How many it is to take; 0 for none."""
    ranks: int
    device: str
    models: tuple[ModelFacts, ...] = ()
    data: tuple[DataFacts, ...] = ()
    settings: tuple[Setting, ...] = ()
    """All of them."""


def write_about(run_dir: Path, about: About) -> None:
    """Write `about.json`. Rank 0 only."""
    write_whole(run_dir / ABOUT, json.dumps(asdict(about), indent=1) + "\n")


def read_about(run_dir: Path) -> About | None:
    """What a run said of itself; None where it said nothing.

    Raises:   DataError when the file is damaged, or leads out of the run.
    """
    path = own_file(run_dir, ABOUT)
    if path is None:
        return None
    try:
        return TypeAdapter(About).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(f"{path}: {where}: {first['msg']}; remove it, and the page does without.") from None
