"""A made-up command for the tests of launching: `python -m tests.helpers.launched BEHAVIOUR RANKS DIRECTORY`.

Every rank says that it is there with a file DIRECTORY/rank_N, then behaves.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from megarlhf.errors import DataError, MegarlhfError, TrainingError
from megarlhf.parallel import launch
from megarlhf.parallel.collectives import all_reduce, barrier
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh, start


def main(behaviour: str, ranks: int, directory: Path) -> int:
    def prepare() -> str:
        if behaviour == "bad_before":
            raise DataError("found before ranks: 1 fault; mend it.")
        return behaviour

    def work(behaviour: str) -> None:
        mesh = start(ParallelLayout(data=ranks), seed=1, timeout_s=60)
        (directory / f"rank_{mesh.rank}").touch()
        barrier(mesh)
        behave(behaviour, mesh)

    arguments = [behaviour, str(ranks), str(directory)]
    try:
        return launch.run(prepare, work, ParallelLayout(data=ranks), arguments)
    except MegarlhfError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def behave(behaviour: str, mesh: Mesh) -> None:
    if mesh.rank == 1:
        print("rank 1 talks")
        warnings.warn("rank 1 warns", stacklevel=1)
    if behaviour == "works":
        total = float(all_reduce(torch.tensor([2.0**mesh.rank]), mesh, "world"))
        print(f"rank {mesh.rank} sums to {total}")
        return
    if behaviour == "all_bad":
        raise DataError("found in ranks: 2 faults; mend them.")
    if mesh.rank == 1:
        fail(behaviour)
    all_reduce(torch.ones(1), mesh, "world")


def fail(behaviour: str) -> None:
    """What rank 1 does while the others wait for it in a collective."""
    match behaviour:
        case "raises":
            raise ArithmeticError("the cause")
        case "bad_input":
            raise DataError("found in a rank: 1 fault; mend it.")
        case "stops":
            raise TrainingError("10 steps were skipped; lower the rate.")
        case "exits":
            os.write(2, b"last words\n")
            sys.exit(3)
        case "aborts":
            os.write(2, b"last words\n")
            os.abort()
        case "killed":
            # A process beside the rank, as Megatron's checkpoint writer has one.
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            os.kill(os.getpid(), signal.SIGKILL)
        case "hangs":
            time.sleep(600)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
