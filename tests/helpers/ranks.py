"""Run a function on N real ranks: gloo processes on a CPU, NCCL where there are GPUs enough.

Ranks are processes that stay up between calls, forked off a server that has imported everything. A call that fails or
hangs ends them all, and the next call starts fresh ones. Some have a stand-in for Transformer Engine.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.multiprocessing as mp

TIMEOUT_S = 240
GRACE_S = 5


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the message holds its traceback."""


def forking() -> ForkServerContext:
    """Processes that start at once, off a server that has imported what trains and what these tests call."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["megarlhf.trainers.ppo", "megarlhf.trainers.reward", "tests.helpers.ranks"])
    return context


class Rank:
    """One process that waits for functions to call as some rank."""

    def __init__(self, with_engine: bool, on_cpu: bool) -> None:
        # Megatron-Core looks for Transformer Engine when it is imported: those with the stand-in import by themselves.
        context = mp.get_context("spawn") if with_engine else forking()
        self.pipe, theirs = context.Pipe()
        # Not a daemon: those may not have children, and saving a checkpoint starts some.
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, with_engine, on_cpu))
        self.process.start()
        theirs.close()  # so that a dead process reads as end of file


_ranks: defaultdict[tuple[bool, bool], list[Rank]] = defaultdict(list)
"""By whether they have the stand-in for Transformer Engine, and whether GPUs are hidden from them."""


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Call the module-level `function(*args)` on `ranks` ranks and return what each returned, in rank order.

    A function builds its own mesh (`parallel.mesh.start`); it is taken down after the call. The first rank that fails
    raises here with its traceback. Results cross a pipe: numbers, strings, CPU tensors.
    """
    return _run(False, ranks > torch.cuda.device_count(), function, ranks, args)


def run_with_engine(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """As `run_ranks`, where `tests/helpers/engine_stand_in.py` stands for Transformer Engine."""
    return _run(True, True, function, ranks, args)


def _run(with_engine: bool, on_cpu: bool, function: Callable[..., Any], ranks: int, args: tuple[Any, ...]) -> list[Any]:
    pool = _ranks[with_engine, on_cpu]
    while len(pool) < ranks:
        pool.append(Rank(with_engine, on_cpu))
    port = _free_port()
    members = pool[:ranks]
    for rank, member in enumerate(members):
        member.pipe.send((function, rank, ranks, port, args))
    try:
        return _collect([member.pipe for member in members])
    except BaseException:
        stop_ranks()
        raise


def stop_ranks() -> None:
    """End all rank processes; the next `run_ranks` starts new ones."""
    every = [rank for pool in _ranks.values() for rank in pool]
    for rank in every:
        rank.pipe.close()  # an idle rank leaves by itself, and takes the processes it started with it
    for rank in every:
        rank.process.join(timeout=GRACE_S)
        rank.process.kill()
    _ranks.clear()


atexit.register(stop_ranks)


def _collect(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    deadline = time.monotonic() + TIMEOUT_S
    while waiting:
        ready = wait(list(waiting.values()), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailedError(f"ranks {sorted(waiting)} did not finish within {TIMEOUT_S} s")
        for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
            results[rank] = _receive(rank, waiting.pop(rank))
    return [results[rank] for rank in range(len(pipes))]


def _receive(rank: int, pipe: Connection) -> Any:
    try:
        ok, value = pipe.recv()
    except EOFError:
        raise RankFailedError(f"rank {rank} died without a word") from None
    if not ok:
        raise RankFailedError(f"rank {rank} failed:\n{value}")
    return value


def _serve(pipe: Connection, with_engine: bool, on_cpu: bool) -> None:
    torch.set_num_threads(1)
    if on_cpu:  # before anything asks for GPUs
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if with_engine:
        from tests.helpers import engine_stand_in

        engine_stand_in.install()
    while True:
        try:
            function, rank, ranks, port, args = pipe.recv()
        except EOFError:  # the test session has ended
            return
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        for name in [name for name in os.environ if name.startswith("NVTE_")]:
            del os.environ[name]  # Megatron set them for the layers of the call before
        try:
            pipe.send((True, function(*args)))
            _leave()
        except BaseException:  # noqa: BLE001 (whatever it is, the parent must hear of it)
            pipe.send((False, traceback.format_exc()))


def _leave() -> None:
    from megarlhf.parallel.mesh import stop

    if torch.distributed.is_initialized():
        stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
