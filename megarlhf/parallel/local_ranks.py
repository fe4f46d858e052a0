"""The ranks of a run on this machine alone: one process each. They meet in a file and talk over loopback.

What listens is gloo, on loopback alone; what other users of the machine or the network say is never read: the file lies
in a directory that is this user's alone. The first rank that fails is the one the user hears about: each writes its
failure, with the time, to that directory, and those that fall over after it, only because their peer is gone, stay
silent.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch

from megarlhf.errors import BAD_INPUT, FAILED, STOPPED, MegarlhfError, complain
from megarlhf.observe.files import write_whole
from megarlhf.parallel.mesh import LOOPBACK, STORE, loopback_interface

FAILURES = "MEGARLHF_FAILURES"
"""Environment variable: the directory in which a launched rank writes why it failed."""
LAUNCHER = "MEGARLHF_LAUNCHER"
"""Environment variable: the process that started the ranks, and without which they end."""
COURTESY_S = 2.0
"""Seconds that a rank which is probably not the cause waits for the cause to be known."""
TIDYING_S = 1.0
"""Seconds that ranks have to leave after Ctrl-C before they are told again, by a signal that ends their imports too."""
SHUTDOWN_S = 5.0
"""Seconds that ranks have to leave after one has failed; then they are killed."""
POLL_S = 0.05
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
"""The ranks may first save their state."""
ENDING = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""The ranks leave at once."""

Rank = subprocess.Popen[bytes]


def start_ranks(ranks: int, command: Sequence[str]) -> int:
    """Run Python with `command` once a rank, say why the first one failed, and return the exit code of the run.

    Raises:   KeyboardInterrupt when the user stopped the ranks.
    """
    started: list[Rank] = []
    caught: list[int] = []
    with tempfile.TemporaryDirectory(prefix="megarlhf-") as directory, _listening(started, caught):
        try:
            while len(started) < ranks and not caught:
                started.append(_start(len(started), ranks, command, Path(directory)))
            codes = _first_to_end(started, caught, Path(directory))
        finally:
            _end(started, caught)
        ended = next((number for number in caught if number in ENDING or not started), None)
        if ended == signal.SIGINT:
            raise KeyboardInterrupt
        if ended is not None:
            return _say_stopped(ended)
        if not any(codes.values()):
            return 0
        # A rank that saved first has left a note of its own.
        obeyed = {-number for number in caught} & set(codes.values())
        if obeyed and not _notes(Path(directory)):
            return _say_stopped(-min(obeyed))
        return _report_first_failure(codes, Path(directory))


def note(error: Exception, text: str, directory: Path) -> None:
    """Leave word of why this rank fails for the process that started it."""
    content = {"echo": is_echo(error), "time": time.monotonic(), "text": text, "exit_code": exit_code(error)}
    write_whole(directory / f"rank_{os.environ['RANK']}.json", json.dumps(content))


def is_echo(error: Exception) -> bool:
    """Whether this looks like what a rank sees when another one is gone."""
    lost = re.search(r"connection (closed|reset|refused)|broken pipe|timed out", str(error), re.IGNORECASE)
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and lost is not None)


def exit_code(error: BaseException) -> int:
    """What a process that ends with `error` returns."""
    return error.exit_code if isinstance(error, MegarlhfError) else FAILED


@contextmanager
def _listening(ranks: Sequence[Rank], caught: list[int]) -> Iterator[None]:
    """Inside, signals are passed on to the ranks, and `caught` says which came."""

    def catch(number: int, _: FrameType | None) -> None:
        caught.append(number)
        _signal(ranks, signal.SIGINT if number in ENDING else number)

    # What is ignored, as SIGHUP under nohup, stays so.
    heard = [number for number in (*FORWARDED, *ENDING) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, catch) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(rank: int, ranks: int, command: Sequence[str], directory: Path) -> Rank:
    """One rank, leader of a session of its own: the terminal's signals come to this process alone."""
    # Rank 0 speaks for all; how the others complain is kept for the case that one of them crashes.
    log = None if rank == 0 else _log(rank, directory).open("wb")
    # An exception in the middle of its imports would be swallowed or printed: the rank hears Ctrl-C once it works.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return subprocess.Popen(
            [sys.executable, *command],
            env=_environment(rank, ranks, directory),
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if log is not None:
            log.close()


