"""The critic's clipped regression."""

from __future__ import annotations

from torch import Tensor

from megarlhf.ops.masked import check_mask
from megarlhf_kernels import policy_value_loss


def clipped_value_loss(
    new_values: Tensor, values: Tensor, returns: Tensor, mask: Tensor, *, value_clip_range: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed over the mask, to be divided by the global count; differentiable in `new_values`.

        loss_t = 0.5 * max((new_t - return_t)^2, (values_t + clip(new_t - values_t, +-value_clip_range) - return_t)^2)

    Shapes:   new_values, values, returns [B, T] fp32; mask [B, T] bool. Returns scalars (sum, count, metrics).
    Units:    reward^2. Metrics are sums over the same tokens: `clip_fraction` (tokens whose gradient the clip
              removed), `squared_error` (of new_values, unclipped).
    Raises:   ValueError if shapes differ or mask is not bool.
    Source:   Huang et al. 2024, detail "value loss": the worse of the two, halved.
    """
    check_mask(mask, new_values=new_values, values=values, returns=returns)
    new, old, targets, mask = (x.contiguous() for x in (new_values, values, returns, mask))
    return policy_value_loss.clipped_value_loss(new, old, targets, mask, value_clip_range=value_clip_range)
