"""What a rank leaves behind when a run fails: where it was, the batch it worked on, its random state, the settings.

    RUN/capsules/step_00000012/rank_0.json          where, why, the command and all settings
    RUN/capsules/step_00000012/rank_0.safetensors   its rows of the batch, and the states of random numbers
    RUN/capsules/step_00000012/weights/             of the role, where all ranks failed together

`megarlhf replay` does the step again. A rank that is killed leaves nothing, which is how the others know who it was.
"""

from __future__ import annotations

import dataclasses
import json
import time
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megarlhf.batch.base import Batch
from megarlhf.config import Config
from megarlhf.errors import DataError, OutputError
from megarlhf.observe.files import write_whole, writing
from megarlhf.observe.run_files import CAPSULES, COMMAND, CONFIG, step_name
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.rng import random_states

RNG = "random state"
SETTLE_S = 2.0
"""Seconds that a rank waits for the capsules of others before it says whose are missing."""


Count = Annotated[int, pydantic.Field(ge=0)]


class Note(Config):
    """What one rank says of itself."""

    reason: str
    """Why it failed."""
    where: str
    """Step, phase and role, in words."""
    step: Count
    """Steps done."""
    role: str
    """That worked last."""
    collective: str
    """Entered last."""
    rank: Count
    """In the world."""
    part: Count
    """Which part of the batch its rows are, counted from 0."""
    world_size: Count
    """Ranks of the run."""
    attempt: str
    """Of which start of the run this is a part."""
    trainer: str = ""
    """Module whose TRAINER the run is of; empty where it is not known."""
    kind: str
    """Type of the batch; empty for none."""
    texts: dict[str, list[str]]
    """Those parts of the batch that are no tensors, by dotted name."""
    command: str
    """Command line of the run."""
    config: str
    """Its settings, as YAML."""


def capsule_directory(run_dir: Path, step: int) -> Path:
    """Where the capsules of a failure in the step after `step` lie."""
    return run_dir / CAPSULES / step_name(step)


def write_capsule(run_dir: Path, reason: str, mesh: Mesh) -> Path:
    """Write this rank's capsule and return its directory. No rank waits for another."""
    trail = mesh.trail
    directory = capsule_directory(run_dir, trail.step)
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    batch = trail.work if isinstance(trail.work, Batch) else None
    note = Note(
        reason=reason,
        where=trail.where,
        step=trail.step,
        role=trail.role,
        collective=trail.collective,
        rank=mesh.rank,
        part=trail.part,
        world_size=mesh.layout.world_size,
        attempt=trail.attempt,
        trainer=trail.trainer,
        kind="" if batch is None else type(batch).__name__,
        texts=dict(texts_of(batch)) if batch is not None else {},
        command=_text(run_dir / COMMAND),
        config=_text(run_dir / CONFIG),
    )
    # Copies: parts of a batch may share memory, which safetensors refuses.
    tensors = {} if batch is None else {name: tensor.cpu().clone() for name, tensor in tensors_of(batch)}
    random = {f"{RNG}, {name}": state for name, state in random_states(mesh.device).items()}
    data = directory / f"rank_{mesh.rank}.safetensors"
    with writing(data):
        save_file({**tensors, **random}, data)
    # Last, and whole at once: the note says that the rest is there.
    write_whole(directory / f"rank_{mesh.rank}.json", json.dumps(note.model_dump(mode="json"), indent=1) + "\n")
    return directory


def leave_capsule(run_dir: Path, reason: str, mesh: Mesh) -> str:
    """Write this rank's capsule; say where it is, or why there is none, which must not hide why there should be one."""
    try:
        return f"the batch is in {write_capsule(run_dir, reason, mesh)}"
    except OutputError as error:
        return f"no capsule was left, since {str(error).rstrip('.')}"


def read_notes(directory: Path) -> list[Note]:
    """The notes of all ranks that left one, by rank.

    Raises:   DataError when there is none, or one cannot be read.
    """
    notes = []
    for path in directory.glob("rank_*.json"):
        try:
            notes.append(Note.model_validate_json(path.read_text(encoding="utf-8"), strict=True))
        except (OSError, ValueError) as error:
            first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else None
            cause = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else type(error).__name__
            raise DataError(f"capsule {path} cannot be read ({cause}); name another capsule.") from None
    if not notes:
        raise DataError(f"capsule={directory} holds no rank_*.json; name a directory under RUN/capsules.")
    return sorted(notes, key=lambda note: note.rank)


def read_batch(directory: Path, note: Note, kind: type[Batch]) -> Batch:
    """The batch of one rank, of the type that its note names.

    Raises:   DataError when its file is missing, damaged, or of another batch.
    """
    path = directory / f"rank_{note.rank}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return _rebuilt(kind, "", tensors, note.texts)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise DataError(f"{path}: no {kind.__name__} of a failed step ({cause}); name another capsule.") from None


def missing_ranks(directory: Path, mesh: Mesh) -> list[int]:
    """The ranks that have left no capsule in this attempt, after a moment for them.

    Those of the collective entered last, if there are some: the others may wait for one of these in their turn.
    """
    time.sleep(SETTLE_S)
    try:
        there = {note.rank for note in read_notes(directory) if note.attempt == mesh.trail.attempt}
    except DataError:  # a full disk, or a hand that removed them: then nobody's is there
        there = set()
    axes = [mesh.ranks(axis) for axis in (mesh.trail.axis or "world", "world")]
    return next((silent for ranks in axes if (silent := sorted(set(ranks) - there))), [])


def last_seen(run_dir: Path, rank: int, attempt: str) -> str:
    """Where a rank was when it last entered a phase."""
    found, _, where = _text(sign_of_life(run_dir, rank)).strip().partition(" ")
    return where if found == attempt and where else "before the first step"


def sign_of_life(run_dir: Path, rank: int) -> Path:
    """The file in which a rank says where it is."""
    return run_dir / "ranks" / f"rank_{rank}"


def tensors_of(batch: Batch, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch and of the batches inside it, by dotted name."""
    for name, value in vars(batch).items():
        if isinstance(value, Batch):
            yield from tensors_of(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield prefix + name, value


def texts_of(batch: Batch, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every tuple of texts, likewise."""
    for name, value in vars(batch).items():
        if isinstance(value, Batch):
            yield from texts_of(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            yield prefix + name, list(value)


def _rebuilt(kind: type[Batch], prefix: str, tensors: dict[str, Tensor], texts: dict[str, list[str]]) -> Any:
    fields: dict[str, Any] = {}
    hints = typing.get_type_hints(kind)
    for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(kind)):
        if isinstance(hint, type) and issubclass(hint, Batch):
            fields[name] = _rebuilt(hint, f"{prefix}{name}.", tensors, texts)
        else:
            fields[name] = tensors[prefix + name] if hint is Tensor else tuple(texts[prefix + name])
    return kind(**fields)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
