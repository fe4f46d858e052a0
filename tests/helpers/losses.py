"""The clipped surrogate of tokens that are all responses: what most tests ask it for."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf_kernels import Clip, policy_value_loss


def clipped_policy_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, *, clip: Clip
) -> tuple[Tensor, dict[str, Tensor]]:
    """Its sum over tokens [n], and its metrics."""
    every = torch.ones_like(new_logprobs, dtype=torch.bool)
    total, _, metrics = policy_value_loss.clipped_policy_loss(new_logprobs, logprobs, advantages, every, clip=clip)
    return total, metrics
