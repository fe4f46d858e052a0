"""Weights into a Megatron model of any layout: from a Hugging Face directory, or drawn at random.

Each rank keeps only its slices. Random weights are drawn as Hugging Face tensors too, each from a seed of its own, so a
seed means the same model in every layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megarlhf.checkpoint.hf_names import cut_for_rank, shape_of, source_of
from megarlhf.models.role import Role
from megarlhf.models.spec import ModelSpec
from megarlhf.models.transformer import LlamaModel
from megarlhf.parallel.rng import generator


class TensorSource(Protocol):
    """Whole Hugging Face tensors by name."""

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, whole, on the CPU."""
        ...


class RandomTensors:
    """Initial weights: normal with std 0.02, residual projections scaled by 1/sqrt(2 layers), norms 1.

    Source:   GPT-2's initialisation, as in Megatron; the scalar head's 1/sqrt(H + 1) is Huang et al. 2024's.
    """

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self._spec = spec
        self._seed = seed

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, fp32."""
        shape = shape_of(name, self._spec)
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        std = 0.02
        if name == "score.weight":
            std = 1 / math.sqrt(self._spec.hidden_size + 1)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std = 0.02 / math.sqrt(2 * self._spec.layers)
        return torch.randn(shape, generator=generator(self._seed, "weights", name)) * std


def load_tensors(role: Role, source: TensorSource, *, backbone_only: bool = False) -> None:
    """Fill this rank's parameters of `role` from `source`.

    backbone_only: leave the head as it is, for a scalar head on a language model's body.
    """
    tensor_group = role.mesh.group("tensor")
    with torch.no_grad():
        for name, parameter in named_parameters(role.chunks):
            if backbone_only and name == "output_layer.weight":
                continue
            origin = source_of(name, role.spec, role.head)
            whole = [source.tensor(part) for part in origin.names]
            mine = cut_for_rank(whole, origin.cut, role.spec, tensor_group.rank(), tensor_group.size())
            parameter.copy_(mine)


def named_parameters(chunks: Sequence[LlamaModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of this rank with layers numbered over the whole model."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                # Megatron numbers layers from 1 over the whole model, and from 0 within a chunk.
                layer: Any = chunk.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
            yield ".".join(parts), parameter
