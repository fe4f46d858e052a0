"""Environment variables that CUDA, NCCL and torch read once: set here, before they do, and nowhere else.

What the user has set stays. None of them changes a result, and none has been measured by this project yet.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import NamedTuple

from megarlhf.parallel.layout import ParallelLayout

ALLOCATOR = "PYTORCH_ALLOC_CONF"
OLDER_NAME = "PYTORCH_CUDA_ALLOC_CONF"
"""Of the same variable: torch takes it first, and says of it that it is deprecated."""


class Variable(NamedTuple):
    """An environment variable, the value that a run wants, and why."""

    name: str
    value: str
    reason: str


MARGIN = "20"
"""Streaming multiprocessors of a GPU. Source: NVIDIA's recipes for Llama 3 on H100."""


def wanted(layout: ParallelLayout, *, overlaps: bool = False) -> tuple[Variable, ...]:
    """What a run in this layout wants of a machine with GPUs; overlaps: collectives run beside its kernels.

    Source:   Megatron-Core's warnings and assertions (tensor_parallel/layers.py, transformer/cuda_graphs.py), for
              context ranks Megatron-LM's (training/arguments.py), and the recipes for Llama 3 on H100 of NVIDIA's
              Megatron-Bridge.
    """
    always = (
        Variable(ALLOCATOR, "expandable_segments:True", "models come and go: segments of a fixed size leave gaps"),
        Variable("NCCL_GRAPH_REGISTER", "0", "captured collectives fault in memory of expandable segments"),
        Variable("NCCL_NVLS_ENABLE", "0", "NVLink SHARP keeps GPU memory for each group, and a run has one an axis"),
    )
    connections = Variable(
        "CUDA_DEVICE_MAX_CONNECTIONS", "1", "kernels start as launched: a collective before what hides it"
    )
    pipeline = Variable("NCCL_P2P_NET_CHUNKSIZE", "2097152", "activations go between nodes by 2 MiB, not by 128 KiB")
    reason = f"norms leave {MARGIN} multiprocessors to the collectives that run beside them"
    margins = [Variable(f"NVTE_{way}_LAYERNORM_SM_MARGIN", MARGIN, reason) for way in ("FWD", "BWD")]
    parallel = (*[connections] * (layout.tensor * layout.context > 1), *[pipeline] * (layout.pipeline > 1))
    return (*always, *parallel, *(margins if overlaps else []))


def settle(
    layout: ParallelLayout, environment: MutableMapping[str, str] = os.environ, *, overlaps: bool = False
) -> None:
    """Set what `layout` wants and the user did not set; ranks that this process starts have it too."""
    for name, value, _ in wanted(layout, overlaps=overlaps):
        if name != ALLOCATOR or OLDER_NAME not in environment:
            environment.setdefault(name, value)


def in_force(
    layout: ParallelLayout, environment: MutableMapping[str, str] = os.environ, *, overlaps: bool = False
) -> tuple[Variable, ...]:
    """What `layout` wants, each with the value that counts, once it is settled."""
    return tuple(_in_force(variable, environment) for variable in wanted(layout, overlaps=overlaps))


def _in_force(variable: Variable, environment: MutableMapping[str, str]) -> Variable:
    name, value, reason = variable
    if name == ALLOCATOR and name not in environment:
        name = OLDER_NAME
    if environment[name] == value:
        return variable._replace(name=name)
    return Variable(name, environment[name], f"yours; {value} otherwise: {reason}")
