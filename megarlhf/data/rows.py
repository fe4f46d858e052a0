"""Rows from where they lie: JSON lines, parquet, a hub name or directory, or the built-in task; checked one by one."""

from __future__ import annotations

import json
import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from megarlhf.config import Config
from megarlhf.data.arithmetic import ArithmeticConfig, Split
from megarlhf.data.columns import UNNAMED, Columns
from megarlhf.data.inside import check_inside
from megarlhf.data.reasoning_gym import ReasoningGymConfig, is_task, task_rows
from megarlhf.data.tokenizer import ControlTokens, Message, Template, Tokenizer
from megarlhf.errors import ConfigError, DataError

BUILT_IN = "arithmetic"
_FILE_ENDINGS = frozenset(
    (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt", ".md", ".arrow", ".gz", ".zip", ".zst", ".xz")
)
"""No hub name ends so."""
_NAMED = 5
"""How many row numbers an error lists."""


class DataConfig(Config):
    """Where rows come from and how they become tokens."""

    source: str = ""
    """A .jsonl or .parquet file, a directory or hub name that `datasets` loads, `arithmetic` (the built-in task), or
    for prompts `reasoning_gym:TASK`, problems that the package makes.
    Required, except where the model is a preset or was trained on the built-in task: then empty means that task."""
    subset: str = ""
    """Configuration of a hub data set; empty for its default."""
    split: str = ""
    """Split: `train` or `heldout` of what is generated, or one of the hub data set; empty for `train`, in `eval` for
    `heldout` of what is generated. A file is one split and needs none."""
    columns: dict[str, str] = pydantic.Field(default={})
    """Where the data name a column otherwise, by the name it needs: `columns.prompt=question` takes the prompt from
    question. It is there under both names."""
    template: Template | None = None
    """How a prompt is rendered: `chat` (the tokenizer's template) or `plain` (BOS and the text, for tiny models); null
    for what the model was trained with, or chat where nobody knows."""
    max_tokens: int = pydantic.Field(default=1024, ge=2)
    """Longest row allowed, in tokens: the prompt of prompt sets, prompt and response with EOS of every other kind."""
    control_tokens: ControlTokens = "refuse"
    """What a control token in a text, such as <|eot_id|>, is: an error that names the row (`refuse`), its letters
    (`text`), or what ends turns and responses (`control`), for prompts in which the template is written out."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with longer rows: stop and list them, or drop and count them. Rows are never cut."""
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    """What the built-in task generates."""
    reasoning_gym: ReasoningGymConfig = ReasoningGymConfig()
    """What `reasoning_gym:TASK` generates."""

    @property
    def rendering(self) -> Template:
        """How a prompt is rendered, by default."""
        return self.template or "chat"


@dataclass(frozen=True)
class Row:
    """One row with the words to complain about it: file and 1-based number."""

    source: str
    number: int
    columns: dict[str, Any]
    kind: Columns = UNNAMED

    def fault(self, column: str, problem: str) -> DataError:
        """A DataError that names file, row and column."""
        return DataError(f"bad row: {self.source}, row {self.number}, column {self.kind.said(column)}: {problem}.")

    def _missing(self, column: str, needed: str) -> DataError:
        hint = self.kind.hint(column, self.columns)
        remedy = f"; {hint}" if hint else f", it needs {needed} there"
        return self.fault(column, f"missing; the row has {sorted(self.columns)}{remedy}")

    def text(self, column: str) -> str:
        """The column as text that is not blank.

        Raises:   DataError naming file, row and column; so do the methods below.
        """
        value = self.columns.get(column)
        if value is None:
            raise self._missing(column, "text")
        if not isinstance(value, str):
            raise self.fault(column, f"{_shown(value)} is not text; put it in quotes")
        if not value.strip():
            raise self.fault(column, "empty; write some text or remove the row")
        return self._whole(column, value)

    def number_in(self, column: str, low: float, high: float) -> float:
        """The column as a number in low..high; true and false are 1 and 0."""
        value = self.columns.get(column)
        if value is None:
            raise self._missing(column, "a number")
        if not isinstance(value, (int, float)):
            raise self.fault(column, f"{_shown(value)} is not a number; write one without quotes")
        if not low <= value <= high:
            raise self.fault(column, f"{_shown(value)} is out of range; use {low:g} to {high:g}")
        return float(value)

    def prompt_ids(self, tokenizer: Tokenizer, template: Template) -> list[int]:
        """Ids of the column `prompt`, text or a conversation [{role, content}, ...]."""
        conversation = isinstance(self.columns.get("prompt"), list)
        prompt = self.messages("prompt") if conversation else self.text("prompt")
        return self.encoded("prompt", lambda: tokenizer.encode_prompt(prompt, template))

    def response_ids(self, column: str, tokenizer: Tokenizer) -> list[int]:
        """Ids of a text column with the EOS that ends a response."""
        response = self.text(column)
        return self.encoded(column, lambda: tokenizer.encode_response(response))

    def encoded(self, column: str, encode: Callable[[], list[int]]) -> list[int]:
        """`encode()`, with what the tokenizer has against the text said of this row and column."""
        try:
            return encode()
        except DataError as error:
            raise self.fault(column, str(error).rstrip(".")) from error

    def messages(self, column: str) -> list[Message]:
        """The column as a conversation of at least one turn, each with a role and content."""
        turns = self.columns.get(column)
        if not isinstance(turns, list) or not turns:
            raise self.fault(column, f"{_shown(turns)} is not a conversation; give [{{role, content}}, ...]")
        for turn in turns:
            if not isinstance(turn, dict) or any(not isinstance(turn.get(key), str) for key in ("role", "content")):
                raise self.fault(column, f"turn {_shown(turn)} needs a role and a content, both text")
            self._whole(column, turn["role"] + turn["content"])
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]

    def _whole(self, column: str, text: str) -> str:
        """`text`, unless it has half of a surrogate pair, which JSON can spell and no tokenizer takes."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!r} is half a character, at {error.start + 1}; remove it"
            raise self.fault(column, half) from error
        return text


def load_rows(
    config: DataConfig, generate: Callable[[ArithmeticConfig, Split], list[dict]], kind: Columns = UNNAMED
) -> list[Row]:
    """All rows of `config.source` in order, with the columns of their kind; `generate` makes the built-in task's.

    JSON lines are parsed here, line by line, because the type inference of `datasets` reads a column of dates as
    timestamps and turns "1" beside 2 into numbers, after which no bad row could be named.

    Raises:   DataError if the source is missing, empty or unreadable, or has no column that was named; ConfigError
    for an unknown split, or a column that rows of this kind do not have.
    """
    kind = kind.mapping(config.columns)
    if not config.source:
        raise ConfigError(
            f"source is empty; name a file, directory or hub data set, or {BUILT_IN} (the built-in task)."
        )
    source = Path(config.source)
    if is_generated(config.source):
        if config.split not in ("", "train", "heldout"):
            raise ConfigError(f"split: {config.source} has no {config.split!r}; choose train or heldout.")
        rows: Iterable[Any] = _generated(config, generate, kind)
    elif is_there(source, Path.is_dir) or not (_is_path(config.source) or is_there(source, Path.exists)):
        rows = _datasets(config)
    else:
        _check_file(config.source, config.split)
        rows = _json_lines(source) if source.suffix == ".jsonl" else _datasets(config)
    found = [Row(config.source, number, kind.named(row), kind) for number, row in enumerate(rows, start=1)]
    if not found:
        split = f", split {config.split}" if config.split else ""
        raise DataError(f"data is empty: {config.source}{split}; it needs at least one row.")
    for row in found:
        lacking = kind.lacking(row.columns)
        if lacking is not None:
            raise row.fault(lacking, f"not there; the row has {sorted(row.columns)}, name one of them")
    return found


def is_generated(source: str) -> bool:
    """Whether rows are made here: of the built-in task, or one of reasoning-gym's."""
    return source == BUILT_IN or is_task(source)


