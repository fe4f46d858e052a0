"""The activation of the gated MLP for machines without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up. Backward writes its gradient over the input, so that it can run only once.

    Fresh memory of this size costs a CPU as much as the arithmetic, so silu is computed again instead of kept.
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        ctx.save_for_backward(gate_up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors  # raises when a backward pass has written over it before
        gate, up = gate_up.chunk(2, dim=-1)
        d_up = silu(gate).mul_(grads[0])
        torch.ops.aten.silu_backward.grad_input(up.mul_(grads[0]), gate, grad_input=gate)
        up.copy_(d_up)
        return gate_up.detach()


def swiglu(gate_up: Tensor) -> Tensor:
    """silu of the first half of the channels times the second half. Its backward uses up `gate_up`.

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
        """[..., 2 F] -> [..., F]. Without gradients it overwrites its input, which is all that the layer before made.

        Fresh memory of that size costs a CPU a tenth of the whole MLP.
        """
        if torch.is_grad_enabled():
            return swiglu(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate, inplace=True).mul_(up)
