"""What a GPU is worth to a plan: arithmetic, memory and links, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

from megarlhf.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU and of what it is connected by. Bytes a second are in one direction."""

    name: str
    memory: float
    """GiB that CUDA reports."""
    flops: float
    """Of bf16 products, dense, a second."""
    fp8: float
    """The same of FP8; 0 where there is none."""
    hbm: float
    """Bytes a second of its own memory."""
    nvlink: float
    """Bytes a second to the others of its node."""
    pcie: float
    """Bytes a second to the host."""
    network: float
    """Bytes a second to other nodes, of the adapter that it has for itself in NVIDIA's reference systems."""
    node: int = 8
    """GPUs of a node."""

    @property
    def bytes(self) -> int:
        """Of its memory."""
        return int(self.memory * GIB)


_EVERY = (
    Gpu("a100-40gb", 39.4, 312e12, 0.0, 1.555e12, 300e9, 32e9, 25e9),
    Gpu("a100-80gb", 79.1, 312e12, 0.0, 2.039e12, 300e9, 32e9, 25e9),
    Gpu("h100-80gb", 79.1, 989e12, 1979e12, 3.35e12, 450e9, 64e9, 50e9),
    Gpu("h200-141gb", 139.8, 989e12, 1979e12, 4.8e12, 450e9, 64e9, 50e9),
    Gpu("b200-180gb", 178.3, 2250e12, 4500e12, 7.7e12, 900e9, 64e9, 50e9),
)
"""SXM modules. Source: NVIDIA's data sheets (A100 2022, H100 2023, H200 2023, HGX B200 2024), half of the rates that
they give with sparsity and half of a link's two directions; adapters of 200 (A100) and 400 Gbit/s a GPU as in DGX
A100, H100 and B200. Memory: what CUDA's out-of-memory messages give as the total capacity."""

GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _EVERY}


def gpu_named(name: str) -> Gpu:
    """The GPU called `name`. Raises ConfigError listing the names there are."""
    if name not in GPUS:
        raise ConfigError(f"gpu={name} is unknown; choose one of {', '.join(GPUS)}.")
    return GPUS[name]
