"""Initial weights, as whole Hugging Face tensors, each from a seed of its own: a seed is one model in every layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megarlhf.checkpoint.hf_names import shape_of
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.rng import generator


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
