"""The last words of a training run: its page, where the model is, what it came to, and what one may do next."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megarlhf.errors import DataError, OutputError, printable
from megarlhf.observe.progress import clock_time
from megarlhf.observe.run_files import MODEL
from megarlhf.observe.writers import read_metrics
from megarlhf.parallel.mesh import Mesh


def conclude(run_dir: Path, seconds: float, numbers: Sequence[str], following: Sequence[str], mesh: Mesh) -> None:
    """Write the run's page and say, on rank 0, what it did, where the model is, and the commands `following`.

    seconds: that this start took. numbers: what it came to, in words.
    """
    if not mesh.is_main:
        return
    # Here, since its charts take a tenth of the time that a rank's start would take with them.
    from megarlhf.observe.report import write_page

    try:
        page = f"the page is {write_page(run_dir)}"
    except (DataError, OutputError) as error:  # the model is there: the run has not failed
        page = f"no page was made ({error}); megarlhf report run_dir={run_dir} makes it"
    rows = read_metrics(run_dir).rows
    steps = f"{rows[-1]['step']:.0f} steps are done" if rows else "no step was to be done"
    lines = [
        f"{steps}, this start took {clock_time(seconds)}; the model is in {run_dir / MODEL}; {page}",
        f"last: {', '.join(numbers)}" + (" (95 % intervals)" if any("[" in number for number in numbers) else ""),
        f"next: {', or '.join(following)}",
    ]
    sys.stderr.write(printable("\n".join(lines if numbers else lines[::2]) + "\n"))
