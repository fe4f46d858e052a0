"""Saving on many ranks to a disk that may be full: known before where it can be, and said once where not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException

from megarlhf.errors import MegarlhfError, OutputError
from megarlhf.observe.files import free_bytes, remedy, size_text
from megarlhf.parallel.collectives import on_main
from megarlhf.parallel.mesh import Mesh

WRITER = re.compile(r"PytorchStreamWriter|iostream error|unexpected pos|Worker failure|No space left|File too large")
"""How torch's writers say that the disk took less than they gave it: as RuntimeError, without a cause."""
ROOM = 1.05
"""Free disk space that a save needs, in multiples of its numbers: names, types and alignment come on top."""


def check_room(directory: Path, numbers: int, what: str, mesh: Mesh, error: type[MegarlhfError] = OutputError) -> None:
    """Raise `error`, on every rank, where `numbers` bytes of tensors, over all ranks, do not fit in `directory`.

    Ranks:    collective over the mesh; rank 0 looks. The directory need not be there yet.
    """
    needed = int(ROOM * numbers)

    def look() -> None:
        there = next(path for path in (directory, *directory.absolute().parents) if path.is_dir())
        free = free_bytes(there)
        if free < needed:
            raise error(
                f"{directory}: no room for {what}: {size_text(needed)} are needed and {size_text(free)} are free; "
                "make room, or name a directory on a larger disk."
            )

    on_main(look, mesh)


@contextmanager
def saving(directory: Path) -> Iterator[None]:
    """Inside, Megatron or torch write to `directory`.

    Raises:   OutputError with the cause and the room that is left, where the disk refuses.
    """
    try:
        yield
    except CheckpointException as error:  # no Exception; holds those of the ranks that failed
        raise OutputError(f"{directory} cannot be written ({causes(error)}); {remedy(directory)}.") from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not WRITER.search(str(error)):
            raise
        raise OutputError(f"{directory} cannot be written ({_first_line(error)}); {remedy(directory)}.") from None


def causes(error: CheckpointException) -> str:
    """Which rank says what."""
    failures: dict[int, Any] = error.failures
    return "; ".join(f"rank {rank}: {_first_line(cause[0])}" for rank, cause in failures.items())


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
