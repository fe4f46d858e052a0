"""When too many optimiser steps in a row are skipped, a run ends and leaves what explains it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megarlhf.checkpoint.model_directory import save_weights
from megarlhf.errors import CheckpointError, OutputError, TrainingError
from megarlhf.models.role import TrainableRole, Update
from megarlhf.parallel.mesh import Mesh
from megarlhf.runs.capsule import capsule_directory, leave_capsule


class StepGuard:
    """Counts skipped optimiser steps; past the limit in a row it saves the evidence and stops the run.

    Ranks:    every rank skips the same steps, so all raise together, each after writing its capsule.
    """

    def __init__(self, run_dir: Path, limit: int, mesh: Mesh) -> None:
        self._run_dir = run_dir
        self._limit = limit
        self._mesh = mesh
        self.skipped = 0
        self.in_a_row: dict[str, int] = {}
        """Of each role whose last steps were skipped, how many."""
        self.settle: Callable[[], object] = lambda: None
        """Completes what is being saved: Megatron writes one thing at a time."""

    def check(self, role: TrainableRole, update: Update, step: int) -> None:
        """Take note of one optimiser step.

        Raises:   TrainingError, naming the capsule, when more than the allowed number of steps were skipped in a row.
        """
        if update.stepped:
            self.in_a_row.pop(role.name, None)
            return
        self.skipped += 1
        row = self.in_a_row[role.name] = self.in_a_row.get(role.name, 0) + 1
        if row <= self._limit:
            return
        self._mesh.trail.step = step
        reason = f"not finite: loss {update.means.loss}, gradient norm {update.grad_norm}"
        raise TrainingError(
            f"{row} optimiser steps in a row were skipped because loss or gradient was not finite (last: {role.name}, "
            f"step {step}, loss {update.means.loss}, gradient norm {update.grad_norm}); "
            f"{self._evidence(role, reason)}. Lower the learning rate, or raise max_skipped_steps, and start the same "
            "command again."
        )

    def _evidence(self, role: TrainableRole, reason: str) -> str:
        """Save what explains the stop, and say where. Nothing that goes wrong here may hide the reason."""
        said = leave_capsule(self._run_dir, reason, self._mesh)
        directory = capsule_directory(self._run_dir, self._mesh.trail.step)
        try:
            self.settle()
            save_weights(role, directory / "weights")
        except (CheckpointError, OutputError) as error:
            return f"{said} ({error})"
        return f"{said}, and megarlhf replay capsule={directory} takes the step again"
