"""Whole Hugging Face tensors, read or drawn at random, into a Megatron model of any layout: a rank keeps its slices."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megarlhf.checkpoint.hf_names import cut_for_rank, source_of
from megarlhf.models.role import Role
from megarlhf.models.transformer import named_parameters


class TensorSource(Protocol):
    """Whole Hugging Face tensors by name."""

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, whole, on the CPU."""
        ...


def load_tensors(role: Role, source: TensorSource, *, backbone_only: bool = False) -> None:
    """Fill this rank's parameters of `role` from `source`.

    backbone_only: leave the head as it is, for a scalar head on a language model's body.
    """
    role.version += 1
    tensor_group = role.mesh.group("tensor")
    with torch.no_grad():
        for name, parameter in named_parameters(role.chunks):
            if backbone_only and name == "output_layer.weight":
                continue
            origin = source_of(name, role.spec, role.head)
            whole = [source.tensor(part) for part in origin.names]
            mine = cut_for_rank(whole, origin.cut, role.spec, tensor_group.rank(), tensor_group.size())
            parameter.copy_(mine)
