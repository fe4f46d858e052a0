"""A GPU that no longer answers, told from one that is slow: the clock and the device are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from megarlhf.observe.trail import Trail
from megarlhf.parallel import mesh
from megarlhf.parallel.watchdog import Watchdog

LIMIT_S = 100.0


class Device:
    """Does each piece of work that it is given when `busy_until` is over."""

    def __init__(self) -> None:
        self.now, self.busy_until, self.asked = 0.0, 0.0, 0

    def ask(self) -> SimpleNamespace:
        self.asked += 1
        at = self.busy_until
        return SimpleNamespace(query=lambda: self.now >= at)


def first_stuck(device: Device, trail: Trail, until: int) -> int | None:
    """The second at which the watchdog, looking every second, gives the device up."""
    watchdog = Watchdog(trail, LIMIT_S, device.ask, lambda: device.now)
    for second in range(until):
        device.now = second
        if watchdog.stuck():
            return second
    return None


def test_a_device_that_never_answers_is_given_up_in_time() -> None:
    device, trail = Device(), Trail(moved=10.0)
    device.busy_until = float("inf")  # a collective that nobody joins
    given_up = first_stuck(device, trail, 400)
    # Asked at 10 + 50, given up 100 seconds later; NCCL, which would end the process without a word, waits for longer.
    assert given_up == 160
    assert given_up - trail.moved < mesh._patience(torch.device("cuda"), LIMIT_S) - 60 < 2 * LIMIT_S + 1


def test_a_slow_rank_is_left_alone() -> None:
    """One that works for long and enters no collective, on a device that is never more than 90 seconds behind."""
    device, trail = Device(), Trail(moved=0.0)
    watchdog = Watchdog(trail, LIMIT_S, device.ask, lambda: device.now)
    for second in range(5000):
        device.now = second
        if second % 90 == 0:
            device.busy_until = second + 90
        assert not watchdog.stuck(), second
    assert device.asked > 20


def test_a_rank_that_moves_on_is_not_asked() -> None:
    """A question in the middle of the recording of a CUDA graph would spoil it."""
    device, trail = Device(), Trail(moved=0.0)
    watchdog = Watchdog(trail, LIMIT_S, device.ask, lambda: device.now)
    for second in range(1000):
        device.now = second
        if second % 40 == 0:
            trail.moved = second
        assert not watchdog.stuck()
    assert device.asked == 0


def test_over_gloo_a_collective_ends_by_itself() -> None:
    assert mesh._patience(torch.device("cpu"), LIMIT_S) == LIMIT_S
