"""The floor that the pages of reinforcement learning stand on: one turn of the loop, passes over what it brought."""

from __future__ import annotations

from dataclasses import dataclass

from megarlhf.batch.rollouts import LearnerRows
from megarlhf.models.role import TrainableRole, Update
from megarlhf.observe.clock import Clock
from megarlhf.parallel.micro_batches import Loss
from megarlhf.parallel.rng import derive_seed, generator
from megarlhf.runs.guard import StepGuard


@dataclass(frozen=True)
class Turn:
    """One iteration of a run, as its page is handed it."""

    number: int
    """Of the iteration, from 0."""
    run_seed: int
    clock: Clock
    guard: StepGuard

    def seed(self, purpose: str) -> int:
        """Of what is drawn in this iteration for `purpose`."""
        return derive_seed(self.run_seed, purpose, self.number)


def optimise(
    role: TrainableRole, loss: Loss, rows: LearnerRows, turn: Turn, *, epochs: int, global_batch: int
) -> list[Update]:
    """`epochs` passes over the rows in mini-batches of `global_batch`, the same for every learner of the iteration."""
    updates: list[Update] = []
    # On the host, where its rows are cut without waiting for the device, and take none of its memory.
    waiting = rows.to("cpu")
    with role.resident(*role.parts):
        for epoch in range(epochs):
            order = generator(turn.run_seed, "mini_batches", turn.number, epoch)
            for batch in waiting.mini_batches(global_batch, order):
                updates.append(role.update(batch, loss))
                turn.guard.check(role, updates[-1], turn.number)
    return updates
