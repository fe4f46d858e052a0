"""What a start says of its data, on rank 0 and before the first step: which rows, how many, and how they are read.

Lines, not a table: a name that is too long for a column could not be searched for in a log.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megarlhf.data.rows import DataConfig, Origin, SourceConfig
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.models.spec import PRESETS
from megarlhf.observe.terminal import Terminal
from megarlhf.parallel.mesh import Mesh
from megarlhf.runtime.checks import Model

HEAD, TAIL = 400, 200
"""Characters shown of a long text: where it begins, and how it ends."""
LISTED = 5
"""Dropped rows that are shown."""


class TokenRows(Protocol):
    """Tokenised rows of any kind."""

    @property
    def dropped(self) -> int:
        """Rows left out because they were over the limit."""
        ...

    @property
    def count(self) -> int:
        """Tokens of all rows."""
        ...

    @property
    def origin(self) -> Origin:
        """How they were read."""
        ...

    @property
    def example(self) -> Mapping[str, Sequence[int]]:
        """The parts of the first row, by name."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class DataSet:
    """The rows of one setting."""

    name: str
    """The setting."""
    asked: DataConfig
    """Its value."""
    data: DataConfig
    """The same with nothing left open."""
    rows: TokenRows

    def __str__(self) -> str:
        """In one line, without an example."""
        source = _said(self.data) if not self.data.mix else ", ".join(map(_said, self.data.mix.values()))
        return (
            f"{self.name}: {source}, {len(self.rows):,} rows, "
            f"{self.rows.dropped:,} dropped, {self.rows.count:,} tokens, template {self.data.rendering}"
        )


def _said(data: SourceConfig) -> str:
    subset = f"{data.subset}, " if data.subset else ""
    return f"{data.source} ({subset}{data.split or 'train'})"


def say(lines: Iterable[str], mesh: Mesh) -> None:
    """Print lines on rank 0. They may hold what files and models say: nothing in them is markup, or a control code."""
    console = Terminal(stderr=True, quiet=not mesh.is_main, soft_wrap=True)
    for line in lines:
        console.print(visible(line))


def say_data(sets: Iterable[DataSet], tokenizer: Tokenizer, mesh: Mesh, *, epochs: Mapping[str, float]) -> None:
    """Say of each set its numbers, and its first row as the model reads it. epochs: passes over it, by name."""
    for each in sets:
        passes = f", epochs {epochs[each.name]:.3g}" if each.name in epochs else ""
        say([f"{each}{passes}", *_how(each)], mesh)
        shown = each.rows.example.items()
        say([f"{each.name}, first row, {part}: {_cut(tokenizer.decode_all(ids))}" for part, ids in shown], mesh)


def _how(each: DataSet) -> list[str]:
    """The form in which rows were found, and those that were left out because they are bad."""
    origin, bad = each.rows.origin, each.rows.origin.bad
    lines = [f"{each.name}, read as: {origin.shape}"] if origin.shape else []
    lines += [
        f"{each.name}, {part}: {100 * share.entries / len(each.rows):.1f} % of an epoch, {share.entries:,} rows, which "
        f"are {share.rows:,}, each {share.entries / share.rows:.3g} times"
        for part, share in origin.mix.items()
    ]
    if bad:
        lines += [f"{each.name}: {len(bad):,} bad rows dropped ({each.name}.bad_rows=drop), such as", *bad[:LISTED]]
    return lines


def remarks(sets: Iterable[DataSet], tokenizer: Tokenizer, model: Model, readers: Iterable[Model] = ()) -> list[str]:
    """What was chosen where a setting left it open, and what does not go together; readers: other models of the run."""
    said = []
    for each in sets:
        if not each.asked.named:
            why = "is a preset" if model.init in PRESETS else "was trained on it"
            said.append(f"{each.name}.source is empty: the built-in task is taken, since {model} {why}")
        for reader in (model, *readers):
            own, used = reader.description.template, each.data.rendering
            if own and own != used:
                said.append(f"{each.name}.template is {used}, but {reader} was trained with {own}")
    said += told_day(tokenizer)
    said += [
        f"{reader} has no tokenizer of its own: that it reads ids as {model} writes them cannot be checked"
        for reader in readers
        if reader.tokenizer_directory is None and reader.init not in PRESETS
    ]
    return said


def told_day(tokenizer: Tokenizer | None) -> list[str]:
    """The day that a chat template is told, where it renders one; nothing without a tokenizer."""
    if tokenizer is None or tokenizer.date is None:
        return []
    return [f"the chat template is told that it is {tokenizer.date}; date=YYYY-MM-DD tells it another day"]


def ends(tokenizer: Tokenizer) -> str:
    """Which tokens end a response, in words."""
    tokens = (f"{tokenizer.decode_all([number])} ({number})" for number in tokenizer.eos_ids)
    return f"a response ends at {', '.join(tokens)}"


def visible(text: str) -> str:
    """`text` in one line, with what cannot be seen, or would move the cursor, as Python writes it in quotes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _cut(text: str) -> str:
    return text if len(text) <= HEAD + TAIL else f"{text[:HEAD]} ... {text[-TAIL:]}"
