"""torchrun for runs that stop and go on: `python -m megarlhf.parallel.torchrun`, with torchrun's own arguments.

torchrun dies of SIGUSR1, leaves its ranks 30 s after SIGTERM, and ends with 1 however they ended. This one hands both
signals to its ranks and waits while they save, and ends with the code of the first of them that ended: 75 where the
same command goes on. In a task of Slurm it knows by itself which node it is.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

HANDED_ON = (signal.SIGTERM, signal.SIGUSR1)
OWN = "SIGINT,SIGHUP,SIGQUIT"
"""Signals that torchrun keeps: it ends its ranks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start the ranks of this node and wait for them; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "SLURM_NODEID" in os.environ and not any(word.replace("_", "-").startswith("--node-rank") for word in words):
        words = [f"--node-rank={os.environ['SLURM_NODEID']}", *words]
    for number in HANDED_ON:
        signal.signal(number, _hand_on)
    try:
        run.main([f"--signals_to_handle={OWN}", *words])
    except ChildFailedError as failed:
        code = failed.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code
    return 0


def _hand_on(number: int, _: FrameType | None) -> None:
    for rank in psutil.Process().children():
        try:
            rank.send_signal(number)
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue


if __name__ == "__main__":
    sys.exit(main())