def _generated(
    config: DataConfig, generate: Callable[[ArithmeticConfig, Split], list[dict]], kind: Columns
) -> list[dict]:
    split = "heldout" if config.split == "heldout" else "train"
    if config.source == BUILT_IN:
        return generate(config.arithmetic, split)
    if "answer" not in kind.names:
        raise ConfigError(f"{kind.setting}.source={config.source} makes prompts alone; name rows of another source.")
    return task_rows(config.source, config.reasoning_gym, split)


def within_limit(config: DataConfig, rows: Sequence[Row], lengths: Sequence[int]) -> list[int]:
    """Indices of the rows that fit `config.max_tokens`; the others are dropped.

    Raises:   DataError listing the rows that do not, unless `config.overlong` is "drop"; and if none is left.
    """
    fitting = [index for index, length in enumerate(lengths) if length <= config.max_tokens]
    overlong = [index for index, length in enumerate(lengths) if length > config.max_tokens]
    if overlong and config.overlong == "error":
        listed = ", ".join(f"{rows[index].number} ({lengths[index]})" for index in overlong[:_NAMED])
        more = f" and {len(overlong) - _NAMED} more" if len(overlong) > _NAMED else ""
        raise DataError(
            f"rows longer than max_tokens={config.max_tokens}: {len(overlong)} of {len(rows)} in {config.source}, "
            f"row (tokens) {listed}{more}; raise max_tokens or set overlong=drop."
        )
    if not fitting:
        raise DataError(
            f"no row is left: all {len(rows)} of {config.source} are longer than max_tokens={config.max_tokens}, the "
            f"shortest has {min(lengths)}; raise max_tokens."
        )
    return fitting


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token rows as one tensor, as wide as the longest, and their lengths.

    Shapes:   returns (tokens [len(rows), longest], lengths [len(rows)]) int64.
    """
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tokens = torch.full((len(rows), int(lengths.max())), pad_id, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens, lengths


def is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    """`kind(path)`, and False for what cannot be looked at: a name that no file system takes, a forbidden directory."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


