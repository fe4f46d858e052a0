"""Checks of what learns: what backward keeps, what travels meanwhile, and where optimiser state is."""

from __future__ import annotations

from megarlhf.errors import ConfigError
from megarlhf.models.compute import ComputeConfig
from megarlhf.models.optim import OptimConfig
from megarlhf.models.recompute import check_recompute
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.runtime.checks import Model
from megarlhf.runtime.settings import RanksConfig


def check_learner(model: Model, optim: OptimConfig, name: str, cfg: RanksConfig) -> None:
    """Raise LayoutError or ConfigError where a model cannot learn by the run's settings; `name`: that of `optim`."""
    check_recompute(cfg.compute.recompute, model.description.spec, cfg.layout, model.setting)
    check_overlap(cfg.compute, cfg.layout, optim, name)


def check_overlap(compute: ComputeConfig, layout: ParallelLayout, optim: OptimConfig, name: str) -> None:
    """Raise ConfigError where there is nothing that could travel, or nothing for it to overlap with."""
    asked = [each for each in ("overlap_grad_reduce", "overlap_param_gather") if dict(compute)[each]]
    if asked and layout.data == 1:
        raise ConfigError(
            f"compute.{asked[0]}=true overlaps what travels between data ranks, but layout.data=1; set layout.data to "
            f"at least 2, or {' and '.join(f'compute.{each}=false' for each in asked)}."
        )
    if asked == ["overlap_param_gather"]:
        raise ConfigError(
            "compute.overlap_param_gather=true gathers by the buckets of compute.overlap_grad_reduce, which is false; "
            "set both to true or both to false."
        )
    if compute.overlap_param_gather and not optim.distributed:
        raise ConfigError(
            f"compute.overlap_param_gather=true, but {name}.distributed=false leaves every data rank with all of the "
            f"new weights: nothing is gathered; set {name}.distributed=true or compute.overlap_param_gather=false."
        )
