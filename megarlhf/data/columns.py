"""What a kind of rows is made of, and which columns of the data those are, where it names them otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megarlhf.data.shapes import Shape
from megarlhf.errors import ConfigError

_USUAL = {
    "prompt": ("question", "problem", "instruction", "query", "messages"),
    "answer": ("solution", "label", "target", "final_answer"),
    "response": ("completion", "output"),
    "correct": ("helpfulness", "score", "rating", "label"),
}
"""Names under which public data have a column."""


@dataclass(frozen=True)
class Columns:
    """The columns that a kind of rows can have."""

    setting: str = ""
    """Of the rows, for example `prompts`."""
    names: tuple[str, ...] = ()
    shapes: tuple[Shape, ...] = ()
    """Forms in which rows of this kind are found."""
    mapped: Mapping[str, str] = field(default_factory=dict[str, str])
    """The data's own name of some of them."""
    shape: Shape | None = None
    """The form that these rows have; None where they have none of them, or are made here."""

    def mapping(self, chosen: Mapping[str, str]) -> Columns:
        """These, under names as chosen. Raises ConfigError where one is of another kind of rows."""
        for name in chosen:
            if name not in self.names:
                raise ConfigError(
                    f"{self.setting}.columns.{name}={chosen[name]}: these rows have no such column; they have "
                    f"{', '.join(self.names)}."
                )
        return dataclasses.replace(self, mapped=chosen)

    def shaped(self, row: Mapping[str, Any], source: str) -> Columns:
        """These, in the form of the data's first row: a form of ours where it fits, else any other.

        Raises:   ConfigError where two fit alike.
        """
        named = self.named(row)
        fitting = [shape for shape in self.shapes if shape.fits(named)]
        # A form that all of its columns were named for is what was asked for.
        asked = [shape for shape in fitting if self.mapped and set(shape.columns) <= self.mapped.keys()]
        found = asked or [shape for shape in fitting if shape.own] or fitting
        if len(found) > 1:
            forms = " and as ".join(shape.said for shape in found[:2])
            ways = " or ".join(filter(None, map(self._asking_for, found)))
            remedy = f"set {ways}" if ways else "remove the columns of one of them"
            raise ConfigError(f"{self.setting}.source={source} can be read as {forms}; {remedy}.")
        return dataclasses.replace(self, shape=found[0] if found else None)

    def _asking_for(self, shape: Shape) -> str:
        """The settings that choose a form; "" where it takes more than names."""
        chosen = {name: name for name in shape.columns} if shape.own else shape.took
        if not shape.own and {"messages", "conversations"} & set(shape.columns):
            return ""
        return " ".join(f"{self.setting}.columns.{name}={own}" for name, own in chosen.items())

    def named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the data with its columns of ours: those of its shape, and above them the mapped ones.

        One that is mapped stays under its own name too; one that is not there is under neither.
        Raises:   MisfitError where the row is not of its shape.
        """
        mapped = {name: row[own] for name, own in self.mapped.items() if own in row}
        shaped = {**row, **mapped}
        return {**shaped, **self.shape.of(shaped), **mapped} if self.shape else shaped

    def several(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The rows that a row, named as above, holds: itself, unless its form holds several.

        Raises:   MisfitError where the row is not of its shape.
        """
        return self.shape.several(row) if self.shape and self.shape.several else [row]

    def lacking(self, row: Mapping[str, Any]) -> str | None:
        """The first mapped column that the row does not have."""
        return next((name for name, own in self.mapped.items() if own not in row), None)

    def said(self, name: str) -> str:
        """A column as the data name it, for messages."""
        if name in self.mapped:
            return f"{self.mapped[name]!r} ({self.setting}.columns.{name})"
        return repr(self.shape.took.get(name, name) if self.shape else name)

    def hint(self, name: str, row: Mapping[str, Any]) -> str:
        """The setting that takes a column of a usual name for the one that is missing; "" where there is none."""
        usual = next((own for own in _USUAL.get(name, ()) if row.get(own) is not None), None)
        return f"set {self.setting}.columns.{name}={usual}" if usual and name in self.names else ""


UNNAMED = Columns()
"""Of rows that take no setting."""
