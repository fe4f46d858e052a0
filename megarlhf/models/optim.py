"""AdamW on Megatron-Core: settings, learning-rate schedule, and a step that no non-finite number can pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from pydantic import Field

from megarlhf.config import Config
from megarlhf.config.base import FreeToChange
from megarlhf.errors import ConfigError
from megarlhf.models.compute import Compute
from megarlhf.parallel.mesh import Mesh

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class OptimConfig(Config):
    """AdamW and its schedule."""

    lr: Annotated[float, FreeToChange(said=True)] = Field(default=3e-6, gt=0)
    """Peak learning rate, per optimiser step. Source: 3e-6 in Huang et al. 2024."""
    min_lr: Annotated[float, FreeToChange(said=True)] = Field(default=0.0, ge=0)
    """Learning rate at the end of the schedule, per optimiser step; 0 decays to nothing."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the decay from lr to min_lr. Source: linear in Huang et al. 2024."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimiser steps over which the learning rate rises from 0 to lr; fewer than the run has."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (Loshchilov and Hutter 2019), on matrices only, times lr per step."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment, per step. Source: Kingma and Ba 2015."""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment, per step. Source: 0.95 in Touvron et al. 2023 (Llama 2)."""
    eps: float = Field(default=1e-5, gt=0)
    """Added to the root of the second moment. Source: Huang et al. 2024."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """A gradient of a larger norm, over all weights, is scaled down to it. Source: Touvron et al. 2023 (Llama 2)."""
    distributed: bool = True
    """Shard optimiser state over data ranks (Megatron's distributed optimizer, ZeRO stage 1)."""
    offload_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of the weights whose masters and moments stay on the host, where AdamW steps them; the others stay on the
    GPU, between phases too. In place of offload=host; needs a GPU. Source: Megatron-Core's optimizer_offload_fraction.
    """
    precision_aware: bool = False
    """Keep of fp32 masters only what bfloat16 weights lack of them, and moments in the formats below. Needs Transformer
    Engine's FusedAdam. Source: Megatron-Core's use_precision_aware_optimizer."""
    exp_avg_dtype: Literal["float32", "bfloat16"] = "float32"
    """Format of the first moment; another than float32 with precision_aware. Source: bfloat16 in DeepSeek-AI 2024."""
    exp_avg_sq_dtype: Literal["float32", "bfloat16"] = "float32"
    """Format of the second moment; likewise."""

    def check(self, steps: int, name: str) -> None:
        """Raise ConfigError unless a run of `steps` optimiser steps can follow this schedule."""
        if self.warmup_steps >= steps:
            raise ConfigError(
                f"{name}.warmup_steps={self.warmup_steps} is not less than the run's {steps} optimiser steps; "
                f"set {name}.warmup_steps below {steps}."
            )
        if self.min_lr > self.lr:
            raise ConfigError(f"{name}.min_lr={self.min_lr} exceeds {name}.lr={self.lr}; lower {name}.min_lr.")


def ddp_config(config: OptimConfig, compute: Compute) -> DistributedDataParallelConfig:
    """How gradients and weights travel between data ranks: in buckets of Megatron's size where something overlaps."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.distributed,
        overlap_grad_reduce=compute.overlap_grad_reduce,
        overlap_param_gather=compute.overlap_param_gather,
    )


def megatron_optimizer(config: OptimConfig, dtype: torch.dtype, fp8_recipe: str | None) -> OptimizerConfig:
    """Megatron's configuration of AdamW. Raises RuntimeError where Transformer Engine is wanted and missing."""
    return OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.distributed,
        fp8_recipe=fp8_recipe,
        # The hybrid optimiser takes gradients where the precision-aware one has them.
        use_precision_aware_optimizer=config.precision_aware or config.offload_fraction > 0,
        exp_avg_dtype=FORMATS[config.exp_avg_dtype],
        exp_avg_sq_dtype=FORMATS[config.exp_avg_sq_dtype],
        optimizer_cpu_offload=config.offload_fraction > 0,
        optimizer_offload_fraction=config.offload_fraction,
        overlap_cpu_optimizer_d2h_h2d=config.offload_fraction > 0,
    )


def build_optimizer(config: OptimConfig, chunks: Sequence[Any], compute: Compute, mesh: Mesh) -> MegatronOptimizer:
    """Megatron's AdamW over DDP-wrapped `chunks`."""
    megatron = megatron_optimizer(config, compute.dtype, compute.fp8_recipe if compute.fp8 else None)
    optimizer = get_megatron_optimizer(megatron, list(chunks), use_gloo_process_groups=False, pg_collection=mesh.groups)
    for inner in torch_optimizers(optimizer):
        # Megatron takes torch's AdamW where Transformer Engine and Apex are missing, and leaves it unfused.
        for group in inner.param_groups if isinstance(inner, torch.optim.AdamW) else ():
            group["fused"] = True
    return optimizer


def torch_optimizers(optimizer: Any) -> list[torch.optim.Optimizer]:
    """What does the arithmetic inside Megatron's optimiser: of the hybrid one all of its parts."""
    found: list[torch.optim.Optimizer] = []
    for chained in optimizer.chained_optimizers:
        inner = chained.optimizer
        found += inner.sub_optimizers if isinstance(inner, HybridDeviceOptimizer) else [inner]
    return found


def build_schedule(config: OptimConfig, optimizer: MegatronOptimizer, steps: int) -> OptimizerParamScheduler:
    """The learning rate over a run of `steps` optimiser steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        # A run may go on with another rate; whatever else differs was refused.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def restore_schedule(schedule: OptimizerParamScheduler, state: dict[str, Any], config: OptimConfig) -> None:
    """Go on at the step of `state`, with the rates of `config`, which the optimiser's groups have from their state."""
    groups: Any = schedule.optimizer.param_groups
    for group in groups:
        group["max_lr"], group["min_lr"] = config.lr, config.min_lr
    schedule.load_state_dict(state)


@torch.no_grad()
def guarded_step(optimizer: MegatronOptimizer, loss: float, max_grad_norm: float) -> tuple[float, bool]:
    """Clip and step, unless the loss or the gradient is not finite; then the weights stay as they are.

    Ranks:    collective over the model and, with the distributed optimizer, the data ranks. The norm is the same number
              on each of them, so all step or all skip.
    Returns:  the gradient norm before clipping, and whether the step was taken.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm) or not math.isfinite(loss):
        return norm, False
    parameters: list[Any] = optimizer.get_parameters()
    chained: Any = optimizer
    aware = chained.chained_optimizers[0].config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    clip_grad_by_total_norm_fp32(parameters, max_grad_norm, norm, use_decoupled_grad=aware)
    return norm, bool(optimizer.step_with_ready_grads())
