"""A run that is started again on fewer ranks goes on where it was told that it may, else it says what would let it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from megarlhf.observe.writers import read_metrics

DATA = ("data.template=plain", "data.arithmetic.level=1", "data.arithmetic.rows=12")
RUN = (
    "model=tiny-xs",
    "tokenizer=arithmetic",
    "global_batch=4",
    "micro_batch=2",
    "optim.schedule=constant",
    "tensorboard=false",
)


def sft(run_dir: Path, *settings: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    """On its own ranks, or as the one that a launcher started of `ranks`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launched = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return subprocess.run(
        [sys.executable, "-m", "megarlhf.cli", "sft", f"run_dir={run_dir}", *DATA, *RUN, *settings],
        env={**os.environ, **(launched if ranks else {})},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_fewer_ranks_go_on_where_they_may(tmp_path: Path) -> None:
    first = sft(tmp_path / "run", "layout.data=2", "layout.elastic=true")
    assert first.returncode == 0, first.stderr
    refused = sft(tmp_path / "run", "layout.data=2", "epochs=2", ranks=1)
    assert refused.returncode == 2
    assert "but 1 were started; set layout.data=1, or layout.elastic=true, which does, or start 2" in refused.stderr
    again = sft(tmp_path / "run", "layout.data=2", "layout.elastic=true", "epochs=2", ranks=1)
    assert again.returncode == 0, again.stderr
    assert "layout.data=2 -> 1, for 1 ranks (layout.elastic)" in again.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run").rows] == [1, 2, 3, 4, 5, 6]
