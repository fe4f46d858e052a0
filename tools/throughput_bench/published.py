"""Throughput that others have published for Llama 3 on H100, for comparison. None of it was measured by this project.

Training rates are of pre-training or supervised fine-tuning, forward, backward and optimiser alone: they bound what the
optimise phase of an iteration can reach, and no iteration. FLOP/s are not given: publishers count them differently.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One row."""

    parameters: str
    """Of the model: 8B, 70B, 405B."""
    what: str
    precision: str
    gpus: int
    tokens_per_s_per_gpu: float
    source: str


ANCHORS = (
    Published("8B", "training, 8192 tokens", "BF16", 8, 10_254, "NVIDIA dgxc-benchmarking llama3.1 8B, 2025-05"),
    Published("8B", "training, 8192 tokens", "FP8", 8, 14_451, "NVIDIA Megatron-Bridge performance archive, 25.11"),
    Published("8B", "SFT, 4096 tokens", "BF16", 8, 12_412, "NVIDIA dgxc-benchmarking llama3 finetuning 8B"),
    Published("70B", "training, 8192 tokens", "BF16", 64, 1_121, "NVIDIA dgxc-benchmarking llama3.1 70B, 2025-05"),
    Published("70B", "training, 8192 tokens", "FP8", 64, 1_664, "NVIDIA Megatron-Bridge performance archive, 26.04.01"),
    Published("70B", "SFT, 4096 tokens", "BF16", 32, 1_219, "NVIDIA dgxc-benchmarking llama3 finetuning 70B"),
    Published(
        "405B", "training, 8192 tokens", "FP8", 1024, 326, "NVIDIA Megatron-Bridge performance archive, 26.04.01"
    ),
    Published("8B", "decoding, 1000 after 1000", "FP8", 1, 15_220, "NVIDIA TensorRT-LLM v1.0 performance overview"),
)


def anchors_of(parameters: int) -> list[Published]:
    """Those of models of about so many parameters."""
    sizes = {"8B": 8.0e9, "70B": 70.6e9, "405B": 405.9e9}
    return [each for each in ANCHORS if abs(parameters / sizes[each.parameters] - 1) < 0.1]
