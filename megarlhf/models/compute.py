"""Which implementation each part uses on this machine, chosen in one place and said once."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from megarlhf.config import Config
from megarlhf.errors import ConfigError
from megarlhf.models.recompute import Recompute
from megarlhf.parallel.cpu import OLDEST_FLASH_ATTENTION, has_flash_attention
from megarlhf.parallel.layout import FP8_MULTIPLES, fp8_multiple
from megarlhf_kernels.dispatch import OVERRIDE, missing, use_triton

FP8_CAPABILITY = {"current": (8, 9), "blockwise": (9, 0)}
"""Of the GPU, by recipe. Source: Transformer Engine."""
APEX_KERNEL = "fused_weight_gradient_mlp_cuda"
MEGATRON_RECIPES: dict[str, Literal["tensorwise", "blockwise"]] = {"current": "tensorwise", "blockwise": "blockwise"}
ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""By these Transformer Engine chooses its attention; Megatron-Core sets all to 1 for its layers, to 0 for others."""


class ComputeConfig(Config):
    """Number formats and implementations; `auto` picks the fastest that this machine has."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations: auto is bfloat16 on a GPU and float32 on a CPU. Losses are always float32."""
    layers: Literal["auto", "transformer_engine", "local"] = "auto"
    """Transformer layers: NVIDIA Transformer Engine's, or Megatron-Core's plain torch ones with SDPA attention."""
    fp8: Literal["off", "hybrid", "e4m3"] = "off"
    """Transformer Engine FP8 format of the matrix multiplications; needs transformer_engine layers and a GPU of compute
    capability 8.9 (an H100 has 9.0). Micro-batches are padded to the sizes that such products take."""
    fp8_recipe: Literal["current", "delayed", "blockwise"] = "current"
    """How FP8 numbers are scaled. `current`: one scale a tensor, of the numbers at hand. `blockwise`: one for 128 of a
    row and for 128 x 128 of a weight, from a Hopper GPU on (DeepSeek-AI 2024). `delayed`, of numbers before, is
    refused: that is state, which sampling, scoring and a resume would not share. Source: Megatron-Core's fp8_recipe
    (current: tensorwise)."""
    fp8_shadow_iterations: int = Field(default=1, ge=0)
    """First iterations of a policy's run with FP8 after which the rollouts' log-probs are computed in bfloat16 too, by
    the same weights; how far they are apart is logged."""
    fp8_shadow_bound: float = Field(default=0.1, gt=0)
    """Mean distance of these log-probs, in nats a token, beyond which the run stops. Source: none; half of what
    clip_range lets a ratio move."""
    recompute: Recompute = "none"
    """What backward computes again instead of having it kept; changes no result. `selective`: every layer's MLP, two
    thirds of what a layer keeps, for a quarter more work, and less the longer rows are. `full`: all of every layer but
    its input, a third more work. A number: the same of so many layers of each pipeline stage, or chunk of one. Source:
    Korthikanti et al. 2022; Megatron-Core's recompute_granularity, with modules=[mlp], method=block."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data ranks bucket by bucket, while backward makes the others; changes no result but the
    order of sums. Takes a gradient of the vocabulary projection more. Source: Megatron-Core's argument of that name."""
    overlap_param_gather: bool = False
    """Gather a step's new weights bucket by bucket, while the next step's forward uses the others. Needs
    overlap_grad_reduce and distributed optimisers. Source: Megatron-Core's argument of that name."""
    tp_comm_overlap: bool = False
    """Refused: Transformer Engine's user buffers, over which tensor ranks would exchange while they multiply, have one
    size, and micro-batches are as long as their rows. Source: Megatron-Core's argument of that name."""
    gradient_accumulation_fusion: bool = False
    """Add a weight's gradient to its fp32 buffer in the product that makes it. Needs Transformer Engine's layers, or
    Apex with fused_weight_gradient_mlp_cuda. Source: Megatron-Core's argument of that name."""
    cuda_graphs: bool = False
    """Capture the decode steps of rollouts, and nothing else, as CUDA graphs; needs a GPU."""

    @property
    def fp8_multiple(self) -> int:
        """Of what sides of products are multiples; 1 without FP8."""
        return 1 if self.fp8 == "off" else FP8_MULTIPLES[MEGATRON_RECIPES.get(self.fp8_recipe, "tensorwise")]


@dataclass(frozen=True)
class Choice:
    """One part of the run, what implements it, and why."""

    part: str
    implementation: str
    reason: str


@dataclass(frozen=True)
class Compute:
    """A ComputeConfig resolved on this machine."""

    dtype: torch.dtype
    transformer_engine: bool
    fp8: Literal["hybrid", "e4m3"] | None
    fp8_recipe: Literal["tensorwise", "blockwise"]
    """As Megatron-Core calls it."""
    recompute: Recompute
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    gradient_accumulation_fusion: bool
    cuda_graphs: bool
    choices: tuple[Choice, ...]

    @property
    def fp8_multiple(self) -> int:
        """Of what sides of products are multiples; 1 without FP8."""
        return fp8_multiple(self.fp8, self.fp8_recipe)


