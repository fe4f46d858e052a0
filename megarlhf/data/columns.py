"""What a kind of rows is made of, and which columns of the data those are, where it names them otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megarlhf.errors import ConfigError

_USUAL = {
    "prompt": ("question", "problem", "instruction", "query", "messages"),
    "answer": ("solution", "label", "target", "final_answer"),
    "response": ("completion", "output"),
}
"""Names under which public data have a column."""


@dataclass(frozen=True)
class Columns:
    """The columns that a kind of rows can have."""

    setting: str = ""
    """Of the rows, for example `prompts`."""
    names: tuple[str, ...] = ()
    mapped: Mapping[str, str] = field(default_factory=dict[str, str])
    """The data's own name of some of them."""

    def mapping(self, chosen: Mapping[str, str]) -> Columns:
        """These, under names as chosen. Raises ConfigError where one is of another kind of rows."""
        for name in chosen:
            if name not in self.names:
                raise ConfigError(
                    f"{self.setting}.columns.{name}={chosen[name]}: these rows have no such column; they have "
                    f"{', '.join(self.names)}."
                )
        return Columns(self.setting, self.names, chosen)

    def named(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the data with its mapped columns under both names; one that is not there is under neither."""
        return {**row, **{name: row[own] for name, own in self.mapped.items() if own in row}}

    def lacking(self, row: Mapping[str, Any]) -> str | None:
        """The first mapped column that the row does not have."""
        return next((name for name, own in self.mapped.items() if own not in row), None)

    def said(self, name: str) -> str:
        """A column as the data name it, for messages."""
        own = self.mapped.get(name)
        return repr(name) if own is None else f"{own!r} ({self.setting}.columns.{name})"

    def hint(self, name: str, row: Mapping[str, Any]) -> str:
        """The setting that takes a column of a usual name for the one that is missing; "" where there is none."""
        usual = next((own for own in _USUAL.get(name, ()) if row.get(own) is not None), None)
        return f"set {self.setting}.columns.{name}={usual}" if usual and name in self.names else ""


UNNAMED = Columns()
"""Of rows that take no setting."""
