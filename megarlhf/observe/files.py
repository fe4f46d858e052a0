"""Files that others read while a run goes on, or after it was killed; and the files of runs that others have made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megarlhf.errors import DataError


def write_whole(path: Path, text: str) -> None:
    """Write `text` so that a reader finds all of it or what was there before, whenever this process is stopped.

    A link at `path` is replaced; what it names is left as it is.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    with partial.open("x", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def own_file(run_dir: Path, name: str) -> Path | None:
    """The file `name` of a run, None where there is none.

    Raises:   DataError where it is no plain file, or a link that leads out of the directory: a run that somebody sent
              must not show what lies elsewhere on this machine.
    """
    path = run_dir / name
    if not path.is_symlink() and not path.exists():
        return None
    if not path.resolve().is_relative_to(run_dir.resolve()):
        raise DataError(f"{path}: leads to {path.resolve()}, which is outside of the run; put the file itself there.")
    if not path.is_file():
        raise DataError(f"{path}: is no file that can be read; remove it.")
    return path


def json_lines(path: Path | None) -> Iterator[dict[str, Any] | None]:
    """Each line of a JSON lines file as an object, None for a line that holds none; nothing where there is no file.

    A last line without its end is still being written, and is left out.
    """
    if path is None:
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # text in another encoding and 5000 digits are ValueErrors too
                row = None
            yield row if isinstance(row, dict) else None
