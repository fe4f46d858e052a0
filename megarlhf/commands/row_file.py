"""The output of `megarlhf score` and `generate`: a file that grows row by row, in order, and can be gone on with.

Y.jsonl                   one row of the input a line, with the fields that the command adds
Y.jsonl.settings.json     the settings that decide those fields
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from megarlhf.data.row import Row
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.observe.files import opened, write_whole, writing
from megarlhf.rollout.sampling import SamplingConfig
from megarlhf.runtime.outputs import check_parent, check_room
from megarlhf.runtime.settings import RanksConfig

CONTENT = ("*.safetensors", "*.distcp", "*.pt", ".metadata", "*.json", "*.jinja", "*.model")
"""Files of a model's or a tokenizer's directory that decide what it says."""
DAY = "date"
"""Setting that is kept where a chat template renders one."""
BLOCKS, BLOCK = 64, 1 << 16
"""So many blocks of so many bytes are read of a file: a step of training changes every block of weights, and all of a
70B model's would take minutes."""


def who_reads(model: str, tokenizer: str) -> dict[str, Any]:
    """The settings that decide what a model and its tokenizer make of a row: their directories, and what is in them."""
    return {**place_of("model", model), **place_of("tokenizer", tokenizer)}


def who_draws(cfg: RanksConfig, sampling: SamplingConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings that decide how responses are drawn. The layout is none: it changes rounding at most."""
    return {
        **{f"sampling.{name}": value for name, value in sampling.model_dump(mode="json").items()},
        **numbers_of(cfg),
        **({} if tokenizer.date is None else {DAY: str(tokenizer.date)}),
    }


def numbers_of(cfg: RanksConfig) -> dict[str, Any]:
    """The settings that decide which numbers a model makes, beside its weights."""
    return {"seed": cfg.seed, "compute.dtype": cfg.compute.dtype, "compute.fp8": cfg.compute.fp8}


def place_of(setting: str, name: str) -> dict[str, Any]:
    """The directory that a setting names, and what is in it."""
    return {setting: _place(name), f"{setting}'s content": _content(name)}


def _place(name: str) -> str:
    """A directory by its full path, whatever the working directory; any other name as it is."""
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _content(name: str) -> str:
    """What tells a directory from one that was trained anew in its place; nothing of a built-in name."""
    return content(Path(name)) if name and Path(name).is_dir() else ""


def finite(value: float) -> float | None:
    """A number as JSON has it: null where it is not finite."""
    return value if math.isfinite(value) else None


def content(directory: Path) -> str:
    """A digest of a model's or a tokenizer's directory: names and sizes, and blocks spread over each file."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in CONTENT for path in directory.rglob(pattern) if path.is_file()}):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory).as_posix()}\0{size}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            for start in range(0, size, max(BLOCK, -(-size // BLOCKS))):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


class Done(NamedTuple):
    """Whole rows at the head of an output, and their bytes; what follows is a line that was cut."""

    rows: int
    size: int


def output_file(path: Path, settings: Mapping[str, Any], added: Sequence[str]) -> RowFile:
    """The file that the setting `output` names."""
    return RowFile(path, settings, added, f"output={path}", "choose another output")


@dataclass(frozen=True)
class RowFile:
    """An output, and what must be true of it to go on with it."""

    path: Path
    settings: Mapping[str, Any]
    """Every setting that decides what is added, by name; JSON values."""
    added: Sequence[str]
    """Fields added to each row."""
    named: str
    """What it is in messages: the setting with its value."""
    another: str
    """What helps where it is not to be gone on with, such as: choose another output."""

    @property
    def settings_path(self) -> Path:
        """Where the settings lie."""
        return self.path.with_name(f"{self.path.name}.settings.json")

    def said(self, done: Done, rows: int) -> list[str]:
        """What a start says of a file that is gone on with. rows: in all."""
        left = f"{rows - done.rows} left" if done.rows < rows else "nothing is left"
        return [f"{self.path}: {done.rows} of {rows} rows are there, {left} to do"] if done.rows else []

    def day(self) -> datetime.date | None:
        """The day that the chat template was told when the file was begun; None where it was not, or nobody knows."""
        if not self._begun():
            return None
        try:
            return datetime.date.fromisoformat(_object(self.settings_path.read_bytes())[DAY])
        except (OSError, ValueError, KeyError, TypeError):  # what is wrong with the file, `done` says
            return None

    def check_writable(self) -> None:
        """Raise ConfigError where the file cannot be written."""
        check_parent(self.path)
        if self.path.is_dir():
            raise ConfigError(f"output={self.path} is a directory; name a file.")
        for file in (self.path, self.settings_path):
            if file.exists() and not file.is_file():
                raise ConfigError(f"output={self.path}: {file} is no file; remove it, or choose another.")
        for place in (self.path, self.settings_path):
            if place.exists() and not os.access(place, os.W_OK):
                raise ConfigError(f"output={self.path}: {place} cannot be written to; mend that, or choose another.")

    def check_room(self, rows: Sequence[Row]) -> None:
        """Raise ConfigError where the disk has no room for `rows` as they are: what is added comes on top."""
        needed = sum(len(self.line(row, {})) for row in rows)
        check_room(self.path.absolute().parent, needed, self.named, self.another)

    def done(self, rows: Sequence[Row]) -> Done:
        """What of the input `rows` the file already holds; it is left as it is.

        Raises:   ConfigError when the file was begun by something else, with other settings or with other rows.
        """
        if not self._begun():
            return Done(0, 0)
        self._check_settings()
        count = size = 0
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                if count == len(rows):
                    raise ConfigError(
                        f"{self.named} has more rows than the {len(rows)} of {rows[0].source}; put the input back to "
                        f"go on with it, or {self.another}."
                    )
                self._check_row(line, count + 1, rows[count])
                count, size = count + 1, size + len(line)
        return Done(count, size)

    @contextmanager
    def open_after(self, done: Done) -> Iterator[IO[bytes]]:
        """The file, open for the rows after `done`; a cut line is removed. Rank 0 only."""
        # The settings first: rows without them could not be gone on with.
        write_whole(self.settings_path, json.dumps(self.settings, indent=2) + "\n")
        with opened(self.path, "ab") as file:
            with writing(self.path):
                file.truncate(done.size)
            yield file

    def write(self, file: IO[bytes], rows: Sequence[Row], fields: Sequence[Mapping[str, Any]]) -> None:
        """Add the lines of `rows` to the open file, so that a kill leaves them."""
        with writing(self.path):
            file.writelines(map(self.line, rows, fields))
            file.flush()

    def line(self, row: Row, fields: Mapping[str, Any]) -> bytes:
        """One line of the file: the columns of `row` as they are, then the added `fields`."""
        text = json.dumps({**row.columns, **fields}, ensure_ascii=False)
        # Half a surrogate pair, which JSON may hold and UTF-8 may not, becomes the \udXXX that JSON writes for it.
        return text.encode("utf-8", "backslashreplace") + b"\n"

    def _begun(self) -> bool:
        return self.path.exists() and self.path.stat().st_size > 0

    def _check_settings(self) -> None:
        try:
            then = _object(self.settings_path.read_bytes())
        except FileNotFoundError:
            raise ConfigError(
                f"{self.named} exists and {self.settings_path.name} does not: this command has not begun it; "
                "choose another file, or remove it."
            ) from None
        except ValueError as error:
            raise ConfigError(f"{self.settings_path}: {error}; remove it and {self.path.name} to begin anew.") from None
        if changed := changes(then, self.settings):
            raise ConfigError(
                f"{self.named} was begun with other settings ({changed}); put them back to go on with it, or "
                f"{self.another}."
            )

    def _check_row(self, line: bytes, number: int, row: Row) -> None:
        try:
            written = _object(line)
        except ValueError as error:
            raise ConfigError(f"{self.named}, row {number}: {error}; remove the file to begin anew.") from None
        lacking = set(self.added) - written.keys()
        kept = {name: value for name, value in written.items() if name not in self.added}
        differing = lacking | {name for name, _ in _texts(kept) ^ _texts(row.columns)}
        if differing:
            raise ConfigError(
                f"{self.named}, row {number}: other {', '.join(sorted(differing))} than in row {row.number} of "
                f"{row.source}; put the input back to go on with it, or {self.another}."
            )


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """From what to what each setting of `now` has changed, in words; "" where none has."""
    changed = [name for name in now if then.get(name) != now[name]]
    return ", ".join(f"{name} {then.get(name)!r} -> {now[name]!r}" for name in changed)


def _object(text: bytes) -> dict[str, Any]:
    """A JSON object. Raises ValueError saying what the text is instead."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"no JSON object ({text[:40].decode('utf-8', 'replace').strip()!r})")
    return found


def _texts(columns: Mapping[str, Any]) -> set[tuple[str, str]]:
    """Fields as JSON, in which 1 is not true and NaN is NaN."""
    return {(name, json.dumps(value, sort_keys=True)) for name, value in columns.items()}
