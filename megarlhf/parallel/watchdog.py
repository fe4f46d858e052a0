"""Notices a GPU that no longer answers, as in a collective of NCCL that another rank has not joined.

Over gloo a collective that nobody joins ends with an exception. Over NCCL Python waits in the driver until NCCL's own
watchdog aborts the process, which then can say nothing. This one looks from a thread beside, and comes first.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megarlhf.observe.trail import Trail

LOOK_S = 1.0


class Watchdog:
    """Whether this rank's device has done nothing of what it was given for `limit_s`.

    It is asked only once the rank has gone nowhere for half as long, with an event behind all other work: a rank that
    is slow gets its answer, whatever it does meanwhile. ask: returns such an event, whose `query` says if it happened.
    """

    def __init__(
        self, trail: Trail, limit_s: float, ask: Callable[[], Any], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._trail, self._limit, self._ask, self._clock = trail, limit_s, ask, clock
        self._question: Any = None
        self._since = clock()
        """When the question was asked, or else when the last one was answered."""

    def stuck(self) -> bool:
        """Ask, or see whether there is an answer; called every so often."""
        now = self._clock()
        if self._question is not None:
            if not self._question.query():
                return now - self._since >= self._limit
            self._question, self._since = None, now
        elif now - max(self._since, self._trail.moved) >= self._limit / 2:
            self._question, self._since = self._ask(), now
        return False


@contextmanager
def watched(trail: Trail, limit_s: float, device: torch.device, give_up: Callable[[], object]) -> Iterator[None]:
    """Inside, `give_up` is called from another thread once the device is stuck; on a CPU nothing is watched.

    That thread has a stream of its own: what it copies from the device does not wait for what is stuck.
    """
    if device.type != "cuda":
        yield
        return
    over = threading.Event()

    def ask() -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.default_stream(device))
        return event

    def look() -> None:
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            watchdog = Watchdog(trail, limit_s, ask)
            while not over.wait(LOOK_S):
                if watchdog.stuck():
                    give_up()
                    return

    threading.Thread(target=look, name="watchdog", daemon=True).start()
    try:
        yield
    finally:
        over.set()
