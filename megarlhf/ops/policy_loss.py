"""The clipped surrogate of PPO, and its kin."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf_kernels import Clip, policy_value_loss


def clipped_policy_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, *, clip: Clip
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over tokens; differentiable in `new_logprobs`.

        loss_t = max(-A_t ratio_t, -A_t clip(ratio_t, 1 - low, 1 + high)), at most -dual A_t where A_t < 0

    Shapes:   new_logprobs, logprobs, advantages [n] fp32. Returns scalars (sum, metrics).
    Units:    metrics are sums over the same tokens: `clip_fraction` (tokens whose gradient the clip removed),
              `approx_kl` (k3 of KL(old || new), nats), `ratio`.
    Raises:   ValueError if shapes differ.
    Source:   Schulman et al. 2017, eq. 7; dual clip: Ye et al. 2020, eq. 5. Differs: |new - old| is clamped to 20
              before exp, without gradient beyond.
    """
    every = torch.ones_like(new_logprobs, dtype=torch.bool)
    total, _, metrics = policy_value_loss.clipped_policy_loss(new_logprobs, logprobs, advantages, every, clip=clip)
    return total, metrics
