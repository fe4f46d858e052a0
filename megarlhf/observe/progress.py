"""Progress bars with an estimate of the time left; plain lines when the output is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO, TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from megarlhf.observe.terminal import Terminal

T = TypeVar("T")

LINE_EVERY_S = 10.0
"""Seconds between two plain lines: often enough to see life, seldom enough to keep a log readable."""


class Progress:
    """Progress of `total` units of work: a bar on a terminal, a line now and then elsewhere, nothing if not enabled.

    with Progress(25, "PPO") as bar:
        ...
        bar.advance(note="score 0.81")
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a bar on `stream` (standard error by default, so that results on standard output stay clean)."""
        self._total, self._description, self._enabled, self._now = total, description, enabled, now
        self._stream = sys.stderr if stream is None else stream
        self._done, self._said_done, self._note = 0, 0, ""
        self._start = self._said = now()
        console = Terminal(file=self._stream)
        self._bar = _bar(console) if enabled and console.is_terminal else None
        self._task = None if self._bar is None else self._bar.add_task(description, total=total, note="")

    def __enter__(self) -> Progress:
        """Show the bar."""
        self._start = self._said = self._now()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the finished bar on the screen, or say how long it took."""
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and kind is None and self._said > self._start and self._said_done < self._done:
            self._say()

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """Count work done; `note` replaces the short text after the bar unless it is empty."""
        self._done += amount
        self._note = note or self._note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=amount, note=self._note)
        elif self._enabled and self._now() - self._said >= LINE_EVERY_S:
            self._said = self._now()
            self._say()

    def _say(self) -> None:
        self._said_done = self._done
        elapsed = self._now() - self._start
        parts = [f"{self._description}: {self._done}/{self._total} in {clock_time(elapsed)}"]
        if 0 < self._done < self._total:
            parts.append(f"about {clock_time(elapsed / self._done * (self._total - self._done))} left")
        self._stream.write(", ".join([*parts, self._note]).rstrip(", ") + "\n")
        self._stream.flush()


def _bar(console: Terminal) -> RichProgress:
    return RichProgress(
        SpinnerColumn(),
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
        TextColumn("[cyan]{task.fields[note]}"),
        console=console,
    )


def clock_time(seconds: float) -> str:
    """As clocks show it: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
