"""The critic's clipped regression."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf.ops.masked import check_mask, masked_sum


def clipped_value_loss(
    new_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor, *, value_clip_range: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed over the mask, to be divided by the global count.

        loss_t = 0.5 * max((new_t - return_t)^2, (values_t + clip(new_t - values_t, +-value_clip_range) - return_t)^2)

    Shapes:   new_values, values, returns [B, T] fp32; mask [B, T] bool. Returns scalars (sum, count, metrics).
    Units:    reward^2. Metrics are sums over the same tokens: `clip_fraction` (tokens whose gradient the clip
              removed), `squared_error` (of new_values, unclipped).
    Raises:   ValueError if shapes differ or mask is not bool.
    Source:   Huang et al. 2024, detail "value loss": the worse of the two, halved.
    """
    check_mask(mask, new_values=new_values, values=values, returns=returns)
    # Zeros before the square: a masked token may overflow, and inf * 0 is NaN in the gradient.
    new, old, target = (torch.where(mask, x, 0.0) for x in (new_values, values, returns))
    # Bounds, not `old + clamp(new - old)`: rounding would make tokens inside the range look clipped.
    moved = new.clamp(old - value_clip_range, old + value_clip_range)
    unclipped, clipped = (new - target) ** 2, (moved - target) ** 2
    metrics = {
        "clip_fraction": masked_sum((clipped > unclipped).to(new.dtype), mask),
        "squared_error": masked_sum(unclipped.detach(), mask),
    }
    return 0.5 * masked_sum(torch.maximum(unclipped, clipped), mask), mask.sum(), metrics
