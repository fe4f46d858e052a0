"""What every command that builds models does with its settings: check the input, start the ranks, go to work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from megarlhf.parallel import launch
from megarlhf.parallel.mesh import Mesh, start, stop
from megarlhf.runtime.models_named import check_same_models, taken, with_models
from megarlhf.runtime.said import say
from megarlhf.runtime.settings import RanksConfig

Cfg = TypeVar("Cfg", bound=RanksConfig)
Inputs = TypeVar("Inputs")


def for_started_ranks(cfg: Cfg) -> Cfg:
    """`cfg` with its layout for the ranks that a launcher has started. Raises LayoutError where it fits none such."""
    return cfg.model_copy(update={"layout": launch.fitted(cfg.layout)})


def on_ranks(
    cfg: Cfg, argv: Sequence[str], prepare: Callable[[Cfg], Inputs], work: Callable[[Cfg, Inputs, Mesh], object]
) -> int:
    """`work` on every rank of `cfg.layout`, with what `prepare` has read and checked there; return the exit code.

    Runs and states that name models are those models from here on.

    argv: the command line, for the ranks that are started here. Raises: as `launch.run`, and what `prepare` raises.
    """

    asked = cfg.layout.data
    cfg = for_started_ranks(cfg)
    found = with_models(cfg)

    def on_this_rank(inputs: Inputs) -> None:
        mesh = start(cfg.layout, seed=cfg.seed, timeout_s=cfg.timeout_s)
        check_same_models(found, mesh)
        if cfg.layout.data != asked:
            say([f"layout.data={asked} -> {cfg.layout.data}, for {cfg.layout.world_size} ranks (layout.elastic)"], mesh)
        say(taken(cfg, found), mesh)
        work(found, inputs, mesh)
        stop()  # or the interpreter, in an order of its own, would take down groups whose threads still run

    overlaps = cfg.compute.overlap_grad_reduce
    return launch.run(lambda: prepare(found), on_this_rank, cfg.layout, argv, overlaps=overlaps)
