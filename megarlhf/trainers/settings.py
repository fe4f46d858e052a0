"""What every training run has: where it writes, and when it gives up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megarlhf.config import load_config
from megarlhf.errors import ConfigError
from megarlhf.observe.metrics import GLOSSARY
from megarlhf.observe.writers import check_trackers
from megarlhf.runtime.settings import RanksConfig

TRACES = ("metrics.jsonl", "config.yaml", "model")
"""Any of these in a directory means that a run has used it."""

FREE_TO_CHANGE = (
    *("layout", "compute", "micro_batch", "offload", "timeout_s"),
    *("resume", "save_every", "keep_last", "keep_every", "keep_best", "save_before", "gates", "tensorboard", "wandb"),
    *("kl_bound", "stop_when_over_optimised"),
)
"""Settings, or groups of them, that may differ when a run goes on: they change no result, or only its rounding."""


class RunConfig(RanksConfig):
    """Settings shared by every command that trains."""

    run_dir: Path
    """Directory for metrics, samples, models and the resolved settings; must not hold another run."""
    resume: Literal["auto", "never"] = "auto"
    """`auto`: the same command again goes on from the newest saved state in run_dir, or from the start where there is
    none. `never` refuses a used run_dir."""
    save_every: int = Field(default=100, ge=0)
    """Steps (PPO: iterations) between two saved states; 0 saves none, whatever asks the run to stop."""
    keep_last: int = Field(default=2, ge=1)
    """Newest states to keep; each holds weights and optimiser of every role that learns."""
    keep_every: int = Field(default=0, ge=0)
    """States after every so many steps are kept for good; 0 keeps none of them. A multiple of save_every."""
    keep_best: str = ""
    """Metric by which the best of the saved states is kept too, named by checkpoints/best: `rollout/score_mean` keeps
    the highest, `-sft/loss` the lowest. Empty keeps none."""
    save_before: float = Field(default=0.0, ge=0)
    """Seconds after its start at which the run has saved its state and stopped, with exit code 75, so that a job's time
    limit loses nothing; 0 for no limit. SIGTERM and SIGUSR1 do the same at the end of the step."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Optimiser steps that may be skipped because loss or gradient is not finite; one more stops the run."""
    tensorboard: bool = True
    """Write TensorBoard events besides metrics.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases too; the key is read from the environment variable WANDB_API_KEY."""

    @property
    def states_dir(self) -> Path:
        """Where training states are saved."""
        return self.run_dir / "checkpoints"

    def check_run_dir(self) -> None:
        """Raise ConfigError where `run_dir` cannot be written, or holds a run that this one does not go on with.

        Settings about saving that contradict each other are refused too, and trackers that cannot be used.
        """
        self._check_saving()
        check_trackers(tensorboard=self.tensorboard, wandb=self.wandb)
        for trace in TRACES:
            if (self.run_dir / trace).exists():
                self._check_same_run(trace)
        there = next(path for path in (self.run_dir, *self.run_dir.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            problem = "cannot be written to" if there.is_dir() else "is a file"
            raise ConfigError(
                f"run_dir={self.run_dir} cannot be made: {there} {problem}; choose another run_dir, or mend that."
            )

    def _check_saving(self) -> None:
        if self.keep_every and (not self.save_every or self.keep_every % self.save_every):
            raise ConfigError(
                f"keep_every={self.keep_every} is not a multiple of save_every={self.save_every}: no state would be "
                "there to keep; change one of them."
            )
        if self.save_before and not self.save_every:
            raise ConfigError(
                f"save_before={self.save_before:g} with save_every=0: the run saves no state; set save_every above 0."
            )
        if self.keep_best and self.keep_best.removeprefix("-") not in GLOSSARY:
            raise ConfigError(
                f"keep_best={self.keep_best} is no metric; name one that the run logs, for example rollout/score_mean."
            )

    def _check_same_run(self, trace: str) -> None:
        settings = self.run_dir / "config.yaml"
        if self.resume == "never" or not settings.is_file():
            raise ConfigError(
                f"run_dir={self.run_dir} already holds a run ({trace} is there); choose another, or remove it."
            )
        if (self.run_dir / "model").exists():
            raise ConfigError(
                f"run_dir={self.run_dir} holds a finished run (model is there): nothing is left to do; choose another "
                "run_dir to train again."
            )
        then, now = _flat(load_config(type(self), settings, [])), _flat(self)
        changed = [name for name in now if then[name] != now[name] and name.split(".")[0] not in FREE_TO_CHANGE]
        if changed:
            values = ", ".join(f"{name} {then[name]!r} -> {now[name]!r}" for name in changed)
            raise ConfigError(
                f"run_dir={self.run_dir} holds a run with other settings ({values}); put them back to go on with it, "
                "or choose another run_dir."
            )


def _flat(cfg: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name."""

    def walk(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in values.items():
            flat |= walk(f"{prefix}{name}.", value) if isinstance(value, dict) else {prefix + name: value}
        return flat

    return walk("", cfg.model_dump(mode="json"))
