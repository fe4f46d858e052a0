"""Megatron's tensor-parallel linear layers with a short way where no gradient is asked for."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.nn.functional import linear


class LocalColumnParallelLinear(ColumnParallelLinear):
    """Without gradients the product is one call: Megatron's autograd wrappers cost a small model's rollout a tenth."""

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[..., H] -> [..., this rank's outputs], or all of them when gathered. No bias is added (skip_bias_add)."""
        used = self.weight if weight is None else weight
        if used is None or self.bias is not None or self.sequence_parallel or torch.is_grad_enabled():
            return super().forward(input_, weight, runtime_gather_output)
        out = linear(input_, used)
        if self.gather_output if runtime_gather_output is None else runtime_gather_output:
            out = gather_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out, None


class LocalRowParallelLinear(RowParallelLinear):
    """As above; the ranks' partial products are summed."""

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[..., this rank's inputs] -> [..., H], equal on all tensor ranks."""
        if self.bias is not None or self.sequence_parallel or torch.is_grad_enabled():
            return super().forward(input_)
        return reduce_from_tensor_model_parallel_region(linear(input_, self.weight), group=self.tp_group), None
