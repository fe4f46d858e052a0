"""`megarlhf report`: make the page of a run again, also of one that is still running or was killed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megarlhf.config import Config
from megarlhf.errors import DataError, printable
from megarlhf.observe import run_files
from megarlhf.observe.report import write_page
from megarlhf.runtime.outputs import check_directory

"""A page can be made where one of these is."""


class ReportConfig(Config):
    """Which run to report."""

    run_dir: Path
    """Directory of a run or of a demo: holds metrics.jsonl, or report.json."""


def main(cfg: ReportConfig, argv: Sequence[str]) -> int:  # noqa: ARG001 (every command has this signature)
    """Write `report.html` into the run directory and print its path."""
    run_dir = cfg.run_dir
    if not _has_a_page(run_dir):
        runs = sorted(str(path.parent) for path in run_dir.glob(f"*/{run_files.METRICS}"))
        remedy = f"did you mean {' or '.join(runs)}?" if runs else "give the directory of a run."
        raise DataError(f"run_dir {run_dir}: no {run_files.METRICS} there; {remedy}")
    check_directory(run_dir, "run_dir")
    sys.stdout.write(printable(f"{write_page(run_dir)}\n"))
    return 0


def _has_a_page(run_dir: Path) -> bool:
    return any((run_dir / trace).exists() for trace in (run_files.REPORT_DATA, run_files.METRICS))
