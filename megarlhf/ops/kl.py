"""Per-token estimators of KL(policy || reference) from tokens sampled from the policy, in nats.

With x = logprob - ref_logprob: k1 = x, k2 = x^2 / 2, k3 = e^-x - 1 + x (Schulman 2020, "Approximating KL divergence").
k1 and k3 have the KL as their mean, k2 is biased but has low variance; k2 and k3 are never negative.
As a loss their gradients differ from their values: on-policy, k1 has zero expected gradient, k2 has exactly the
gradient of the reverse KL, and k3 has the gradient of the forward KL instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this before `exp`: e^20 is 5e8, and fp32 overflows at 88.7."""


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """x: unbiased, of either sign. Any equal shapes, elementwise, nats."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """x^2 / 2: biased at second order, never negative. Any equal shapes, elementwise, nats."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """e^-x - 1 + x: unbiased, never negative. Any equal shapes, elementwise, nats.

    -x is clamped at MAX_LOG_RATIO, beyond which value and gradient stay constant and 0.
    """
    y = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    # expm1(y) - y cancels near 0 (a third of the digits at 1e-3). The series is good to 1e-8 below 0.1, and is
    # evaluated on a clamped y, because the branch that `where` drops still sends inf * 0 = NaN into the gradient.
    small = y.clamp(-0.1, 0.1)
    series = 0.5 * small**2 * (1 + small / 3 * (1 + small / 4 * (1 + small / 5 * (1 + small / 6))))
    return torch.where(y.abs() < 0.1, series, torch.expm1(y) - y)
