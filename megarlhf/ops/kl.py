"""Per-token estimators of KL(policy || reference) from tokens sampled from the policy, in nats.

With x = logprob - ref_logprob: k1 = x, k2 = x^2 / 2, k3 = e^-x - 1 + x (Schulman 2020, "Approximating KL divergence").
k1 and k3 have the KL as their mean, k2 is biased but has low variance; k2 and k3 are never negative.
As a loss their gradients differ from their values: on-policy, k1 has zero expected gradient, k2 has exactly the
gradient of the reverse KL, and k3 has the gradient of the forward KL instead. `kl_loss` weighs them so that each has
that of the reverse KL, on rollouts of an older policy too. In the reward k1 has it, k2 and k3 have others.
"""

from __future__ import annotations

from torch import Tensor

from megarlhf_kernels.linear_ppo import Estimator
from megarlhf_kernels.policy_value_loss import k3


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """x: unbiased, of either sign. Any equal shapes, elementwise, nats."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """x^2 / 2: biased at second order, never negative. Any equal shapes, elementwise, nats."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """e^-x - 1 + x: unbiased, never negative. Any equal shapes, elementwise, nats.

    -x is clamped at 20, beyond which value and gradient stay constant and 0.
    """
    return k3(ref_logprobs - logprobs)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """The one that is named. Any equal shapes, elementwise, nats."""
    return {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}[estimator](logprobs, ref_logprobs)
