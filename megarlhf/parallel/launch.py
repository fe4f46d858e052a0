"""Start a run on its ranks: those of torchrun or Slurm where they exist, else torch's elastic launcher on this machine.

The first rank that fails is the one the user hears about. Each rank writes its failure, with the time, to a directory
of the launcher; the ranks that fall over after it only because their peer is gone stay silent.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megarlhf.errors import LayoutError, MegarlhfError
from megarlhf.parallel.layout import ParallelLayout

T = TypeVar("T")

BAD_INPUT = 2
"""Exit code of a run that stopped because of what the user gave it."""
FAILURES = "MEGARLHF_FAILURES"
"""Environment variable: the directory in which a launched rank writes why it failed."""


def run(prepare: Callable[[], T], work: Callable[[T], object], layout: ParallelLayout, argv: Sequence[str]) -> int:
    """Run `work(prepare())` on every rank of `layout` and return the exit code.

    In a process that torchrun, Slurm or this function started, both run here. Otherwise `megarlhf ARGV` is started once
    a rank on this machine, after `prepare` has found no fault with the input here; a layout of one rank needs no other
    process.

    Raises:   LayoutError when the ranks present, or the GPUs of this machine, are not those the layout needs.
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
    return _start_ranks(layout.world_size, argv)


def _start_ranks(ranks: int, argv: Sequence[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="megarlhf-") as directory:
        os.environ[FAILURES] = directory
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=0.1,
            shutdown_timeout=5,
            logs_specs=DefaultLogsSpecs(log_dir=directory),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "megarlhf.cli", *argv)
        except ChildFailedError as error:
            return _report_first_failure(error, Path(directory))
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
        finally:
            os.environ.pop(FAILURES, None)
    return 0


def _report_first_failure(error: ChildFailedError, directory: Path) -> int:
    """Print why the first rank failed, alone, and return the exit code."""
    killed = {
        rank: -f.exitcode for rank, f in error.failures.items() if f.exitcode < 0 and f.exitcode != -signal.SIGTERM
    }
    notes = [json.loads(path.read_text()) for path in directory.glob("rank_*.json")]
    if killed:
        rank, number = min(killed.items())
        name = signal.Signals(number).name
        hint = " (often the system is out of memory)" if number == signal.SIGKILL else ""
        print(f"rank {rank} was killed by {name}{hint}; the other ranks were stopped.", file=sys.stderr)
        return 1
    if not notes:
        rank, failure = error.get_first_failure()
        print(f"rank {rank} ended with exit code {failure.exitcode}; the other ranks were stopped.", file=sys.stderr)
        return 1
    first = min(notes, key=lambda note: note["time"])
    print(first["text"], file=sys.stderr)
    return first["exit_code"]


def _run_rank(work: Callable[[], object]) -> int:
    try:
        work()
        return 0
    except Exception as error:
        bad_input = isinstance(error, MegarlhfError)
        rank = os.environ["RANK"]
        text = str(error) if bad_input else f"rank {rank} failed:\n{traceback.format_exc()}"
        code = BAD_INPUT if bad_input else 1
        directory = os.environ.get(FAILURES)
        if directory is None:
            # Under torchrun or Slurm every rank speaks for itself; bad input is the same on all of a machine's.
            if not bad_input or os.environ["LOCAL_RANK"] == "0":
                print(text, file=sys.stderr, flush=True)
        else:
            note = {"time": time.time(), "text": text, "exit_code": code}
            partial = Path(directory, f"rank_{rank}.tmp")
            partial.write_text(json.dumps(note))
            partial.rename(partial.with_suffix(".json"))
        # Without the interpreter's shutdown, which could wait for collectives that no peer will join.
        sys.stderr.flush()
        os._exit(code)


def _adopt_slurm() -> None:
    """Give a process that srun started the variables torch.distributed reads."""
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_NTASKS", "1")) == 1 or "SLURM_PROCID" not in env:
        return
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_NTASKS"], env["SLURM_LOCALID"]
    env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", socket.gethostname()))
    # One port a job, outside the ephemeral range, so that two jobs on a node do not meet.
    env.setdefault("MASTER_PORT", str(20_000 + int(env.get("SLURM_JOB_ID", "0")) % 10_000))
