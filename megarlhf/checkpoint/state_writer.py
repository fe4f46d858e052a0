"""Training states written in the background: training goes on while forked processes write.

A rank's process forks at the moment of the save, so that the copy has the numbers of that moment whatever training does
to its own; on a GPU they are brought to the host first. The copies outlive signals that ask a run to stop, which may
reach every process of a group, but not the rank. The state counts once every rank's file is written and summed:

    written under DIR/step_00000120.XXXXXXXX.partial -> renamed to step_00000120 -> named by DIR/latest (and DIR/best)

A run killed anywhere between finds the state before.
"""

from __future__ import annotations

import gc
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from megarlhf.checkpoint.buckets import complete, on_host, planned, write_buckets
from megarlhf.checkpoint.checksums import leave_checksums, write_checksums
from megarlhf.checkpoint.disk import causes, check_room, saving
from megarlhf.checkpoint.model_directory import WEIGHTS, Card
from megarlhf.checkpoint.training_state import STATE, Position, random_file, role_state
from megarlhf.errors import OutputError
from megarlhf.models import memory_plan
from megarlhf.models.role import TrainableRole
from megarlhf.observe.files import remedy, write_whole
from megarlhf.observe.run_files import BEST, LATEST, step_name, steps_in
from megarlhf.parallel.collectives import all_reduce, broadcast_object
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.processes import start_helper
from megarlhf.parallel.rng import random_states

DONE, WRITING, KILLED = 0, 1, 2
PARTIAL = ".partial"


@dataclass(frozen=True)
class Retention:
    """Which saved states stay."""

    last: int
    """This many of the newest."""
    every: int
    """Those of every so many steps for good; 0 for none."""

    def keeps(self, steps: Iterable[int], best: int | None) -> set[int]:
        """Those of `steps` that stay."""
        ordered = sorted(steps)
        milestones = {step for step in ordered if self.every and step % self.every == 0}
        return {*ordered[-self.last :], *milestones, *({best} & set(ordered) if best is not None else ())}


@dataclass
class _Part:
    """What this rank writes of one role."""

    request: Any
    """Megatron's; it completes the role's files once all ranks have written theirs."""
    process: BaseProcess | None = None
    """Writes; none where this rank has nothing to write."""
    word: Connection | None = None
    """Over which it says what it has written."""
    written: list[Any] = field(default_factory=list)
    """What it said, if it has."""

    def status(self, *, block: bool) -> int:
        """Whether it has said so; `block` waits until it has, or is gone."""
        if self.word is None or self.process is None or self.written:
            return DONE
        if not block and not self.word.poll():
            return WRITING
        try:
            self.written.append(self.word.recv())
        except (EOFError, OSError):  # killed, maybe in the middle of a word
            return KILLED
        self.process.join()
        return DONE

    def complete(self) -> None:
        """Collective over the mesh. Raises CheckpointException on every rank where one could not write."""
        complete(self.request, self.written)


@dataclass(frozen=True)
class _Pending:
    position: Position
    partial: Path
    parts: list[_Part]


