"""Start a run on its ranks: those of torchrun or Slurm where they exist, else torch's elastic launcher on this machine.

The first rank that fails is the one the user hears about. Each rank writes its failure, with the time, to a directory
of the launcher; the ranks that fall over after it only because their peer is gone stay silent.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import psutil
import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megarlhf.errors import LayoutError, MegarlhfError, RunStopped
from megarlhf.observe.files import write_whole
from megarlhf.parallel.layout import ParallelLayout

T = TypeVar("T")

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 128 + signal.SIGINT
"""Exit codes: the run failed, the input must be changed, the user stopped it."""
FAILURES = "MEGARLHF_FAILURES"
"""Environment variable: the directory in which a launched rank writes why it failed."""
PROGRAM = ("-m", "megarlhf.cli")
"""What Python runs in each rank, before the command line."""
SHUTDOWN_S = 5
"""Seconds that ranks have to leave after one has failed; then they are killed."""
COURTESY_S = 2.0
"""Seconds that a rank which is probably not the cause waits before it speaks, to be stopped first (torchrun, Slurm)."""


def run(
    prepare: Callable[[], T],
    work: Callable[[T], object],
    layout: ParallelLayout,
    argv: Sequence[str],
    *,
    program: Sequence[str] = PROGRAM,
) -> int:
    """Run `work(prepare())` on every rank of `layout` and return the exit code.

    In a process that torchrun, Slurm or this function started, both run here. Otherwise `program ARGV` is started once
    a rank on this machine, after `prepare` has found no fault with the input here; a layout of one rank needs no other
    process.

    Raises:   LayoutError when the ranks present, or the GPUs of this machine, are not those the layout needs.
              KeyboardInterrupt when the user stopped the ranks.
    """
    layout.check()
    _adopt_slurm()
    if "RANK" in os.environ:
        layout.check_world(int(os.environ["WORLD_SIZE"]))
        return _run_rank(lambda: work(prepare()))
    if layout.world_size == 1:
        work(prepare())
        return 0
    gpus = torch.cuda.device_count()
    if 0 < gpus < layout.world_size:
        raise LayoutError(
            f"layout needs {layout.world_size} ranks but this machine has {gpus} GPUs; shrink the layout, or start the "
            "ranks on several machines with torchrun or srun."
        )
    prepare()
    return _start_ranks(layout.world_size, [*program, *argv])


def _start_ranks(ranks: int, command: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="megarlhf-") as directory, _surroundings(ranks, directory):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            shutdown_timeout=SHUTDOWN_S,
            signals_to_handle="SIGINT,SIGHUP,SIGQUIT",  # the others are forwarded
            # Rank 0 speaks for all; what the others say is kept for the case that one of them crashes.
            logs_specs=DefaultLogsSpecs(log_dir=directory, redirects=dict.fromkeys(range(1, ranks), Std.ALL)),
        )
        try:
            with _forwarding(command) as caught:
                elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            for failure in error.failures.values():
                _kill_session(failure.pid)
            obeyed = bool(caught) and -caught[-1] in {failure.exitcode for failure in error.failures.values()}
            # A rank that saved first has left a note of its own, and the launcher's SIGTERM may have hurried others.
            if obeyed and not list(Path(directory).glob("rank_*.json")):
                return _say_stopped(caught[-1])
            return _report_first_failure(error, Path(directory))
        except SignalException as stopped:
            if stopped.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            return _say_stopped(stopped.sigval)
    return 0


def _say_stopped(number: int) -> int:
    _say(f"stopped by {signal.Signals(number).name}.")
    return 128 + number


@contextmanager
def _forwarding(command: Sequence[str]) -> Iterator[list[int]]:
    """Pass SIGTERM and SIGUSR1 on to the ranks, which may first save their state; the list says which came."""
    caught: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        caught.append(number)
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if list(command) == child.cmdline()[1:]:
                    child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _surroundings(ranks: int, failures: str) -> Iterator[None]:
    """The ranks' environment, and silence from the launcher, which would say in twenty lines that a rank has failed."""
    before = dict(os.environ)
    os.environ[FAILURES] = failures
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    # Below errors, torch's C++ tells mostly how the connections to a peer that left were closed.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        os.environ.clear()
        os.environ.update(before)


