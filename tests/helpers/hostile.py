"""Checkpoints that would run code if they were unpickled, with checksums that fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from megarlhf.checkpoint.checksums import CHECKSUMS, write_checksums


class Hostile:
    """Unpickled, it makes the file `mark` and gives what `true` is a pickle of, so that nobody notices."""

    def __init__(self, mark: Path, true: bytes) -> None:
        self.mark, self.true = mark, true

    def __reduce__(self) -> tuple[Any, ...]:
        code = f"[__import__('pathlib').Path({str(self.mark)!r}).touch(), __import__('pickle').loads({self.true!r})][1]"
        return eval, (code,)


def poison(file: Path, mark: Path) -> None:
    """Make the pickle `file` hostile."""
    file.write_bytes(pickle.dumps(Hostile(mark, file.read_bytes())))


def sum_again(directory: Path) -> None:
    """Make the checksums of `directory`, and of what has its own below, fit what is there."""
    for file in sorted(directory.rglob(CHECKSUMS), key=lambda path: -len(path.parts)):
        file.unlink()
        write_checksums(file.parent)
