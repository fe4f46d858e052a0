"""Checks of what learns: what backward keeps, what travels meanwhile, and where optimiser state is."""

from __future__ import annotations

import importlib.util

import torch

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
    check_state(optim, name, cfg, on_gpu=torch.cuda.is_available())


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


def check_state(optim: OptimConfig, name: str, cfg: RanksConfig, *, on_gpu: bool) -> None:
    """Raise ConfigError where optimiser state cannot be in such formats or such a place."""
    settings = dict(optim)
    low = [each for each in ("exp_avg_dtype", "exp_avg_sq_dtype") if settings[each] != "float32"]
    if low and not optim.precision_aware:
        raise ConfigError(
            f"{name}.{low[0]}={settings[low[0]]} needs the precision-aware optimiser; set {name}.precision_aware=true "
            f"or {name}.{low[0]}=float32."
        )
    asked = [each for each in ("offload_fraction", "precision_aware") if settings[each]]
    if not asked:
        return
    first = f"{name}.{asked[0]}={str(settings[asked[0]]).lower()}"
    usual = f"{name}.{asked[0]}={'0' if asked[0] == 'offload_fraction' else 'false'}"
    if len(asked) == 2:
        raise ConfigError(
            f"{first} with {name}.precision_aware=true: on the host AdamW steps fp32 masters and moments; set "
            f"{name}.precision_aware=false or {usual}."
        )
    if not optim.distributed:
        raise ConfigError(
            f"{first}, which Megatron-Core has for its distributed optimiser alone, but {name}.distributed=false; set "
            f"{name}.distributed=true or {usual}."
        )
    if cfg.compute.dtype == "float32":
        raise ConfigError(
            f"{first} with compute.dtype=float32, whose weights are their own masters; set compute.dtype=bfloat16 or "
            f"{usual}."
        )
    if optim.offload_fraction and cfg.offload == "host":
        raise ConfigError(
            f"{first} with offload=host, which takes all of the state away between phases and brings it back; set "
            f"offload=none or {usual}."
        )
    if not on_gpu or importlib.util.find_spec("transformer_engine") is None:
        raise ConfigError(
            f"{first} needs a GPU and Transformer Engine, whose optimiser Megatron-Core takes there; set {usual}."
        )