def _report_first_failure(error: ChildFailedError, directory: Path) -> int:
    """Print why the first rank failed, alone, and return the exit code."""
    began = min(failure.timestamp for failure in error.failures.values())
    # The launcher's own signals are no causes: SIGTERM at once, SIGKILL to those that outlive their time to leave.
    killed = {
        rank: -failure.exitcode
        for rank, failure in error.failures.items()
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and failure.timestamp < began + SHUTDOWN_S - 1
    }
    if killed:
        rank, number = min(killed.items())
        hint = " (often the system is out of memory)" if number == signal.SIGKILL else ""
        name = signal.Signals(number).name
        _say(f"{_last_words(rank, directory)}rank {rank} was killed by {name}{hint}; the other ranks were stopped.")
        return FAILED
    notes = [json.loads(path.read_text()) for path in directory.glob("rank_*.json")]
    if notes:
        first = min(notes, key=lambda note: note["time"])
        _say(first["text"])
        return first["exit_code"]
    rank, failure = error.get_first_failure()
    code = failure.exitcode
    _say(f"{_last_words(rank, directory)}rank {rank} ended with exit code {code}; the other ranks were stopped.")
    return code if code in (BAD_INPUT, RunStopped.exit_code) else FAILED


def _last_words(rank: int, directory: Path) -> str:
    """The end of what a silent rank wrote to standard error; rank 0 has said it on the terminal."""
    logs = directory.glob(f"*/attempt_0/{rank}/stderr.log")
    return "".join(line for log in logs for line in log.read_text(errors="replace").splitlines(keepends=True)[-20:])


def _kill_session(leader: int) -> None:
    """End what a dead rank has left behind, such as the processes that write checkpoints: it led their session."""
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _run_rank(work: Callable[[], object]) -> int:
    try:
        work()
        return 0
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except Exception as error:
        expected = isinstance(error, MegarlhfError)
        text = str(error) if expected else f"rank {os.environ['RANK']} failed:\n{traceback.format_exc()}"
        code = error.exit_code if isinstance(error, MegarlhfError) else FAILED
        if FAILURES in os.environ:
            _note(text, code)
        else:
            # Every rank of a machine finds the same fault with the input; a broken connection is another rank's fault.
            if _is_echo(error) or (expected and os.environ["LOCAL_RANK"] != "0"):
                time.sleep(COURTESY_S)
            _say(text)
        _leave(code)


def _note(text: str, code: int) -> None:
    note = {"time": time.time(), "text": text, "exit_code": code}
    write_whole(Path(os.environ[FAILURES], f"rank_{os.environ['RANK']}.json"), json.dumps(note))


def _is_echo(error: Exception) -> bool:
    """Whether this looks like what a rank sees when another one is gone."""
    lost = re.search(r"connection (closed|reset|refused)|broken pipe|timed out", str(error), re.IGNORECASE)
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and lost is not None)


def is_timeout(error: Exception) -> bool:
    """Whether a collective gave up waiting for a rank."""
    return isinstance(error, RuntimeError) and re.search(r"timed ?out", str(error), re.IGNORECASE) is not None


def _leave(code: int) -> NoReturn:
    """Exit without the interpreter's shutdown, which could wait for collectives that no peer will join."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(code)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _adopt_slurm() -> None:
    """Give a process that srun started the variables torch.distributed reads.

    Only srun sets SLURM_STEP_NUM_TASKS; a batch script itself looks like task 0 of the whole job, and is none.
    """
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env.setdefault("MASTER_ADDR", _first_host(env.get("SLURM_STEP_NODELIST", socket.gethostname())))
    # One port a job, outside the ephemeral range, so that two jobs on a node do not meet.
    env.setdefault("MASTER_PORT", str(20_000 + int(env.get("SLURM_JOB_ID", "0")) % 10_000))


def _first_host(nodes: str) -> str:
    """The host of rank 0 in Slurm's list of nodes: node03 of `node[03-05,9],other`."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    if found is None:
        raise LayoutError(f"SLURM_STEP_NODELIST={nodes!r} names no host; set MASTER_ADDR to the host of rank 0.")
    return "".join(part or "" for part in found.groups())
