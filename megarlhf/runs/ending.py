"""The last words of a training run: its page, where the model is, what it came to, and what one may do next."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megarlhf.errors import DataError, OutputError, printable
from megarlhf.observe.metrics import Metrics
from megarlhf.parallel.mesh import Mesh


def conclude(run_dir: Path, metrics: Metrics, names: Sequence[str], following: Sequence[str], mesh: Mesh) -> None:
    """Write the run's page and say, on rank 0, where the model is, its last `names`, and the commands `following`."""
    if not mesh.is_main:
        return
    # Here, since its charts take a tenth of the time that a rank's start would take with them.
    from megarlhf.observe.report import write_page

    try:
        page = f"the page is {write_page(run_dir)}"
    except (DataError, OutputError) as error:  # the model is there: the run has not failed
        page = f"no page was made ({error}); megarlhf report run_dir={run_dir} makes it"
    numbers = ", ".join(f"{name} {metrics[name]:.4g}" for name in names if name in metrics)
    ended = f"last step: {numbers}; " if numbers else ""
    text = f"the model is in {run_dir / 'model'}; {ended}{page}\nnext: {', or '.join(following)}\n"
    sys.stderr.write(printable(text))
