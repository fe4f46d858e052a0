"""Files that others read while a run goes on, or after it; runs that others have made; what full disks say."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from safetensors import SafetensorError

from megarlhf.errors import DataError, OutputError

REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)

MOST_BYTES = 8 << 20
"""Of what lists the tensors or files of a model, some 50 times the largest Llama's: more takes seconds to refuse."""


def write_whole(path: Path, text: str) -> None:
    """Write `text` so that a reader finds all of it or what was there before, whenever this process is stopped.

    A link at `path` is replaced; what it names is left as it is.

    Raises:   OutputError where the disk refuses.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, `path` is written.

    Raises:   OutputError naming it, the cause and the room that is left, where the disk refuses.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be written ({reason(error)}); {remedy(path)}.") from error


@contextmanager
def opened(path: Path, mode: Literal["w", "ab"]) -> Iterator[IO[Any]]:
    """The file, open in `mode`.

    What a full disk did not take is tried again when a file is closed: that must not hide why the block ended.
    """
    with writing(path):
        file: IO[Any] = path.open(mode, encoding=None if "b" in mode else "utf-8")
    try:
        yield file
    except BaseException:
        with suppress(OSError):
            file.close()
        raise
    with writing(path):
        file.close()


def refused(error: BaseException) -> bool:
    """Whether it is the disk that stops the work: full, read-only, broken, or gone."""
    return isinstance(error, OSError) and error.errno in REFUSALS


def reason(error: BaseException) -> str:
    """Why a disk refused, in its own words."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error).partition("\n")[0]


def remedy(path: Path) -> str:
    """What helps there, by what is left."""
    there = next((place for place in (path, *path.absolute().parents) if place.exists()), Path("/"))
    place = there if there.is_dir() else there.parent
    return f"{size_text(free_bytes(place))} are free in {place}: make room, or have it writable, and start again"


def free_bytes(place: Path) -> int:
    """What this user may still write there."""
    return shutil.disk_usage(place).free


def size_text(size: int) -> str:
    """A size for people."""
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size:,} bytes"


def json_line(row: Any) -> str:
    """`row` as one line of JSON, which has no word for numbers that are not finite: they become null.

    Half a surrogate pair, which JSON may hold and UTF-8 may not, becomes the \\udXXX that JSON writes for it.
    """
    text = json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:   OSError; ValueError with the reason where it holds anything else.
    """
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"it has {size:,} bytes, at most {MOST_BYTES:,} are read")
    try:
        found = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_no_number)
    except UnicodeDecodeError:
        raise ValueError("its text is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds {type(found).__name__} in place of an object")
    return found


def link_out(directory: Path) -> Path | None:
    """A link in `directory` that leads out of it, or to nothing; None where there is none.

    In the cache of Hugging Face's hub, where a snapshot is links to the repository's blobs, those count as inside.
    """
    real = directory.resolve()
    roots = [real, real.parents[1] / "blobs"] if real.parent.name == "snapshots" else [real]
    for folder, folders, names in os.walk(real):
        for path in (Path(folder, name) for name in (*folders, *names)):
            if path.is_symlink() and not (path.exists() and any(path.resolve().is_relative_to(root) for root in roots)):
                return directory / path.relative_to(real)
    return None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")
