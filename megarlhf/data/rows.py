"""Rows of a source in the columns that their kind needs, checked one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import pydantic
import torch
from torch import Tensor

from megarlhf.config import Config
from megarlhf.data.arithmetic import ArithmeticConfig, Split
from megarlhf.data.columns import UNNAMED, Columns
from megarlhf.data.programs import ProgramsConfig, program_rows
from megarlhf.data.reasoning_gym import ReasoningGymConfig, is_task, task_rows
from megarlhf.data.row import Row
from megarlhf.data.shapes import MisfitError
from megarlhf.data.sources import raw_rows
from megarlhf.data.tokenizer import ControlTokens, Template
from megarlhf.errors import ConfigError, DataError

BUILT_IN = "arithmetic"
PROGRAMS = "programs"
MOST_TIMES = 1000
"""How often an epoch of a mix may have a row."""
_NAMED = 5
"""How many rows an error lists."""
T = TypeVar("T")


class SourceConfig(Config):
    """Where rows come from."""

    source: str = ""
    """Where rows come from: required, unless `mix` names several, or the model is a preset or was trained on the
    built-in task, which empty then means. A file (.jsonl, .json, either as .gz, or .parquet), a directory or hub name
    that `datasets` loads, `arithmetic` (the built-in task), `programs` (built-in programs, for prompts and
    demonstrations), or for prompts `reasoning_gym:TASK`, problems that the package makes. docs/data.md has the forms of
    public data that are read as they are."""
    subset: str = ""
    """Configuration of a hub data set; empty for its default."""
    split: str = ""
    """Split: `train` or `heldout` of what is generated, or one of the hub data set; empty for `train`, in `eval` and
    for held-out data `heldout` of what is generated. A file is one split and needs none."""
    columns: dict[str, str] = pydantic.Field(default={})
    """Where the data name a column otherwise, by the name it needs: `columns.prompt=question` takes the prompt from
    question. It is there under both names."""


class PartConfig(SourceConfig):
    """One of several sources."""

    weight: float = pydantic.Field(default=1.0, gt=0)
    """Its share of the rows of an epoch, beside the weights of the others."""


class DataConfig(SourceConfig):
    """Where rows come from and how they become tokens."""

    mix: dict[str, PartConfig] = pydantic.Field(default={})
    """Several sources in place of one, by names of yours: `mix.chat.source=chat.jsonl mix.chat.weight=0.7`. In an epoch
    each has its share of the rows; no row is left out, so that those of a source with few are there more than once."""
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

    @property
    def named(self) -> str:
        """The sources, for messages."""
        return self.source or " and ".join(part.source for part in self.mix.values())


@dataclass(frozen=True)
class Origin:
    """How rows were read, for a run to say at its start."""

    shape: str = ""
    """Their form; empty for rows that are made here."""
    bad: Sequence[str] = ()
    """What is wrong with each of those that were dropped."""
    mix: Mapping[str, Share] = field(default_factory=dict[str, "Share"])
    """What of each part is in an epoch."""

    def distinct(self, entries: int) -> int:
        """How many rows the entries of an epoch are."""
        return sum(share.rows for share in self.mix.values()) or entries


class Share(NamedTuple):
    """What of a part is in an epoch."""

    rows: int
    """Of it."""
    entries: int
    """Of the epoch: each row at least once."""


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
    """`read` of every row of `config.source`, or of every part, in order, in the columns of their kind; `generate`
    makes the built-in task's. `read` raises DataError for a row that cannot be used.

    Raises:   DataError if a source is missing, empty or unreadable, if a row is bad and `config.bad_rows` says error,
    or if all are; ConfigError for an unknown split, or a column that rows of this kind do not have.
    """
    if not config.mix:
        return _read_source(config, generate, kind, read, f"{kind.setting}.bad_rows=drop" if kind.setting else "")
    for name in ("source", "subset", "split", "columns"):
        if value := dict(config)[name]:
            raise ConfigError(
                f"{kind.setting}.{name}={value} and {kind.setting}.mix: each of the mix has its own {name}; leave one "
                f"of the two out ({kind.setting}.mix={{}} empties a mix)."
            )
    rows: list[Row] = []
    values: list[T] = []
    shapes: list[str] = []
    bad: list[str] = []
    before = 0
    for name, part in config.mix.items():
        chosen = {**dict(part), "mix": {}}
        del chosen["weight"]
        alone, own = config.model_copy(update=chosen), dataclasses.replace(kind, setting=f"{kind.setting}.mix.{name}")
        found = _read_source(alone, generate, own, read, f"{kind.setting}.bad_rows=drop")
        rows += [dataclasses.replace(row, part=name, before=before) for row in found.rows]
        values += found.values
        shapes += [f"{name}: {found.origin.shape}"] if found.origin.shape else []
        bad += found.origin.bad
        before += max(row.number for row in found.rows)
    return Loaded(rows, values, Origin("; ".join(shapes), bad))


def _read_source(
    config: DataConfig,
    generate: Callable[[ArithmeticConfig, Split], list[dict]],
    kind: Columns,
    read: Callable[[Row], T],
    drop: str,
) -> Loaded[T]:
    """Of one source. drop: the setting that drops bad rows; "" where there is none."""
    kind = kind.mapping(config.columns)
    if not config.source:
        raise ConfigError(
            f"{kind.setting}{'.' if kind.setting else ''}source is empty; name a file, directory or hub data set, or "
            f"{BUILT_IN} (the built-in task)."
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
            ready = [(row, read(row)) for row in _rows(config.source, total, raw, kind)]
        except DataError as error:
            bad.append(str(error))
            if config.bad_rows == "error" and len(bad) == _NAMED:
                break
        else:
            rows += [row for row, _ in ready]
            values += [value for _, value in ready]
    if not total:
        split = f", split {config.split}" if config.split else ""
        raise DataError(f"data is empty: {config.source}{split}; it needs at least one row.")
    if bad and config.bad_rows == "error":
        raise DataError(_said_of(bad, drop if rows else ""))
    if not rows:
        raise DataError(f"no row is left: all {total} of {config.source} are bad, the first so: {bad[0]}")
    return Loaded(rows, values, Origin(kind.shape.said if kind.shape else "", bad))


def load_rows(
    config: DataConfig, generate: Callable[[ArithmeticConfig, Split], list[dict]], kind: Columns = UNNAMED
) -> Sequence[Row]:
    """The rows alone, as `read_rows` has them."""
    return read_rows(config, generate, kind, lambda row: row).rows


def _rows(source: str, number: int, raw: dict[str, Any], kind: Columns) -> list[Row]:
    """The rows that one of the data is, all of its number: one, unless its form holds several."""
    lacking = kind.lacking(raw)
    try:
        named = kind.named(raw)
        if lacking is not None:
            row = Row(source, number, named, kind)
            raise row.fault(lacking, f"not there; the row has {sorted(raw)}, name one of them")
        return [Row(source, number, columns, kind) for columns in kind.several(named)]
    except MisfitError as error:
        raise Row(source, number, raw).fault(error.column, error.problem) from error


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


@dataclass(frozen=True)
class Kept:
    """Which rows an epoch has."""

    indices: Sequence[int]
    """Of them, in order; in a mix some more than once."""
    dropped: int
    """Rows over the limit."""
    origin: Origin


def within_limit(config: DataConfig, loaded: Loaded[Any], lengths: Sequence[int]) -> Kept:
    """The rows that fit `config.max_tokens`, in a mix as often as their weights want them; the others are dropped.

    lengths: of each row, in tokens.
    Raises:   DataError listing the rows that do not, unless `config.overlong` is "drop"; and if none is left, also of
              one part.
    """
    rows = loaded.rows
    fitting = [index for index, length in enumerate(lengths) if length <= config.max_tokens]
    overlong = [index for index, length in enumerate(lengths) if length > config.max_tokens]
    if overlong and config.overlong == "error":
        listed = ", ".join(
            f"{rows[index].part} {rows[index].number} ({lengths[index]})".lstrip() for index in overlong[:_NAMED]
        )
        more = f" and {len(overlong) - _NAMED} more" if len(overlong) > _NAMED else ""
        raise DataError(
            f"rows longer than max_tokens={config.max_tokens}: {len(overlong)} of {len(rows)} in {config.named}, "
            f"row (tokens) {listed}{more}; raise max_tokens or set overlong=drop."
        )
    parts = {name: [index for index in fitting if rows[index].part == name] for name in config.mix or ("",)}
    for name, left in parts.items():
        if not left:
            own = [length for row, length in zip(rows, lengths, strict=True) if row.part == name]
            raise DataError(
                f"no row is left: all {len(own)} of {config.mix[name].source if name else config.source} are longer "
                f"than max_tokens={config.max_tokens}, the shortest has {min(own)}; raise max_tokens."
            )
    if not config.mix:
        return Kept(fitting, len(overlong), loaded.origin)
    entries = shares({name: len(left) for name, left in parts.items()}, {n: p.weight for n, p in config.mix.items()})
    for name, left in parts.items():
        if entries[name] > MOST_TIMES * len(left):
            raise DataError(
                f"mix.{name} has {len(left):,} rows, and by the weights they would be {entries[name]:,} of an epoch; "
                f"none may be there more than {MOST_TIMES:,} times: leave out what weighs so little, or weigh it more."
            )
    indices = [left[at % len(left)] for name, left in parts.items() for at in range(entries[name])]
    mix = {name: Share(len(left), entries[name]) for name, left in parts.items()}
    return Kept(indices, len(overlong), dataclasses.replace(loaded.origin, mix=mix))


def shares(rows: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """How many entries each part has in the shortest epoch that leaves no row out and has the parts by their weights,
    up to a rounding of each."""
    longest = max(rows[name] / weights[name] for name in rows)
    return {name: max(rows[name], round(weights[name] * longest)) for name in rows}


class TokenSet:
    """Rows that are a sequence of tokens each."""

    tokens: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.tokens))

    @property
    def count(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.tokens))


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token rows as one tensor, as wide as the longest, and their lengths.

    Shapes:   returns (tokens [len(rows), longest], lengths [len(rows)]) int64.
    """
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    tokens = torch.full((len(rows), int(lengths.max())), pad_id, dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return tokens, lengths
