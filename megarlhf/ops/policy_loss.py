"""PPO's clipped surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf.ops.kl import MAX_LOG_RATIO, kl_k3
from megarlhf.ops.masked import check_mask, masked_sum


def clipped_policy_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed over the mask, to be divided by the global count.

        loss_t = max(-A_t ratio_t, -A_t clip(ratio_t, 1 - clip_range, 1 + clip_range))     ratio = exp(new - old)

    Shapes:   new_logprobs, logprobs, advantages [B, T] fp32; mask [B, T] bool. Returns scalars (sum, count, metrics).
    Units:    metrics are sums over the same tokens: `clip_fraction` (tokens whose gradient the clip removed),
              `approx_kl` (k3 of KL(old || new), nats), `ratio`.
    Raises:   ValueError if shapes differ or mask is not bool.
    Source:   Schulman et al. 2017, eq. 7. Differs: |new - old| is clamped to 20 before exp, without gradient beyond.
    """
    check_mask(mask, new_logprobs=new_logprobs, logprobs=logprobs, advantages=advantages)
    # Zeros before exp: a masked token may overflow, and inf * 0 is NaN.
    new, old = torch.where(mask, new_logprobs, 0.0), torch.where(mask, logprobs, 0.0)
    ratio = (new - old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    metrics = {
        "clip_fraction": masked_sum((clipped > unclipped).to(ratio.dtype), mask),
        "approx_kl": masked_sum(kl_k3(old, new.detach()), mask),
        "ratio": masked_sum(ratio.detach(), mask),
    }
    return masked_sum(torch.maximum(unclipped, clipped), mask), mask.sum(), metrics