class StateWriter:
    """Saves training states of some roles, one at a time. Those with a card can be opened as models.

    Ranks:    every method is collective over the mesh.
    Raises:   OutputError, on every rank, when a state cannot be written; those before it are untouched.
    """

    def __init__(
        self,
        directory: Path,
        roles: Mapping[str, TrainableRole],
        cards: Mapping[str, Card],
        retention: Retention,
        mesh: Mesh,
    ) -> None:
        self._directory, self._roles, self._cards = directory, roles, cards
        self._retention, self._mesh = retention, mesh
        self._pending: _Pending | None = None

    def start(self, position: Position) -> None:
        """Begin to write a state, after the one before is whole. Returns when training may change its weights."""
        self.finish()
        check_room(self._directory, self.state_bytes(), "a state (those before it stand)", self._mesh)
        # A name of its own: what outlives a killed run may still be writing under the old one.
        attempt = broadcast_object(uuid.uuid4().hex[:8], self._mesh, "world")
        partial = self._directory / f"{step_name(position.step)}.{attempt}{PARTIAL}"
        pending = _Pending(position, partial, [])
        try:
            self._begin(pending)
        except BaseException:
            self._remove(pending)
            raise
        self._pending = pending

    def _begin(self, pending: _Pending) -> None:
        partial, mesh, states = pending.partial, self._mesh, random_states(self._mesh.device)
        self._on_main(lambda: self._make(partial), f"{partial} cannot be made")
        self._everywhere(lambda: save_file(states, partial / random_file(mesh)), f"{partial} cannot be written")
        for name, role in self._roles.items():
            # Gradients are no part of a state, and leave their room to what Megatron gathers.
            with role.resident("weights", "optimizer"), saving(partial):
                request = planned(role_state(role, loading=False), partial / name / WEIGHTS, mesh)
                pending.parts.append(_started(request, partial / name / WEIGHTS, mesh.rank))

    def state_bytes(self) -> int:
        """Bytes of the numbers in a state, over all ranks. Collective."""
        numbers = torch.tensor(sum(saved_bytes(role) for role in self._roles.values()), device=self._mesh.device)
        return int(all_reduce(numbers, self._mesh, "world"))

    def poll(self) -> None:
        """Complete the state if every rank has written its part; otherwise leave it for later."""
        if self._pending is not None:
            self._complete_unless_writing(self._pending, block=False)

    def finish(self) -> None:
        """Wait until the state is whole."""
        if self._pending is not None:
            self._complete_unless_writing(self._pending, block=True)

    def _complete_unless_writing(self, pending: _Pending, *, block: bool) -> None:
        mine = max((part.status(block=block) for part in pending.parts), default=DONE)
        status = int(all_reduce(torch.tensor(mine, device=self._mesh.device), self._mesh, "world", op="max"))
        if status == WRITING:
            return
        self._pending = None
        try:
            self._complete(pending, status)
        except OutputError:
            self._remove(pending)  # it would take up room, often on a disk that is full
            raise

    def leave(self) -> None:
        """After an error: complete the pending state if this rank is alone; else nobody knows what the others do.

        Ranks:    not collective.
        """
        if self._mesh.size("world") == 1:
            with suppress(OutputError):
                self.finish()
        self.drop()

    def drop(self) -> None:
        """Remove the pending state. Not collective."""
        if self._pending is not None:
            self._remove(self._pending)
        self._pending = None

    def _remove(self, pending: _Pending) -> None:
        """Stop writing, and remove what is there; what another rank writes meanwhile, the next save removes."""
        for part in pending.parts:
            if part.process is not None:
                part.process.kill()
                part.process.join()
        if self._mesh.is_main:
            shutil.rmtree(pending.partial, ignore_errors=True)

    def _complete(self, pending: _Pending, status: int) -> None:
        where = pending.partial
        if status == KILLED:
            raise OutputError(f"{where}: a process that wrote it was killed; the state before it stands.")
        try:
            for part in pending.parts:
                part.complete()
        except CheckpointException as error:
            raise OutputError(
                f"{where} cannot be written ({causes(error) or 'rank 0 says why'}); see whether the disk is full: "
                f"{remedy(where)}. The state before it stands."
            ) from None
        self._on_main(lambda: self._publish(where, pending.position), f"{where} cannot be completed")

    def _make(self, partial: Path) -> None:
        for stale in self._directory.glob(f"step_*{PARTIAL}"):
            shutil.rmtree(stale, ignore_errors=True)
        for name in self._roles:
            (partial / name / WEIGHTS).mkdir(parents=True)

    def _publish(self, partial: Path, position: Position) -> None:
        whole = self._directory / step_name(position.step)
        (partial / STATE).write_text(json.dumps(position.model_dump(mode="json")) + "\n", encoding="utf-8")
        for name, role in self._roles.items():
            if name in self._cards:
                self._cards[name].write(role, partial / name)
            write_checksums(partial / name / WEIGHTS)
            write_checksums(partial / name)
        write_checksums(partial)
        shutil.rmtree(whole, ignore_errors=True)
        partial.rename(whole)
        write_whole(self._directory / LATEST, whole.name + "\n")
        if position.best is not None and position.best.step == position.step:
            write_whole(self._directory / BEST, whole.name + "\n")
        # A state beyond this one is of a run that stopped before `latest` named it.
        saved = steps_in(self._directory)
        until = [step for step in saved if step <= position.step]
        kept = self._retention.keeps(until, None if position.best is None else position.best.step)
        for step in saved.keys() - kept:
            shutil.rmtree(saved[step], ignore_errors=True)

    def _on_main(self, work: Callable[[], object], what: str) -> None:
        """Do `work` on rank 0; where the disk refuses, every rank raises."""
        self._everywhere(work if self._mesh.is_main else int, what)

    def _everywhere(self, work: Callable[[], object], what: str) -> None:
        """Do `work` on every rank; where one's disk refuses, every rank raises."""
        reason = ""
        try:
            work()
        except (OSError, SafetensorError) as error:
            reason = str(error)
        failed = torch.tensor(int(bool(reason)), device=self._mesh.device)
        if all_reduce(failed, self._mesh, "world", op="max"):
            raise OutputError(f"{what} ({reason or 'another rank says why'}); the states before it stand.")


def saved_bytes(role: TrainableRole) -> int:
    """This rank's share of the numbers in a saved state of `role`: weights, and what the optimiser has for each."""
    return memory_plan.saved_bytes(role.planned, role.learns)


def _started(request: Any, directory: Path, rank: int) -> _Part:
    """A process has begun to write this rank's part of one role and its checksums."""
    if request.async_fn is None:
        return _Part(request)
    word, theirs = Pipe(duplex=False)
    process = start_helper(_write, request, on_host(request), directory, rank, theirs)
    theirs.close()  # so that a dead process reads as the end of the pipe
    return _Part(request, process, word)


def _write(request: Any, buckets: list[Any], directory: Path, rank: int, word: Connection) -> None:
    gc.disable()  # it would take apart what the rank has on its GPU
    written = write_buckets(request, buckets)
    try:
        leave_checksums(directory, rank)
    except OSError as error:
        written = error
    word.send(written)
