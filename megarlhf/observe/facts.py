"""Tables of what a run says of itself: models, data, and settings that differ from the defaults."""

from __future__ import annotations

from collections.abc import Sequence

from megarlhf.observe.about import About
from megarlhf.observe.page import names, row, table
from megarlhf.observe.starts import Start


def models_table(about: About) -> str:
    """Each model, and where its weights start."""
    rows = (names(each.role, each.init, f"{_size(each.parameters)} parameters, {each.head}") for each in about.models)
    return table(("Role", "Starts from", "What it is"), rows, kind="texts")


def data_table(about: About) -> str:
    """Each set of rows, and how it is read."""
    rows = (
        row(
            each.name,
            f"{each.source} ({each.split})" if each.split else each.source,
            f"{each.rows:,}",
            f"{each.dropped + each.bad:,}",
            f"{each.tokens:,}",
            each.template,
            each.shape or "made here",
            "" if each.epochs is None else f"{each.epochs:.3g}",
        )
        for each in about.data
    )
    return table(("Data", "Source", "Rows", "Left out", "Tokens", "Template", "Read as", "Epochs"), rows)


def settings_table(about: About) -> str:
    """What was chosen, and what would have been."""
    rows = (names(each.name, each.value, each.default) for each in about.settings if each.differs)
    return table(("Setting", "Value", "Default"), rows, kind="texts")


def changes_table(starts: Sequence[Start]) -> str:
    """What was changed when the run was started again."""
    rows = (
        names(f"{start.at}, after step {start.after_step:,}", name, str(then), str(now))
        for start in starts
        for name, (then, now) in start.changes.items()
    )
    return table(("Start", "Setting", "Was", "Is"), rows, kind="texts")


def _size(parameters: int) -> str:
    for size, name in ((1e9, "B"), (1e6, "M")):
        if parameters >= size / 10:
            return f"{parameters / size:.3g} {name}"
    return f"{parameters:,}"
