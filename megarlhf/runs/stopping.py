"""When a run is asked to stop: by a signal, or by its own wall-clock limit."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import psutil
import torch

from megarlhf.errors import RunStopped
from megarlhf.parallel.collectives import all_reduce
from megarlhf.parallel.launch import fail
from megarlhf.parallel.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Slurm sends SIGTERM before it kills, and with --signal=USR1@300 SIGUSR1 300 seconds before the limit."""


@contextmanager
def stopping_at_start() -> Iterator[None]:
    """Inside, and until a run listens, a signal ends the process at once: nothing is lost yet."""
    with _answered_by(_leave_before_first_step):
        yield


def before_first_step(name: str) -> RunStopped:
    """What a run says that the signal `name` stopped before its first step."""
    return RunStopped(f"stopped by {name} before the first step; start the same command again.")


def _leave_before_first_step(number: int, _: FrameType | None) -> None:
    fail(before_first_step(signal.Signals(number).name))


@contextmanager
def _answered_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, last in before.items():
            # After the steps there is little left to do, and it is done: the process that was starting is ending.
            signal.signal(number, signal.SIG_IGN if last is _leave_before_first_step else last)


class StopRequest:
    """Whether the run shall stop after this step; asked between steps, and the same on every rank.

    save_before: seconds after this process began at which the run must have stopped; 0 for no limit.
    """

    def __init__(self, save_before: float, mesh: Mesh) -> None:
        self._mesh = mesh
        age = time.time() - psutil.Process().create_time()
        # From here on the clock that nobody sets: a jump of the other would stop the run, or not stop it.
        self._deadline = time.monotonic() - age + save_before if save_before else float("inf")
        self._caught = 0
        self._interrupted = False
        self._longest_step = self._longest_save = 0.0
        self.step_begins()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the signals are noted instead of obeyed; after it, those of `stopping_at_start` are ignored.

        Ctrl-C is obeyed, and noted: Python drops what is raised while it collects an object, as it does a process that
        has ended, and then the end of the step obeys.
        """
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # else it is ignored, or somebody else's
        try:
            if usual:
                signal.signal(signal.SIGINT, self._interrupt)
            with _answered_by(self._catch):
                yield
        finally:
            if usual:
                signal.signal(signal.SIGINT, signal.default_int_handler)

    def step_begins(self) -> None:
        """Time the next step from now, not from when the last one ended."""
        self._step_began = time.monotonic()

    def step_ended(self) -> str:
        """Note how long the step took; return why the run shall stop, or nothing. Collective over the mesh.

        Raises:   KeyboardInterrupt where Ctrl-C was pressed, and nobody heard.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        now = time.monotonic()
        self._longest_step, self._step_began = max(self._longest_step, now - self._step_began), now
        return self._agreed(late=now + self._longest_step + self._longest_save >= self._deadline)

    def signalled(self) -> str:
        """The signal that has come, or nothing. Collective over the mesh."""
        return self._agreed(late=False)

    def _agreed(self, *, late: bool) -> str:
        # Rank 0's clock decides, a signal to any rank does: the largest number is everybody's.
        mine = torch.tensor(max(self._caught, int(late and self._mesh.is_main)), device=self._mesh.device)
        agreed = int(all_reduce(mine, self._mesh, "world", op="max"))
        if agreed > 1:
            return signal.Signals(agreed).name
        return "save_before" if agreed else ""

    def save_ended(self, seconds: float) -> None:
        """Note how long a save kept the run waiting: the last one must fit before the limit too."""
        self._longest_save = max(self._longest_save, seconds)
        self.step_begins()

    def _catch(self, number: int, _: FrameType | None) -> None:
        self._caught = number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        signal.default_int_handler(number, frame)
