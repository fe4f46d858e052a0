"""The files of a checkpoint as Megatron-Core plans them, written without the processes that it would start for them.

Those die of signals to the process group, and Megatron waits for ever for one that was killed.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megarlhf.parallel.collectives import barrier
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.releases import SAVE_OPTIONS

FORMAT = CheckpointingConfig("torch_dist", 1)
COMMON = "common.pt"
"""Of what is no tensor."""


def planned(state: dict[str, Any], directory: Path, mesh: Mesh) -> Any:
    """What Megatron would have done to write `state`, on this rank; what is no tensor is written now, by rank 0.

    Files are laid out as by `dist_checkpointing.save` up to Megatron-Core 0.18: from 0.19 on what is no tensor would be
    a pickle among the tensors, which older releases do not find and `plain_metadata` does not read.

    Ranks:    collective over the world.
    """
    tensors: Any
    tensors, rest = save_preprocess({**state, "content_metadata": {}})
    if mesh.is_main:
        torch.save(rest, directory / COMMON)
    strategy = TorchDistSaveShardedStrategy(FORMAT.sharded_backend, FORMAT.sharded_backend_version, thread_count=2)
    request: Any = strategy.async_save(tensors, directory, **SAVE_OPTIONS)
    request.finalize_fns.append(lambda: mesh.is_main and save_config(FORMAT, str(directory)))
    request.finalize_fns.append(lambda: barrier(mesh))
    return request


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
