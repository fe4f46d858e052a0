"""Rows from where they lie: JSON lines, parquet, a hub name or directory, or the built-in task; checked one by one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from torch import Tensor

from megarlhf.config import Config
from megarlhf.data.arithmetic import ArithmeticConfig, Split
from megarlhf.data.tokenizer import Message, Template, Tokenizer
from megarlhf.errors import ConfigError, DataError

BUILT_IN = "arithmetic"
_NAMED = 5
"""How many row numbers an error lists."""


class DataConfig(Config):
    """Where rows come from and how they become tokens."""

    source: str = BUILT_IN
    """`arithmetic` (the built-in task), a .jsonl or .parquet file, or a directory or hub name that `datasets` loads."""
    subset: str = ""
    """Configuration of a hub data set; empty for its default."""
    split: str = "train"
    """Split: `train` or `heldout` of the built-in task, or a split of the hub data set; files have `train` alone."""
    template: Template = "chat"
    """How a prompt is rendered: `chat` (the tokenizer's template) or `plain` (BOS and the text, for tiny models)."""
    max_tokens: int = pydantic.Field(default=1024, ge=2)
    """Longest row allowed, in tokens: the prompt of prompt sets, prompt and response with EOS of every other kind."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with longer rows: stop and list them, or drop and count them. Rows are never cut."""
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    """What the built-in task generates."""


@dataclass(frozen=True)
class Row:
    """One row with the words to complain about it: file and 1-based number."""

    source: str
    number: int
    columns: dict[str, Any]

    def fault(self, column: str, problem: str) -> DataError:
        """A DataError that names file, row and column."""
        return DataError(f"bad row: {self.source}, row {self.number}, column {column!r}: {problem}.")

    def text(self, column: str) -> str:
        """The column as text that is not blank.

        Raises:   DataError naming file, row and column; so do the methods below.
        """
        value = self.columns.get(column)
        if value is None:
            raise self.fault(column, f"missing; the row has {sorted(self.columns)}, it needs text there")
        if not isinstance(value, str):
            raise self.fault(column, f"{_shown(value)} is not text; put it in quotes")
        if not value.strip():
            raise self.fault(column, "empty; write some text or remove the row")
        return value

    def number_in(self, column: str, low: float, high: float) -> float:
        """The column as a number in low..high; true and false are 1 and 0."""
        value = self.columns.get(column)
        if value is None:
            raise self.fault(column, f"missing; the row has {sorted(self.columns)}, it needs a number there")
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
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def load_rows(config: DataConfig, generate: Callable[[ArithmeticConfig, Split], list[dict]]) -> list[Row]:
    """All rows of `config.source` in order; `generate` makes those of the built-in task.

    JSON lines are parsed here, line by line, because the type inference of `datasets` reads a column of dates as
    timestamps and turns "1" beside 2 into numbers, after which no bad row could be named.

    Raises:   DataError if the source is missing, empty or unreadable; ConfigError for an unknown split.
    """
    if config.source == BUILT_IN:
        if config.split not in ("train", "heldout"):
            raise ConfigError(f"split: the built-in task has no {config.split!r}; choose train or heldout.")
        rows: Iterable[Any] = generate(config.arithmetic, config.split)
    elif config.source.endswith((".jsonl", ".parquet")):
        if not Path(config.source).is_file():
            raise DataError(f"data file does not exist: {config.source}; check the path.")
        if config.split != "train":
            raise ConfigError(f"split: {config.split!r} of {config.source}; a file is one split, leave it at train.")
        rows = _json_lines(Path(config.source)) if config.source.endswith(".jsonl") else _datasets(config)
    else:
        rows = _datasets(config)
    found = [Row(config.source, number, columns) for number, columns in enumerate(rows, start=1)]
    if not found:
        raise DataError(f"data is empty: {config.source}, split {config.split}; it needs at least one row.")
    return found


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


def _json_lines(path: Path) -> Iterator[dict]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.rstrip())
            except json.JSONDecodeError as error:
                raise DataError(
                    f"bad row: {path}, row {number}, character {error.pos + 1}: not JSON ({error.msg}); every line "
                    "must be one object."
                ) from error
            except UnicodeDecodeError as error:
                raise DataError(f"bad row: {path}, row {number}: not UTF-8 ({error.reason}); re-encode it.") from error
            if not isinstance(row, dict):
                raise DataError(f"bad row: {path}, row {number}: {_shown(row)}; every line must be one JSON object.")
            yield row


def _datasets(config: DataConfig) -> Iterable[Any]:
    """Rows through `datasets`, which since version 4 runs no code from the hub."""
    import datasets

    if _is_path(config.source) and not Path(config.source).exists():
        raise DataError(f"data does not exist: {config.source}; check the path.")
    try:
        if config.source.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=config.source, split="train")
        return datasets.load_dataset(config.source, config.subset or None, split=config.split)
    except Exception as error:  # hub, cache and format errors share no base class
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise DataError(
            f"data cannot be read: {config.source}, split {config.split}: {reason}; give a .jsonl or .parquet file, or "
            "a directory or hub name that `datasets` can load."
        ) from error


def _is_path(source: str) -> bool:
    """Whether `source` cannot be a hub name (name or owner/name): asking the hub for it would only waste retries."""
    return source.startswith(("/", ".", "~")) or source.count("/") > 1


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
