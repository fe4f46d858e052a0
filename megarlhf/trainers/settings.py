"""What every training run has: where it writes, and when it gives up."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from megarlhf.errors import ConfigError
from megarlhf.runtime.settings import RanksConfig

TRACES = ("metrics.jsonl", "config.yaml", "model")
"""Any of these in a directory means that a run has used it."""


class RunConfig(RanksConfig):
    """Settings shared by every command that trains."""

    run_dir: Path
    """Directory for metrics, samples, models and the resolved settings; must not hold another run."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Optimiser steps that may be skipped because loss or gradient is not finite; one more stops the run."""
    tensorboard: bool = True
    """Write TensorBoard events besides metrics.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases too; the key is read from the environment variable WANDB_API_KEY."""

    def check_run_dir(self) -> None:
        """Raise ConfigError where `run_dir` cannot be written, or already holds a run: nothing is overwritten."""
        for trace in TRACES:
            if (self.run_dir / trace).exists():
                raise ConfigError(
                    f"run_dir={self.run_dir} already holds a run ({trace} is there); choose another, or remove it."
                )
        there = next(path for path in (self.run_dir, *self.run_dir.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            problem = "cannot be written to" if there.is_dir() else "is a file"
            raise ConfigError(
                f"run_dir={self.run_dir} cannot be made: {there} {problem}; choose another run_dir, or mend that."
            )
