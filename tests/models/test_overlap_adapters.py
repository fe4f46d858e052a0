"""Adapters learn the same where gradients and weights travel beside the work: the head's weight is in no bucket."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megarlhf.observe.writers import read_metrics

RUN = ("model=tiny-xs", "tokenizer=arithmetic", "data.template=plain", "data.arithmetic.level=1", "global_batch=4")
SMALL = ("data.arithmetic.rows=12", "micro_batch=2", "optim.schedule=constant", "tensorboard=false", "lora.rank=4")
BOTH = ("compute.overlap_grad_reduce=true", "compute.overlap_param_gather=true")


def losses(run_dir: Path, *settings: str) -> list[tuple[float, float]]:
    command = [
        sys.executable,
        "-m",
        "megarlhf.cli",
        "sft",
        f"run_dir={run_dir}",
        "layout.data=2",
        *RUN,
        *SMALL,
        *settings,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return [(row["sft/loss"], row["sft/grad_norm"]) for row in read_metrics(run_dir).rows]


def test_a_run_by_adapters_is_the_same_with_overlap(tmp_path: Path) -> None:
    plain = losses(tmp_path / "plain")
    assert len(plain) == 3
    assert losses(tmp_path / "both", *BOTH) == plain
