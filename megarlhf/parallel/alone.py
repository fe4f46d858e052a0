"""A world of one inside a run of several ranks: what the others' results are compared with."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh, start, stop


def is_first() -> bool:
    """Whether this process is, or will be, rank 0: for the time before there is a mesh to ask."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def alone(*, seed: int) -> Iterator[Mesh]:
    """A mesh of this process alone, gone when the block ends; torchrun's variables are as before then.

    Ranks:    a process has one mesh at a time, so enter before `mesh.start`; the other ranks wait there meanwhile.
    """
    rank = os.environ.pop("RANK", None)  # without it `start` makes a world of its own
    try:
        mesh = start(ParallelLayout(), seed=seed)
        try:
            yield mesh
        finally:
            stop()
    finally:
        if rank is not None:
            os.environ["RANK"] = rank
