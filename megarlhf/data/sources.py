"""What lies where a source says, as it lies there: JSON, parquet, or what `datasets` loads from a directory or the hub.

JSON is parsed here, line by line, because the type inference of `datasets` reads a column of dates as timestamps and
turns "1" beside 2 into numbers, after which no bad row could be named.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from megarlhf.data.inside import check_inside
from megarlhf.errors import ConfigError, DataError

_JSON = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_FILE_ENDINGS = frozenset(
    (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".md", ".arrow", ".gz", ".zip", ".zst", ".xz")
)
"""No hub name ends so."""


def raw_rows(source: str, subset: str, split: str) -> Iterable[dict[str, Any] | DataError]:
    """Rows in order; in place of one that is no object of columns the error that says so, which ends nothing.

    Raises:   DataError where the source is missing or unreadable; ConfigError for a split that a file does not have.
    """
    path = Path(source)
    if is_there(path, Path.is_dir) or not (_is_path(source) or is_there(path, Path.exists)):
        return _datasets(source, subset, split)
    _check_file(source, split)
    if not source.endswith(_JSON):
        return _datasets(source, subset, split)
    return _json_list(path) if _is_list(path) else _json_lines(path)


def is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    """`kind(path)`, and False for what cannot be looked at: a name that no file system takes, a forbidden directory."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


def shown(value: object) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _check_file(source: str, split: str) -> None:
    path = Path(source)
    if not is_there(path, Path.exists):
        local = len(path.parts) == 2 and is_there(path.parent, Path.is_dir)
        hint = f", or start elsewhere if it is the hub's: a directory {path.parent} is here" if local else ""
        raise DataError(f"data file does not exist: {source}; check the path{hint}.")
    if not source.endswith((*_JSON, ".parquet")) or not path.is_file():
        raise DataError(
            f"data file has another form: {source}; give JSON lines (.jsonl: one object a line), a list of objects "
            "(.json), either of them compressed (.jsonl.gz, .json.gz), or .parquet."
        )
    if split not in ("", "train"):
        raise ConfigError(f"split: {split!r} of {source}; a file is one split, leave it empty.")


def _opened(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                yield line.removeprefix(BOM_UTF8) if number == 1 else line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"data file is damaged: {path}: {error}; compress it again.") from error
    except OSError as error:
        raise DataError(f"data file cannot be read: {path}: {error.strerror}; check it.") from error


def _is_list(path: Path) -> bool:
    """Whether a .json holds one list, and not an object a line."""
    named = path.name.removesuffix(".gz").endswith(".json")
    return named and next((line.lstrip()[:1] for line in _lines(path) if line.strip()), b"") == b"["


def _json_list(path: Path) -> Iterator[dict[str, Any] | DataError]:
    try:
        items = _parsed(b"".join(_lines(path)))
    except _UnreadableError as error:
        raise DataError(f"data file is no list of rows: {path}{error.problem}; mend it.") from error.__cause__
    for number, item in enumerate(items, start=1):
        bad = f"bad row: {path}, row {number}: {shown(item)}; every item must be one JSON object."
        yield item if isinstance(item, dict) else DataError(bad)


def _json_lines(path: Path) -> Iterator[dict[str, Any] | DataError]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"bad row: {path}, row {number}"
        try:
            row = _parsed(line)
        except _UnreadableError as error:
            yield DataError(f"{where}{error.problem}; {error.remedy}.")
        else:
            bad = f"{where}: {shown(row)}; every line must be one JSON object."
            yield row if isinstance(row, dict) else DataError(bad)


class _UnreadableError(Exception):
    """What to say after the file and the row, and what helps."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text.decode().rstrip(), object_pairs_hook=_columns)
    except json.JSONDecodeError as error:
        where = f", line {error.lineno}" if error.lineno > 1 else ""
        problem = f"{where}, character {error.colno}: not JSON ({error.msg})"
        raise _UnreadableError(problem, "every line must be one object") from error
    except UnicodeDecodeError as error:
        raise _UnreadableError(f": not UTF-8 ({error.reason} at byte {error.start + 1})", "re-encode it") from error
    except RecursionError as error:
        raise _UnreadableError(": lists or objects nested too deep", "every line must be one object") from error
    except ValueError as error:
        raise _UnreadableError(f": {error}", "mend or remove the row") from error


def _columns(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return columns


def _datasets(source: str, subset: str, split: str) -> Iterable[Any]:
    """Rows through `datasets`, which since version 4 runs no code from the hub."""
    import datasets

    directory = Path(source) if is_there(Path(source), Path.is_dir) else None
    split = split or "train"
    try:
        if source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=source, split="train")
        if directory is not None:
            check_inside(directory)
        return datasets.load_dataset(source, subset or None, split=split)
    except DataError:
        raise
    except Exception as error:  # hub, cache and format errors share no base class
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise DataError(
            f"data cannot be read: {source}, split {split}: {reason}; give a .jsonl, .json or .parquet file, or "
            "a directory or hub name that `datasets` can load."
        ) from error


def _is_path(source: str) -> bool:
    """Whether `source` cannot be a hub name (name or owner/name): asking the hub for it would only waste retries."""
    owner, slash, _ = source.partition("/")
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source, re.ASCII) is not None and len(source) <= 96
    is_local = bool(slash) and is_there(Path(owner), Path.is_dir)
    return not is_name or is_local or Path(source).suffix.lower() in _FILE_ENDINGS
