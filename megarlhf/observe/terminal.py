"""The terminal: whatever models, files, rows and exceptions say is shown there as text, and does nothing to it."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from megarlhf.errors import printable


class Terminal(Console):
    """A console for text that may come from anywhere: square brackets are brackets, and controls show as escapes."""

    def __init__(self, **settings: Any) -> None:
        """Take what Console takes, but for markup, emoji and highlighting."""
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """Make text of a string: of the escapes, so that a table makes room for them."""
        return super().render_str(printable(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as Console does. Colours and cursor moves are in a segment's style and control, not in its text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        return printable(super().getMessage())


_formatted = warnings.formatwarning


def _warning(*args: Any, **settings: Any) -> str:
    return printable(_formatted(*args, **settings))


def _bug(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, where))))


def guard() -> None:
    """Show warnings, log records and tracebacks of this process, other libraries' too, as `printable` text.

    However often it is called: a program that runs many commands calls it with each.
    """
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _warning
    sys.excepthook = _bug
