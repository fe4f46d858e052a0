"""Errors a user can act on. Every message reads `<what>: <names and values>; <remedy>`."""

from __future__ import annotations

import os
import re
import signal
import sys

DONE = 0
FAILED = 1
"""Exit code: the run failed."""
BAD_INPUT = 2
"""Exit code: the input must be changed."""
STOPPED = 75
"""Exit code: the same command goes on. EX_TEMPFAIL of sysexits.h, on which a batch script can requeue its job."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit code: the user stopped it."""


class MegarlhfError(Exception):
    """Base of all errors that name their own remedy; the command line prints the message alone."""

    exit_code = BAD_INPUT
    """What the command line returns."""


class ConfigError(MegarlhfError):
    """A setting is unknown, mistyped, missing or contradicts another."""


class LayoutError(MegarlhfError):
    """The parallel layout does not fit the ranks, the model or the batch."""


class DataError(MegarlhfError):
    """A data file or a row of it cannot be used; the message gives file, row number and column."""


class CheckpointError(MegarlhfError):
    """A model or checkpoint directory is missing, partial or of another shape."""


class TrainingError(MegarlhfError):
    """A run had to stop, for example after too many non-finite gradients; the message says where the evidence is."""

    exit_code = FAILED


class JudgeError(TrainingError):
    """A judge does not say what responses are worth, before anything was learnt from them; the message says which."""


class JudgeSilentError(JudgeError):
    """It may do so later: a service does not answer."""

    exit_code = STOPPED


class OutputError(MegarlhfError):
    """A file could not be written: the disk is full, read-only or gone; the message says which, and what is left."""

    exit_code = FAILED


class RunFinished(MegarlhfError):
    """There is nothing left to do: the run was finished before; the message says where its model is."""

    exit_code = DONE


class RunStopped(MegarlhfError):
    """A run was asked to stop, and loses nothing: its state is saved, or it had not begun; the same command goes on."""

    exit_code = STOPPED


def complain(text: str) -> None:
    """Print why this process ends to standard error; where torchrun started it, also who says what comes after."""
    after = "what follows is torchrun's own report\n" if "TORCHELASTIC_RUN_ID" in os.environ else ""
    sys.stderr.write(printable(f"{text}\n{after}"))
    sys.stderr.flush()


_NOT_PRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and line feed, DEL, C1
    "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # turn the direction, or are not seen
    "\ud800-\udfff]"  # half characters, which no stream takes
)


def printable(text: str) -> str:
    """`text` for a terminal, where it may come from anywhere: what would do something there is shown as its escape."""
    return _NOT_PRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
