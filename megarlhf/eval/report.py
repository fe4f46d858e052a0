"""`megarlhf report`: make the page of a run again, also of one that is still running or was killed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megarlhf.config import Config
from megarlhf.errors import DataError
from megarlhf.observe.report import read_report, write_report


class ReportConfig(Config):
    """Which run to report."""

    run_dir: Path
    """Directory of the run: holds metrics.jsonl, and report.json once the run was evaluated."""


def main(cfg: ReportConfig, argv: Sequence[str]) -> int:  # noqa: ARG001 (every command has this signature)
    """Write `report.html` into the run directory and print its path."""
    if not (cfg.run_dir / "metrics.jsonl").exists():
        raise DataError(f"run_dir {cfg.run_dir}: no metrics.jsonl there; give the directory of a run.")
    Console().print(str(write_report(cfg.run_dir, read_report(cfg.run_dir))), soft_wrap=True, highlight=False)
    return 0
