"""What every command that builds models does with its settings: check the input, start the ranks, go to work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from megarlhf.parallel import launch
from megarlhf.parallel.mesh import Mesh, start, stop
from megarlhf.runtime.settings import RanksConfig

Cfg = TypeVar("Cfg", bound=RanksConfig)
Inputs = TypeVar("Inputs")


def on_ranks(
    cfg: Cfg, argv: Sequence[str], prepare: Callable[[Cfg], Inputs], work: Callable[[Cfg, Inputs, Mesh], object]
) -> int:
    """`work` on every rank of `cfg.layout`, with what `prepare` has read and checked there; return the exit code.

    argv: the command line, for the ranks that are started here. Raises: as `launch.run`, and what `prepare` raises.
    """

    def on_this_rank(inputs: Inputs) -> None:
        work(cfg, inputs, start(cfg.layout, seed=cfg.seed, timeout_s=cfg.timeout_s))
        stop()  # or the interpreter, in an order of its own, would take down groups whose threads still run

    return launch.run(lambda: prepare(cfg), on_this_rank, cfg.layout, argv)
