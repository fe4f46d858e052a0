"""What a command writes: that it can, before the work begins, and that nobody else does meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megarlhf.errors import ConfigError
from megarlhf.observe.files import free_bytes, size_text, writing
from megarlhf.observe.lock import held
from megarlhf.observe.run_files import LOCK
from megarlhf.parallel.collectives import on_main
from megarlhf.parallel.mesh import Mesh


def check_directory(directory: Path, setting: str) -> None:
    """Raise ConfigError where `directory`, which `setting` names, cannot be written to, or cannot be made."""
    there = next(path for path in (directory, *directory.absolute().parents) if os.path.lexists(path))
    problem = "" if there.is_dir() else "is a file"
    if not problem and not os.access(there, os.W_OK | os.X_OK):
        problem = "cannot be written to"
    if problem:
        what = "" if there == directory else f" cannot be made: {there}"
        raise ConfigError(f"{setting}={directory}{what} {problem}; choose another {setting}, or mend that.")
    check_room(there, 1, f"{setting}={directory}", f"choose another {setting}")


def check_new_file(path: Path, setting: str = "output") -> None:
    """Raise ConfigError unless the file `path`, which `setting` names, can be made and is not there yet."""
    if os.path.lexists(path):
        raise ConfigError(f"{setting}={path} exists; choose another file, or remove it.")
    check_parent(path, setting)


def check_parent(path: Path, setting: str = "output") -> None:
    """Raise ConfigError unless files can be made where `path`, which `setting` names, shall be."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{setting}={path}: there is no directory {path.parent}; make it, or choose another.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{setting}={path}: {folder} cannot be written to; mend that, or choose another.")
    check_room(folder, 1, f"{setting}={path}", f"choose another {setting}")


def check_room(place: Path, needed: int, what: str, way_out: str) -> None:
    """Raise ConfigError where fewer than `needed` bytes are free in `place`."""
    free = free_bytes(place)
    if free < needed:
        raise ConfigError(
            f"{what}: {size_text(needed)} are needed and {size_text(free)} are free in {place}; make room, or "
            f"{way_out}."
        )


@contextmanager
def sole_writer(lock: Path, setting: str, path: Path, mesh: Mesh) -> Iterator[None]:
    """Inside, this run is the only one that writes `path`, which `setting` names; rank 0 holds the file `lock`.

    Ranks:    collective over the mesh: all go in, or all raise ConfigError naming the process that is inside.
    """

    def take() -> None:
        with writing(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
        stack.enter_context(held(lock, f"{setting}={path}", setting))

    with ExitStack() as stack:
        on_main(take, mesh)
        yield


def lock_of_file(path: Path) -> Path:
    """The lock of a file of results: beside it."""
    return path.with_name(f"{path.name}.{LOCK}")
