"""The cadence of a run: steps in order, progress, metrics, and a stop when too many steps are not finite.

Knows no algorithm: a trainer hands it a function of the step number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megarlhf.batch import Batch
from megarlhf.errors import TrainingError
from megarlhf.models.role import Update
from megarlhf.observe.metrics import Metrics
from megarlhf.observe.progress import Progress
from megarlhf.observe.writers import RunWriter, write_provenance
from megarlhf.parallel.collectives import barrier
from megarlhf.parallel.mesh import Mesh
from megarlhf.trainers.settings import RunConfig


class StepGuard:
    """Counts skipped optimiser steps; past the limit it saves the evidence and stops the run.

    Ranks:    every rank skips the same steps, so all raise together, each after saving its own rows and RNG state.
    """

    def __init__(self, run_dir: Path, limit: int, mesh: Mesh) -> None:
        self._directory = run_dir / "skipped"
        self._limit = limit
        self._mesh = mesh
        self.skipped = 0

    def check(self, role: str, update: Update, batch: Batch, step: int) -> None:
        """Take note of one optimiser step.

        Raises:   TrainingError, naming the saved files, when more than the allowed number of steps were skipped.
        """
        if update.stepped:
            return
        self.skipped += 1
        if self.skipped <= self._limit:
            return
        path = self._save(role, update, batch, step)
        barrier(self._mesh)  # the first rank that leaves ends the others, who may be writing still
        raise TrainingError(
            f"{self.skipped} optimiser steps were skipped because loss or gradient was not finite (last: {role}, step "
            f"{step}, loss {update.means.loss}, gradient norm {update.grad_norm}); the batch is in {path}. Lower the "
            "learning rate, or raise max_skipped_steps."
        )

    def _save(self, role: str, update: Update, batch: Batch, step: int) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / f"{role}_step_{step}_rank_{self._mesh.rank}.safetensors"
        note = {"role": role, "step": step, "rank": self._mesh.rank, "loss": repr(update.means.loss)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors_of(batch)}
        save_file({**tensors, "rng_state": torch.get_rng_state()}, path, {"note": json.dumps(note)})
        return path


def tensors_of(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a batch and of the batches inside it, by dotted name."""
    for name, value in vars(batch).items():
        if isinstance(value, Batch):
            yield from ((f"{name}.{inner}", tensor) for inner, tensor in tensors_of(value))
        elif isinstance(value, Tensor):
            yield name, value


def run_steps(
    count: int, description: str, step: Callable[[int], Metrics], note: str, *, mesh: Mesh, writer: RunWriter | None
) -> Metrics:
    """Call `step(0)` to `step(count - 1)`, log what each returns, and return the last metrics.

    note: name of the metric shown beside the progress bar. Ranks: rank 0 has the writer and shows the bar.
    """
    metrics: Metrics = {}
    with Progress(count, description, enabled=mesh.is_main) as bar:
        for index in range(count):
            metrics = step(index)
            if writer is not None:
                writer.log(metrics, index + 1)
            bar.advance(note=f"{note.partition('/')[2]} {metrics[note]:.3f}")
    return metrics


@contextmanager
def open_run(cfg: RunConfig, argv: Sequence[str], mesh: Mesh) -> Iterator[RunWriter | None]:
    """Rank 0's writer on a run directory that says how the run was made; None on other ranks."""
    if not mesh.is_main:
        yield None
        return
    write_provenance(cfg.run_dir, cfg, argv)
    with RunWriter(cfg.run_dir, tensorboard=cfg.tensorboard, wandb=cfg.wandb) as writer:
        yield writer
