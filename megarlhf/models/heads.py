"""The scalar head of critic and reward model."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ScalarHead(MegatronModule):
    """One number a position, in fp32. Replicated over tensor ranks, on the last pipeline stage.

    Shapes:   hidden [..., H] -> [...] fp32.
    Source:   initial weights are normal with std 1 / sqrt(H + 1) (Huang et al. 2024); drawn by the checkpoint package.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.weight = torch.nn.Parameter(
            torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )

    def forward(self, hidden: Tensor, *rest: Any) -> Tensor:
        """One number a position; further arguments are what Megatron hands an output layer."""
        # A dot product a position costs nothing in fp32, and values rounded to bf16 would blur every advantage.
        return hidden.float() @ self.weight[0].float()
