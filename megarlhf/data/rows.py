"""Rows of a source in the columns that their kind needs, checked one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import pydantic
import torch
from torch import Tensor

from megarlhf.config import Config
from megarlhf.data.arithmetic import ArithmeticConfig, Split
from megarlhf.data.columns import UNNAMED, Columns
from megarlhf.data.dialogue import Dialogue, Supervise, encode_dialogue
from megarlhf.data.programs import ProgramsConfig, program_rows
from megarlhf.data.reasoning_gym import ReasoningGymConfig, is_task, task_rows
from megarlhf.data.shapes import MisfitError
from megarlhf.data.sources import raw_rows, shown
from megarlhf.data.tokenizer import ControlTokens, Message, Template, Tokenizer
from megarlhf.errors import ConfigError, DataError

BUILT_IN = "arithmetic"
PROGRAMS = "programs"
_NAMED = 5
"""How many rows an error lists."""
_CALLS = ("tool_calls", "function_call")
"""Keys of a turn that calls tools. Templates differ in whether, and how, they write them."""
T = TypeVar("T")


class DataConfig(Config):
    """Where rows come from and how they become tokens."""

    source: str = ""
    """A file (.jsonl, .json, either as .gz, or .parquet), a directory or hub name that `datasets` loads, `arithmetic`
    (the built-in task), `programs` (built-in programs, for prompts and demonstrations), or for prompts
    `reasoning_gym:TASK`, problems that the package makes. docs/data.md has the forms of public data that are read as
    they are.
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
    bad_rows: Literal["error", "drop"] = "error"
    """What to do with rows that cannot be used (no JSON, a column missing or of another kind, two responses of a pair
    alike): stop and list the first of them, or drop, count and list them."""
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    """What the built-in task generates."""
    programs: ProgramsConfig = ProgramsConfig()
    """What `programs` generates."""
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
            raise self.fault(column, f"{shown(value)} is not text; put it in quotes")
        if not value.strip():
            raise self.fault(column, "empty; write some text or remove the row")
        return self._whole(column, value)

    def number_in(self, column: str, low: float, high: float, remedy: str = "") -> float:
        """The column as a number in low..high; true and false are 1 and 0. remedy: what helps besides."""
        value = self.columns.get(column)
        if value is None:
            raise self._missing(column, "a number")
        if not isinstance(value, (int, float)):
            raise self.fault(column, f"{shown(value)} is not a number; write one without quotes")
        if not low <= value <= high:
            raise self.fault(column, f"{shown(value)} is out of range; use {low:g} to {high:g}{remedy}")
        return float(value)

    def prompt_ids(self, tokenizer: Tokenizer, template: Template) -> list[int]:
        """Ids of the column `prompt`, text or a conversation [{role, content}, ...]."""
        prompt = self._prompt()
        return self.encoded("prompt", lambda: tokenizer.encode_prompt(prompt, template))

    def answered_ids(self, column: str, tokenizer: Tokenizer, template: Template) -> tuple[list[int], list[int]]:
        """Ids of the column `prompt`, and of a response to it with the EOS that ends it.

        A response that is text is what a sampler would have written; one that is a turn, [{role, content}], is what
        the chat template makes of the whole conversation.
        """
        if not isinstance(self.columns.get(column), list):
            response = self.text(column)
            ids = self.encoded(column, lambda: tokenizer.encode_response(response))
            return self.prompt_ids(tokenizer, template), ids
        prompt, turns = self._prompt(), self.messages(column)
        before: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if len(turns) != 1:
            raise self.fault(column, f"{len(turns)} turns; a response is one, of the assistant")
        ((start, _),), ids = self.dialogue(column, [*before, *turns], tokenizer, template)
        return ids[:start], ids[start:]

    def dialogue(
        self,
        column: str,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        template: Template,
        supervise: Supervise = "last",
    ) -> Dialogue:
        """Ids of a conversation that ends with the assistant, and where the turns that it is taught are."""
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise self.fault(column, "the conversation must end with the assistant, after at least one other turn")
        if not messages[-1]["content"].strip():
            raise self.fault(column, "the last turn is empty; write some text or remove the row")
        return self.encoded(column, lambda: encode_dialogue(tokenizer, messages, template, supervise))

    def encoded(self, column: str, encode: Callable[[], T]) -> T:
        """`encode()`, with what the tokenizer has against the text said of this row and column."""
        try:
            return encode()
        except DataError as error:
            raise self.fault(column, str(error).rstrip(".")) from error

    def messages(self, column: str) -> list[Message]:
        """The column as a conversation of at least one turn, each with a role and content."""
        turns = self.columns.get(column)
        if not isinstance(turns, list) or not turns:
            raise self.fault(column, f"{shown(turns)} is not a conversation; give [{{role, content}}, ...]")
        for turn in turns:
            if isinstance(turn, dict) and any(turn.get(key) for key in _CALLS):
                raise self.fault(column, f"turn {shown(turn)} calls a tool, and calls are not rendered; remove the row")
            if not isinstance(turn, dict) or any(not isinstance(turn.get(key), str) for key in ("role", "content")):
                raise self.fault(column, f"turn {shown(turn)} needs a role and a content, both text")
            self._whole(column, turn["role"] + turn["content"])
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]

    def _prompt(self) -> str | list[Message]:
        return self.messages("prompt") if isinstance(self.columns.get("prompt"), list) else self.text("prompt")

    def _whole(self, column: str, text: str) -> str:
        """`text`, unless it has half of a surrogate pair, which JSON can spell and no tokenizer takes."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{text[error.start]!r} is half a character, at {error.start + 1}; remove it"
            raise self.fault(column, half) from error
        return text


@dataclass(frozen=True)
class Origin:
    """How rows were read, for a run to say at its start."""

    shape: str = ""
    """Their form; empty for rows that are made here."""
    bad: Sequence[str] = ()
    """What is wrong with each of those that were dropped."""


HERE = Origin()
"""Of rows that are made here."""


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """The rows of a source that can be used, and what was made of each."""

    rows: Sequence[Row]
    values: Sequence[T]
    origin: Origin


def read_rows(
    config: DataConfig,
    generate: Callable[[ArithmeticConfig, Split], list[dict]],
    kind: Columns,
    read: Callable[[Row], T],
) -> Loaded[T]:
    """`read` of every row of `config.source` in order, in the columns of their kind; `generate` makes the built-in
    task's. `read` raises DataError for a row that cannot be used.

    Raises:   DataError if the source is missing, empty or unreadable, if a row is bad and `config.bad_rows` says
    error, or if all are; ConfigError for an unknown split, or a column that rows of this kind do not have.
    """
    kind = kind.mapping(config.columns)
    if not config.source:
        raise ConfigError(
            f"source is empty; name a file, directory or hub data set, or {BUILT_IN} (the built-in task)."
        )
    if is_generated(config.source):
        found: Iterable[dict[str, Any] | DataError] = _generated(config, generate, kind)
    else:
        found = raw_rows(config.source, config.subset, config.split)
    rows: list[Row] = []
    values: list[T] = []
    bad: list[str] = []
    total, shaped = 0, is_generated(config.source)
    for total, raw in enumerate(found, start=1):
        try:
            if isinstance(raw, DataError):
                raise raw
            if not shaped:
                kind, shaped = kind.shaped(raw, config.source), True
            row = _row(config.source, total, raw, kind)
            value = read(row)
        except DataError as error:
            bad.append(str(error))
            if config.bad_rows == "error" and len(bad) == _NAMED:
                break
        else:
            rows.append(row)
            values.append(value)
    if not total:
        split = f", split {config.split}" if config.split else ""
        raise DataError(f"data is empty: {config.source}{split}; it needs at least one row.")
    if bad and config.bad_rows == "error":
        raise DataError(_said_of(bad, f"{kind.setting}.bad_rows=drop" if rows and kind.setting else ""))
    if not rows:
        raise DataError(f"no row is left: all {total} of {config.source} are bad, the first so: {bad[0]}")
    return Loaded(rows, values, Origin(kind.shape.said if kind.shape else "", bad))


def load_rows(
    config: DataConfig, generate: Callable[[ArithmeticConfig, Split], list[dict]], kind: Columns = UNNAMED
) -> Sequence[Row]:
    """The rows alone, as `read_rows` has them."""
    return read_rows(config, generate, kind, lambda row: row).rows


def _row(source: str, number: int, raw: dict[str, Any], kind: Columns) -> Row:
    try:
        row = Row(source, number, kind.named(raw), kind)
    except MisfitError as error:
        raise Row(source, number, raw).fault(error.column, error.problem) from error
    lacking = kind.lacking(raw)
    if lacking is not None:
        raise row.fault(lacking, f"not there; the row has {sorted(raw)}, name one of them")
    return row


def _said_of(bad: Sequence[str], drop: str) -> str:
    """The first bad rows in one message, with the setting that drops them, where some are not bad."""
    listed = "\n".join(bad)
    if len(bad) == 1:
        return f"{listed} Or leave such rows out: {drop}." if drop else listed
    more = "\nThere may be more." if len(bad) == _NAMED else ""
    return f"{listed}{more}" + (f" Mend them, or leave such rows out: {drop}." if drop else "")


def is_generated(source: str) -> bool:
    """Whether rows are made here: of a built-in task, or one of reasoning-gym's."""
    return source in (BUILT_IN, PROGRAMS) or is_task(source)


def _generated(
    config: DataConfig, generate: Callable[[ArithmeticConfig, Split], list[dict]], kind: Columns
) -> list[dict]:
    if config.split not in ("", "train", "heldout"):
        raise ConfigError(f"split: {config.source} has no {config.split!r}; choose train or heldout.")
    split = "heldout" if config.split == "heldout" else "train"
    if config.source == BUILT_IN:
        return generate(config.arithmetic, split)
    if config.source == PROGRAMS:
        return program_rows(config.programs, split)
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
