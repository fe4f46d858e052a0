"""Processes that end with those that started them, and leave the signals to them."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess

HELPER = "megarlhf helper"
"""Name of the processes that `start_helper` starts."""

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that this process gets when its parent is gone."""

ANSWERED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Signals that a rank answers. Who signals a process group or a step of Slurm reaches the rank's helpers too."""


def start_helper(work: Callable[..., object], *args: object) -> BaseProcess:
    """Fork a process that does `work(*args)`, deaf to the signals that this one answers, and gone once this one is."""
    helper = multiprocessing.get_context("fork").Process(name=HELPER, target=_help, args=(os.getpid(), work, args))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ANSWERED)  # what comes before it is deaf waits, and is lost then
    try:
        helper.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return helper


def _help(parent: int, work: Callable[..., object], args: tuple[object, ...]) -> None:
    for number in ANSWERED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ANSWERED)
    end_with_parent(parent)
    work(*args)


def end_with_parent(parent: int) -> None:
    """Have the system kill this process once `parent`, which started it, is gone, however that ended.

    Only Linux can; elsewhere this looks once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # gone before the system knew
        os.kill(os.getpid(), signal.SIGKILL)


def end_helpers() -> None:
    """Kill the helpers that this process has started, and no other child: it may be part of a larger program."""
    for child in multiprocessing.active_children():
        if child.name == HELPER:
            child.kill()
