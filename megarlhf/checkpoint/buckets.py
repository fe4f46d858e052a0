"""The files of a checkpoint as Megatron-Core plans them, written without the processes that it would start for them.

Those die of signals to the process group, and Megatron waits for ever for one that was killed.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megarlhf.parallel.collectives import barrier
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.releases import SAVE_OPTIONS


def planned(state: dict[str, Any], directory: Path) -> Any:
    """What Megatron would have done to write `state`, on this rank; none of it is written yet.

    Ranks:    collective over the world.
    """
    return dist_checkpointing.save(state, str(directory), content_metadata={}, async_sharded_save=True, **SAVE_OPTIONS)


def write_now(request: Any, mesh: Mesh) -> None:
    """Write and complete the files of `request`, as planned.

    Ranks:    collective over the mesh. Raises CheckpointException on every rank where one could not write.
    """
    written = [] if request.async_fn is None else [write_buckets(request, on_host(request))]
    barrier(mesh)
    complete(request, written)


def on_host(request: Any) -> list[Any]:
    """What this rank writes, one bucket a file; what a GPU holds of it, on the host."""
    return request.async_fn_args[1] if request.preload_fn is None else request.preload_fn()


def write_buckets(request: Any, buckets: list[Any]) -> dict[int, Any] | Exception:
    """What Megatron's writer says of its files, or why one failed; they are written by threads of this process."""
    transforms = request.async_fn.args[0]
    results: Any = queue.SimpleQueue()  # Megatron puts (index, what it wrote or why not)

    def write(index: int) -> None:
        counts: Any = queue.Queue()
        counts.put(index)
        FileSystemWriterAsync.write_preloaded_data(transforms, index, buckets[index], results, counts, True)

    with ThreadPoolExecutor(len(buckets)) as pool:
        list(pool.map(write, range(len(buckets))))
    written = dict(results.get() for _ in buckets)
    return next((result for result in written.values() if isinstance(result, Exception)), written)


def complete(request: Any, written: Iterable[Any]) -> None:
    """Complete the files once every rank has written its own; `written` is what this one wrote, if anything.

    Ranks:    collective over the world. Raises CheckpointException on every rank where one could not write.
    """
    for word in written:
        request.async_fn_args[2].put(word)  # where Megatron looks for it
    for finalize in request.finalize_fns:
        finalize()
