"""Start a run on its ranks: those of torchrun or Slurm where they exist, else processes of our own on this machine."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from megarlhf.errors import FAILED, INTERRUPTED, LayoutError, MegarlhfError, RunFinished, RunStopped, complain
from megarlhf.parallel import local_ranks
from megarlhf.parallel.environment import settle
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.local_ranks import COURTESY_S, FAILURES, LAUNCHER, exit_code, is_echo
from megarlhf.parallel.mesh import leave
from megarlhf.parallel.processes import end_helpers, end_with_parent

T = TypeVar("T")

PROGRAM = ("-m", "megarlhf.cli")
"""What Python runs in each rank, before the command line."""
ONE_MACHINE = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_NODEID", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "MASTER_PORT")
"""Environment variables that the ranks of one run on one machine have in common, and no others."""


def run(
    prepare: Callable[[], T],
    work: Callable[[T], object],
    layout: ParallelLayout,
    argv: Sequence[str],
    *,
    overlaps: bool = False,
) -> int:
    """Run `work(prepare())` on every rank of `layout` and return the exit code.

    In a process that torchrun, Slurm or this function started, both run here. Otherwise this program is started once a
    rank on this machine, after `prepare` has found no fault with the input here; a layout of one rank needs no other
    process.

    overlaps: collectives of the data ranks run beside kernels.
    Raises:   LayoutError when the ranks present, or the GPUs of this machine, are not those the layout needs.
              KeyboardInterrupt when the user stopped the ranks.
    """
    if LAUNCHER in os.environ:
        end_with_parent(int(os.environ[LAUNCHER]))
    layout.check()
    settle(layout, overlaps=overlaps)
    _adopt_slurm()
    if "RANK" in os.environ:
        layout.check_world(int(os.environ["WORLD_SIZE"]))
        return _run_rank(lambda: work(prepare()))
    if layout.world_size == 1:
        try:
            work(prepare())
        except BaseException:
            end_helpers()  # nobody waits for what they write
            leave()  # this process may start another run
            raise
        return 0
    gpus = torch.cuda.device_count()
    if 0 < gpus < layout.world_size:
        raise LayoutError(
            f"layout needs {layout.world_size} ranks but this machine has {gpus} GPUs; shrink the layout, start the "
            "ranks on several machines with torchrun or srun, or set CUDA_VISIBLE_DEVICES= (to nothing) to run on the "
            "CPU."
        )
    prepare()
    return local_ranks.start_ranks(layout.world_size, _program(argv))


def fitted(layout: ParallelLayout) -> ParallelLayout:
    """`layout` for the ranks that a launcher has started, where one has. Raises LayoutError where it fits none such."""
    _adopt_slurm()
    return layout.fitted(int(os.environ["WORLD_SIZE"])) if "RANK" in os.environ else layout


def _program(argv: Sequence[str]) -> list[str]:
    """What Python runs in each rank: the command line, or the user's own program that was started with `argv`."""
    own, rest = Path(sys.argv[0]).name not in ("megarlhf", "cli.py"), sys.argv[1:]
    if own and (list(argv) == sys.argv or list(argv)[-len(rest) :] == rest):
        return sys.orig_argv[1:]
    return [*PROGRAM, *argv]


def _run_rank(work: Callable[[], object]) -> int:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked by our own launcher
        work()
        return 0
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except SystemExit as ended:
        _leave(ended.code if isinstance(ended.code, int) else FAILED)
    except Exception as error:
        fail(error)


def fail(error: Exception) -> NoReturn:
    """End this rank: the user hears why, from the rank that failed first, and from one of those that say the same."""
    expected = isinstance(error, MegarlhfError)
    trace = "".join(traceback.format_exception(error)).rstrip()
    text = str(error) if expected else f"rank {os.environ.get('RANK', '0')} failed:\n{trace}"
    if FAILURES in os.environ:
        local_ranks.note(error, text, Path(os.environ[FAILURES]))
    else:
        if is_echo(error):
            time.sleep(COURTESY_S)
        # A stop is every rank's; with the input, the ranks of a machine find the same fault.
        if not isinstance(error, RunStopped | RunFinished) or os.environ.get("RANK", "0") == "0":
            _say_once(text)
    _leave(exit_code(error))


def _say_once(text: str) -> None:
    """Say what other ranks of this machine may have to say too: one does, and holds a name while the others look."""
    job = [os.environ.get(name, "") for name in ONE_MACHINE]
    name = hashlib.sha256("\n".join([*job, text]).encode()).hexdigest()
    with socket.socket(socket.AF_UNIX) as held:
        try:
            held.bind(f"\0megarlhf-{name}")
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return
        complain(text)
        time.sleep(COURTESY_S if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0)


def is_timeout(error: Exception) -> bool:
    """Whether a collective gave up waiting for a rank."""
    return isinstance(error, RuntimeError) and re.search(r"timed ?out", str(error), re.IGNORECASE) is not None


def _leave(code: int) -> NoReturn:
    """Exit without the interpreter's shutdown, which could wait for collectives that no peer will join."""
    sys.stdout.flush()
    sys.stderr.flush()
    end_helpers()
    os._exit(code)


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