def _check_file(source: str, split: str) -> None:
    path = Path(source)
    if not is_there(path, Path.exists):
        local = len(path.parts) == 2 and is_there(path.parent, Path.is_dir)
        hint = f", or start elsewhere if it is the hub's: a directory {path.parent} is here" if local else ""
        raise DataError(f"data file does not exist: {source}; check the path{hint}.")
    if path.suffix not in (".jsonl", ".parquet") or not path.is_file():
        raise DataError(
            f"data file has another form: {source}; give JSON lines (.jsonl: one object a line, where a .json list has "
            "them in brackets) or .parquet."
        )
    if split not in ("", "train"):
        raise ConfigError(f"split: {split!r} of {source}; a file is one split, leave it empty.")


def _json_lines(path: Path) -> Iterator[dict]:
    try:
        lines = path.open("rb")
    except OSError as error:
        raise DataError(f"data file cannot be read: {path}: {error.strerror}; check it.") from error
    with lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield _json_object(line.removeprefix(BOM_UTF8) if number == 1 else line)
            except _BadLineError as error:
                raise DataError(f"bad row: {path}, row {number}{error}") from error.__cause__


class _BadLineError(Exception):
    """What to say after file and row."""


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode().rstrip(), object_pairs_hook=_columns)
    except json.JSONDecodeError as error:
        where = f", character {error.pos + 1}: not JSON ({error.msg}); every line must be one object."
        raise _BadLineError(where) from error
    except UnicodeDecodeError as error:
        raise _BadLineError(f": not UTF-8 ({error.reason} at byte {error.start + 1}); re-encode it.") from error
    except RecursionError as error:
        raise _BadLineError(": lists or objects nested too deep; every line must be one object of columns.") from error
    except ValueError as error:
        raise _BadLineError(f": {error}; mend or remove the row.") from error
    if not isinstance(row, dict):
        raise _BadLineError(f": {_shown(row)}; every line must be one JSON object.")
    return row


def _columns(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    columns = dict(pairs)
    if len(columns) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return columns


def _datasets(config: DataConfig) -> Iterable[Any]:
    """Rows through `datasets`, which since version 4 runs no code from the hub."""
    import datasets

    directory = Path(config.source) if is_there(Path(config.source), Path.is_dir) else None
    split = config.split or "train"
    try:
        if config.source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=config.source, split="train")
        if directory is not None:
            check_inside(directory)
        return datasets.load_dataset(config.source, config.subset or None, split=split)
    except DataError:
        raise
    except Exception as error:  # hub, cache and format errors share no base class
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise DataError(
            f"data cannot be read: {config.source}, split {split}: {reason}; give a .jsonl or .parquet file, or "
            "a directory or hub name that `datasets` can load."
        ) from error


def _is_path(source: str) -> bool:
    """Whether `source` cannot be a hub name (name or owner/name): asking the hub for it would only waste retries."""
    owner, slash, _ = source.partition("/")
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source, re.ASCII) is not None and len(source) <= 96
    is_local = bool(slash) and is_there(Path(owner), Path.is_dir)
    return not is_name or is_local or Path(source).suffix.lower() in _FILE_ENDINGS


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
