"""Which implementation each part uses on this machine, chosen in one place and said once."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch

from megarlhf.config import Config
from megarlhf.errors import ConfigError
from megarlhf.models.recompute import Recompute
from megarlhf.parallel.cpu import OLDEST_FLASH_ATTENTION, has_flash_attention
from megarlhf_kernels.dispatch import OVERRIDE, missing, use_triton

FP8_CAPABILITY = (8, 9)
ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
"""By these Transformer Engine chooses its attention; Megatron-Core sets all to 1 for its layers, to 0 for others."""


class ComputeConfig(Config):
    """Number formats and implementations; `auto` picks the fastest that this machine has."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and activations: auto is bfloat16 on a GPU and float32 on a CPU. Losses are always float32."""
    layers: Literal["auto", "transformer_engine", "local"] = "auto"
    """Transformer layers: NVIDIA Transformer Engine's, or Megatron-Core's plain torch ones with SDPA attention."""
    fp8: Literal["off", "hybrid", "e4m3"] = "off"
    """Transformer Engine FP8 format of the matrix multiplications, one scale a tensor; needs transformer_engine layers
    and a GPU of compute capability 8.9 (an H100 has 9.0)."""
    recompute: Recompute = "none"
    """What backward computes again instead of having it kept; changes no result. `selective`: every layer's MLP, two
    thirds of what a layer keeps, for a quarter more work, less the longer rows are. `full`: all of every layer but its
    input, a third more work. A number: the same of so many layers of each pipeline stage, or chunk of one. Source:
    Korthikanti et al. 2022; Megatron-Core's recompute_granularity, with modules=[mlp], method=block."""
    overlap_grad_reduce: bool = False
    """Sum gradients over the data ranks bucket by bucket, while backward makes the others; changes no result but the
    order of sums. Takes a gradient of the vocabulary projection more. Source: Megatron-Core's argument of that name."""
    overlap_param_gather: bool = False
    """Gather a step's new weights bucket by bucket, while the next step's forward uses the others. Needs
    overlap_grad_reduce and distributed optimisers. Source: Megatron-Core's argument of that name."""
    cuda_graphs: bool = False
    """Capture the decode steps of rollouts, and nothing else, as CUDA graphs; needs a GPU."""


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
    recompute: Recompute
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    cuda_graphs: bool
    choices: tuple[Choice, ...]


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
    if config.fp8 != "off" and not use_engine:
        raise ConfigError(f"compute.fp8={config.fp8} needs Transformer Engine layers; set compute.fp8=off.")
    if config.fp8 != "off" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ConfigError(
            f"compute.fp8={config.fp8} needs a GPU of compute capability 8.9 or more, but this one has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; set compute.fp8=off."
        )
    _check_attention_variables("1" if use_engine else "0")
    if config.cuda_graphs and not gpu:
        raise ConfigError("compute.cuda_graphs=true needs a GPU; set compute.cuda_graphs=false.")
    dtype = _dtype(config, gpu)
    return Compute(
        dtype=dtype,
        transformer_engine=use_engine,
        fp8=None if config.fp8 == "off" else config.fp8,
        recompute=config.recompute,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather,
        cuda_graphs=config.cuda_graphs,
        choices=_choices(config, device, use_engine, dtype),
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
        Choice("FP8", config.fp8, "compute.fp8"),
        Choice("CUDA graphs", "on" if config.cuda_graphs else "off", "compute.cuda_graphs"),
    )


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