def _environment(rank: int, ranks: int, directory: Path) -> dict[str, str]:
    interface = loopback_interface()
    return {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        # Below errors, torch's C++ tells mostly how the connections to a peer that left were closed.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": LOOPBACK,
        # Also where the user has named another for runs on many machines: here no other machine has a part.
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        STORE: str(directory / "store"),
        FAILURES: str(directory),
        LAUNCHER: str(os.getpid()),
    }


def _first_to_end(ranks: Sequence[Rank], caught: Sequence[int], directory: Path) -> dict[int, int]:
    """Wait until all ranks have ended, or one has failed, or shall; return the exit codes of those that have.

    One that has lost its peer may be quicker to end than that peer, whose code says why.
    """
    until = float("inf")
    while True:
        codes = {rank: process.returncode for rank, process in enumerate(ranks) if process.poll() is not None}
        failed = {rank for rank, code in codes.items() if code}
        if failed:
            until = min(until, time.monotonic() + COURTESY_S)
        echoes = {rank for rank, note in _notes(directory).items() if note["echo"]} if failed else set()
        if len(codes) == len(ranks) or failed - echoes or set(caught) & set(ENDING) or time.monotonic() > until:
            return codes
        time.sleep(POLL_S)


def _end(ranks: Sequence[Rank], caught: Sequence[int]) -> None:
    """Have the ranks leave, and kill what is there after a while, also what dead ranks left: they led sessions."""
    if set(caught) & set(ENDING):
        _wait(ranks, TIDYING_S)
    _signal(ranks, signal.SIGTERM)
    _wait(ranks, SHUTDOWN_S)
    for rank in ranks:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)
        rank.wait()


def _wait(ranks: Sequence[Rank], seconds: float) -> None:
    """Until all have ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _signal(ranks: Sequence[Rank], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)


def _report_first_failure(codes: dict[int, int], directory: Path) -> int:
    """Print why the first rank failed and return the exit code; `codes` are of ranks that ended by themselves."""
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    if killed:
        rank, number = min(killed.items())
        hint = " (often the system is out of memory)" if number == signal.SIGKILL else ""
        name = signal.Signals(number).name
        complain(f"{_last_words(rank, directory)}rank {rank} was killed by {name}{hint}; the other ranks were stopped.")
        return FAILED
    notes = _notes(directory)
    # One that was stopped while it imported its modules leaves no note.
    silent = [rank for rank, code in codes.items() if code not in (0, STOPPED) and rank not in notes]
    if not silent and not notes:
        complain("stopped before the first step; start the same command again.")
        return STOPPED
    if not silent:
        first = min(notes.values(), key=lambda note: (note["echo"], note["time"]))
        complain(first["text"])
        return first["exit_code"]
    rank = silent[0]
    complain(
        f"{_last_words(rank, directory)}rank {rank} ended with exit code {codes[rank]}; the other ranks were stopped."
    )
    return codes[rank] if codes[rank] in (BAD_INPUT, STOPPED) else FAILED


def _say_stopped(number: int) -> int:
    complain(f"stopped by {signal.Signals(number).name}.")
    return 128 + number


def _notes(directory: Path) -> dict[int, dict]:
    found = {int(path.stem.removeprefix("rank_")): path for path in directory.glob("rank_*.json")}
    return {rank: json.loads(path.read_text(encoding="utf-8")) for rank, path in found.items()}


def _log(rank: int, directory: Path) -> Path:
    return directory / f"rank_{rank}.log"


def _last_words(rank: int, directory: Path) -> str:
    """The end of what a silent rank wrote to standard error; rank 0 has said it on the terminal."""
    log = _log(rank, directory)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "".join(line for line in text.splitlines(keepends=True)[-20:])
