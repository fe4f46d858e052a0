"""The activation of the gated MLP for machines without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Backward writes both halves where they belong, so that nothing is joined afterwards."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        active = silu(gate)
        if not ctx.needs_input_grad[0]:
            return active.mul_(up)
        ctx.save_for_backward(gate_up, active)
        return active * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gate_up, active = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        gradient = torch.empty_like(gate_up)
        d_gate, d_up = gradient.chunk(2, dim=-1)
        torch.mul(grads[0], active, out=d_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=d_gate)
        return gradient


def swiglu(gate_up: Tensor) -> Tensor:
    """silu of the first half of the channels times the second half.

    Shapes:   gate_up [..., 2 F]. Returns [..., F].
    Source:   Shazeer 2020.
    """
    active: Any = _SwiGLU.apply(gate_up)
    return active


class SwiGLU(MegatronModule):
    """`swiglu` as Megatron's MLP takes it, in place of its general form, which also adds an offset of 0."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)

    def forward(self, gate_up: Tensor) -> Tensor:
        """[..., 2 F] -> [..., F]."""
        return swiglu(gate_up)
