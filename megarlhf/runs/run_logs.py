"""What a run appends to, and what a saved state knows of it: a run that goes on finds its past whole, or says so."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from megarlhf.checkpoint.training_state import Position
from megarlhf.errors import CheckpointError
from megarlhf.observe.files import writing
from megarlhf.observe.run_files import LOGS


def lengths(run_dir: Path) -> dict[str, int]:
    """Bytes in each log now."""
    return {name: _size(run_dir / name) for name in LOGS}


def sums(run_dir: Path) -> dict[str, str]:
    """The SHA-256 of each log now."""
    return {name: _sum(run_dir / name, _size(run_dir / name)) for name in LOGS}


def check_logs(run_dir: Path, position: Position) -> None:
    """Raise CheckpointError where a log that is there has lost or changed what it said when `position` was saved."""
    for name in LOGS:
        log, size = run_dir / name, position.bytes_written.get(name, 0)
        there = _size(log)
        if not log.exists():
            continue
        if there < size or (name in position.sums and _sum(log, size) != position.sums[name]):
            raise CheckpointError(
                f"{log} is not what it was when the state after step {position.step} was saved: {there} bytes, {size} "
                "then, or other ones; put it back, or rename it, and the run goes on without what it said until then."
            )


def cut_logs(run_dir: Path, position: Position | None) -> list[str]:
    """Cut off what was written after `position`, all for none; return in words what is lost with it."""
    lost = []
    for name in LOGS:
        log, there = run_dir / name, _size(run_dir / name)
        wanted = 0 if position is None else position.bytes_written.get(name, 0)
        if there > wanted:
            with writing(log):
                os.truncate(log, wanted)
        if there < wanted:
            lost.append(f"{name} has lost what it said until then")
        elif position is None and there:
            lost.append(f"the {there:,} bytes of {name} are removed")
    return lost


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sum(path: Path, size: int) -> str:
    """Of the first `size` bytes."""
    digest = hashlib.sha256()
    if size:
        with path.open("rb") as file:
            while size and (block := file.read(min(size, 1 << 20))):
                digest.update(block)
                size -= len(block)
    return digest.hexdigest()
