"""The critic's clipped regression."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf_kernels import policy_value_loss


def clipped_value_loss(
    new_values: Tensor, values: Tensor, returns: Tensor, *, value_clip_range: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over tokens; differentiable in `new_values`.

        loss_t = 0.5 * max((new_t - return_t)^2, (values_t + clip(new_t - values_t, +-value_clip_range) - return_t)^2)

    Shapes:   new_values, values, returns [n] fp32. Returns scalars (sum, metrics).
    Units:    reward^2. Metrics are sums over the same tokens: `clip_fraction` (tokens whose gradient the clip
              removed), `squared_error` (of new_values, unclipped).
    Raises:   ValueError if shapes differ.
    Source:   Huang et al. 2024, detail "value loss": the worse of the two, halved.
    """
    every = torch.ones_like(new_values, dtype=torch.bool)
    total, _, metrics = policy_value_loss.clipped_value_loss(
        new_values, values, returns, every, value_clip_range=value_clip_range
    )
    return total, metrics
