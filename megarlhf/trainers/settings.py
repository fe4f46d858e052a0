"""What every training run has: where it writes, and when it gives up."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from megarlhf.errors import ConfigError
from megarlhf.runtime.settings import RanksConfig


class RunConfig(RanksConfig):
    """Settings shared by every command that trains."""

    run_dir: Path
    """Directory for metrics, samples, models and the resolved settings; must not hold another run."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Optimiser steps that may be skipped because loss or gradient is not finite before the run stops."""
    tensorboard: bool = True
    """Write TensorBoard events besides metrics.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases; the key is read from WANDB_API_KEY."""

    def check_fresh(self) -> None:
        """Raise ConfigError where `run_dir` already holds a finished or unfinished run: nothing is overwritten."""
        if (self.run_dir / "metrics.jsonl").exists():
            raise ConfigError(f"run_dir={self.run_dir} already holds a run; choose another, or remove it.")