def resolve(config: ComputeConfig, device: torch.device) -> Compute:
    """Decide every `auto`, and refuse what this machine cannot do.

    Raises:   ConfigError naming the setting, what it needs, and the remedy.
    """
    gpu = device.type == "cuda"
    engine = gpu and importlib.util.find_spec("transformer_engine") is not None
    if config.layers == "transformer_engine" and not engine:
        raise ConfigError(
            "compute.layers=transformer_engine needs a GPU and the package transformer-engine, "
            f"but the device is {device.type}; see docs/install.md, or set compute.layers=auto."
        )
    use_engine = engine and config.layers != "local"
    _check_fp8(config, device, use_engine)
    _check_fusions(config, device, use_engine)
    _check_attention_variables("1" if use_engine else "0")
    if config.cuda_graphs and not gpu:
        raise ConfigError("compute.cuda_graphs=true needs a GPU; set compute.cuda_graphs=false.")
    dtype = _dtype(config, gpu)
    return Compute(
        dtype=dtype,
        transformer_engine=use_engine,
        fp8=None if config.fp8 == "off" else config.fp8,
        fp8_recipe=MEGATRON_RECIPES.get(config.fp8_recipe, "tensorwise"),
        recompute=config.recompute,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        gradient_accumulation_fusion=config.gradient_accumulation_fusion,
        cuda_graphs=config.cuda_graphs,
        choices=_choices(config, device, use_engine, dtype),
    )


def _check_fusions(config: ComputeConfig, device: torch.device, engine: bool) -> None:
    """Raise ConfigError where what would be done in one has nothing to do it."""
    if config.tp_comm_overlap:
        raise ConfigError(
            "compute.tp_comm_overlap=true exchanges over Transformer Engine's user buffers, which have one size, while "
            "micro-batches are as long as their longest row, and rollouts and scoring use the same layers; set "
            "compute.tp_comm_overlap=false."
        )
    apex = device.type == "cuda" and importlib.util.find_spec(APEX_KERNEL) is not None
    if config.gradient_accumulation_fusion and not engine and not apex:
        raise ConfigError(
            "compute.gradient_accumulation_fusion=true needs a GPU, and Transformer Engine layers or NVIDIA Apex with "
            f"{APEX_KERNEL}, but there are neither; set compute.gradient_accumulation_fusion=false."
        )


def _check_fp8(config: ComputeConfig, device: torch.device, engine: bool) -> None:
    """Raise ConfigError where the products cannot be made so on this machine, or by no machine."""
    if config.fp8_recipe == "delayed":
        raise ConfigError(
            "compute.fp8_recipe=delayed scales by the numbers of forwards before: sampling and scoring would have "
            "other scales than learning, and a saved state none; set compute.fp8_recipe to current or blockwise."
        )
    if config.fp8 == "off":
        return
    if not engine:
        raise ConfigError(f"compute.fp8={config.fp8} needs Transformer Engine layers; set compute.fp8=off.")
    found, needed = torch.cuda.get_device_capability(device), FP8_CAPABILITY[config.fp8_recipe]
    if found < needed:
        less = "compute.fp8_recipe=current or " if found >= FP8_CAPABILITY["current"] else ""
        recipe = f" with compute.fp8_recipe={config.fp8_recipe}" if less else ""
        raise ConfigError(
            f"compute.fp8={config.fp8}{recipe} needs a GPU of compute capability {'.'.join(map(str, needed))} or more, "
            f"but this one has {'.'.join(map(str, found))}; set {less}compute.fp8=off."
        )


def _check_attention_variables(expected: str) -> None:
    """Raise ConfigError where a variable that Megatron-Core sets for the layers has another value: it would assert."""
    for name in ATTENTION_VARIABLES:
        value = os.environ.get(name, expected)
        if value != expected:
            raise ConfigError(
                f"the environment variable {name}={value} contradicts the run's layers, for which Megatron-Core wants "
                f"{expected}; unset {name}."
            )


def _dtype(config: ComputeConfig, gpu: bool) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if gpu else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def _choices(config: ComputeConfig, device: torch.device, engine: bool, dtype: torch.dtype) -> tuple[Choice, ...]:
    gpu = device.type == "cuda"
    why_layers = (
        "compute.layers" if config.layers != "auto" else "installed" if engine else _missing("transformer-engine", gpu)
    )
    return (
        Choice("communication", "NCCL" if gpu else "gloo", "GPU found" if gpu else "no GPU"),
        Choice("number format", str(dtype).removeprefix("torch."), f"compute.dtype={config.dtype}"),
        Choice("layers", "Transformer Engine" if engine else "Megatron-Core local", why_layers),
        Choice("training attention", "Transformer Engine" if engine else "torch SDPA", "follows the layers"),
        _rollout_attention(device),
        _token_maths(device),
        Choice("FP8", *_fp8(config)),
        Choice("CUDA graphs", "on" if config.cuda_graphs else "off", "compute.cuda_graphs"),
    )


def _fp8(config: ComputeConfig) -> tuple[str, str]:
    scaled = f"{config.fp8}, {config.fp8_recipe} scales"
    return (config.fp8, "compute.fp8") if config.fp8 == "off" else (scaled, "compute.fp8, compute.fp8_recipe")


def _token_maths(device: torch.device) -> Choice:
    part = "log-probs, losses, GAE"
    if use_triton(part, "auto", torch.empty(0, device=device)):
        return Choice(part, "Triton", "installed")
    why = "Triton needs a GPU" if device.type != "cuda" else missing(device) or f"{OVERRIDE}=reference"
    return Choice(part, "torch", why)


def _rollout_attention(device: torch.device) -> Choice:
    part, gpu = "rollout attention", device.type == "cuda"
    if has_flash_attention():
        return Choice(part, "flash-attn, paged", "installed")
    why = _missing(f"flash-attn (3, or 2 from {OLDEST_FLASH_ATTENTION})" if gpu else "flash-attn", gpu)
    if use_triton(part, "auto", torch.empty(0, device=device)):
        return Choice(part, "Triton, paged", why)
    if gpu:
        why += f", {missing(device) or f'{OVERRIDE}=reference'}"
    return Choice(part, "torch, paged", why)


def _missing(package: str, gpu: bool) -> str:
    return f"{package} is not installed" if gpu else f"{package} needs a GPU"
