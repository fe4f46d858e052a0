"""PPO's clipped surrogate."""

from __future__ import annotations

from torch import Tensor

from megarlhf.ops.masked import check_mask
from megarlhf_kernels import policy_value_loss


def clipped_policy_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_range: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed over the mask, to be divided by the global count; differentiable in `new_logprobs`.

        loss_t = max(-A_t ratio_t, -A_t clip(ratio_t, 1 - clip_range, 1 + clip_range))     ratio = exp(new - old)

    Shapes:   new_logprobs, logprobs, advantages [B, T] fp32; mask [B, T] bool. Returns scalars (sum, count, metrics).
    Units:    metrics are sums over the same tokens: `clip_fraction` (tokens whose gradient the clip removed),
              `approx_kl` (k3 of KL(old || new), nats), `ratio`.
    Raises:   ValueError if shapes differ or mask is not bool.
    Source:   Schulman et al. 2017, eq. 7. Differs: |new - old| is clamped to 20 before exp, without gradient beyond.
    """
    check_mask(mask, new_logprobs=new_logprobs, logprobs=logprobs, advantages=advantages)
    new, old, advantages, mask = (x.contiguous() for x in (new_logprobs, logprobs, advantages, mask))
    return policy_value_loss.clipped_policy_loss(new, old, advantages, mask, clip_range=clip_range)
