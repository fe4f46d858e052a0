"""`megarlhf report`: make the page of a run again, also of one that is still running or was killed; compare runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megarlhf.config import Config
from megarlhf.errors import ConfigError, DataError, printable
from megarlhf.observe import run_files
from megarlhf.observe.charts import SERIES
from megarlhf.observe.comparison import check_replaceable, names_of, page_of, write_comparison
from megarlhf.observe.report import write_page
from megarlhf.runtime.outputs import check_directory, check_parent


class ReportConfig(Config):
    """Which runs to report."""

    run_dir: Path | tuple[Path, ...]
    """Directory of a run or of a demo: holds metrics.jsonl, or report.json. Several runs are compared on one page:
    megarlhf report A B."""
    output: Path | None = None
    """File for the page of several runs; null: in the working directory, A_vs_B.html. Another page of several runs is
    replaced, any other file is not."""


def main(cfg: ReportConfig, argv: Sequence[str]) -> int:  # noqa: ARG001 (every command has this signature)
    """Write the page, of one run into its directory, and print its path."""
    runs = cfg.run_dir if isinstance(cfg.run_dir, tuple) else (cfg.run_dir,)
    page = _of_one(runs[0], cfg.output) if len(runs) == 1 else _of_several(runs, cfg.output)
    sys.stdout.write(printable(f"{page}\n"))
    return 0


def _of_one(run_dir: Path, output: Path | None) -> Path:
    if output is not None:
        raise ConfigError(f"output={output}: the page of one run goes into its directory; leave output out.")
    _check(run_dir, (run_files.REPORT_DATA, run_files.METRICS))
    check_directory(run_dir, "run_dir")
    return write_page(run_dir)


def _of_several(runs: tuple[Path, ...], output: Path | None) -> Path:
    if not 2 <= len(runs) <= SERIES:
        raise ConfigError(f"run_dir: {len(runs)} runs; name one, or 2 to {SERIES} to compare.")
    for run_dir in runs:
        _check(run_dir, (run_files.METRICS,))
    names_of(runs)
    page = page_of(runs) if output is None else output
    check_replaceable(page)
    check_parent(page)
    return write_comparison(runs, page)


def _check(run_dir: Path, traces: Sequence[str]) -> None:
    """Raise DataError where none of the files is there of which a page can be made."""
    if any((run_dir / trace).exists() for trace in traces):
        return
    runs = sorted(str(path.parent) for path in run_dir.glob(f"*/{run_files.METRICS}"))
    remedy = f"did you mean {' or '.join(runs)}?" if runs else "give the directory of a run."
    raise DataError(f"run_dir {run_dir}: no {run_files.METRICS} there; {remedy}")
