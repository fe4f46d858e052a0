"""PPO's policy loss straight from hidden states, with three matrix products and without an [N, V] tensor.

    loss = sum_i max(-A_i r_i, -A_i clip(r_i, 1 - clip_range, 1 + clip_range)) - entropy_coef H_i + kl_coef k2_i
    r_i = exp(logprob_i - old_i)     k2_i = (logprob_i - ref_i)^2 / 2     z = hidden weight^T / temperature

What a token's log-prob is worth to the loss is known as soon as the log-prob is, since the sum's divisor is applied
elsewhere. So each chunk of logits goes all the way: statistics, merge over ranks, loss, gradient in place, gradients of
hidden and weight. Backward has nothing left to do. Taking per-token gradients from outside, as `linear_logprob` does,
costs a fourth product, for the logits must be computed again.

Memory:   one chunk of logits (100 MiB on a CPU, 2 GiB on a GPU), the gradients, a few numbers a token.
Source:   Schulman et al. 2017, eq. 7; log-ratios are clamped as in `policy_value_loss`. Loss inside the chunk: Hsu et
          al. 2024 (Liger), there with small chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarlhf_kernels._checks import check, check_positive
from megarlhf_kernels._projection import Projection, check_weight_grad, project
from megarlhf_kernels._shards import Shard
from megarlhf_kernels.dispatch import Impl
from megarlhf_kernels.policy_value_loss import clipped_policy_loss
from megarlhf_kernels.token_logprob import Softmax

METRICS = ("clip_fraction", "approx_kl", "ratio", "entropy")
"""What `linear_ppo` says besides, as sums over tokens: those of `policy_value_loss`, and the entropy."""


@dataclass(frozen=True)
class PolicyTerms:
    """What the loss says of each token: tensors [N] fp32, and the weights of its terms."""

    logprobs: Tensor
    """When the rollout was made, in nats."""
    advantages: Tensor
    clip_range: float
    temperature: float = 1.0
    entropy_coef: float = 0.0
    """Reward of a nat of entropy."""
    kl_coef: float = 0.0
    """Cost of a nat of k2, whose gradient is that of KL(policy || reference) while the policy makes the rollouts."""
    ref_logprobs: Tensor | None = None
    """The reference's, in nats; needed with `kl_coef`."""

    def loss(self, new_logprobs: Tensor, entropy: Tensor, rows: slice, *, impl: Impl) -> tuple[Tensor, Tensor]:
        """The sum over `rows`, whose log-probs and entropy [n] are given; and what `METRICS` names, summed alike."""
        every = torch.ones_like(new_logprobs, dtype=torch.bool)
        old, advantages = self.logprobs[rows], self.advantages[rows]
        total, _, seen = clipped_policy_loss(
            new_logprobs, old, advantages, every, clip_range=self.clip_range, impl=impl
        )
        seen["entropy"] = entropy.detach().sum(dtype=torch.float64)
        metrics = torch.stack([seen[name].double() for name in METRICS])
        if self.entropy_coef:
            total = total - self.entropy_coef * entropy.sum()
        if self.ref_logprobs is not None:
            total = total + 0.5 * self.kl_coef * ((new_logprobs - self.ref_logprobs[rows]) ** 2).sum()
        return total, metrics


def definition(hidden: Tensor, weight: Tensor, labels: Tensor, terms: PolicyTerms) -> Tensor:
    """What `linear_ppo` computes, for a whole vocabulary on one rank, as one would write it down."""
    distribution = torch.log_softmax(hidden @ weight.t() / terms.temperature, dim=1)
    logprobs = distribution.gather(1, labels[:, None])[:, 0]
    ratio = (logprobs - terms.logprobs).exp()
    clipped = ratio.clamp(1 - terms.clip_range, 1 + terms.clip_range)
    loss = torch.maximum(-terms.advantages * ratio, -terms.advantages * clipped)
    loss = loss + terms.entropy_coef * (distribution.exp() * distribution).sum(1)
    if terms.ref_logprobs is not None:
        loss = loss + 0.5 * terms.kl_coef * (logprobs - terms.ref_logprobs) ** 2
    return loss.sum()


def linear_ppo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    terms: PolicyTerms,
    *,
    loss_scale: float = 1.0,
    weight_grad: Tensor | None = None,
    impl: Impl = "auto",
    **shard: Unpack[Shard],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The policy loss summed over tokens, differentiable in hidden and weight; its metrics; log-probs and entropies.

    The gradients are made on the way forward, for an upstream gradient of `loss_scale`. With `weight_grad` the weight's
    is added to it there and then, and backward returns none: one fp32 sum over all chunks and micro-batches.

    Shapes:   hidden [N, H] and weight [V_local, H], one float dtype; labels [N] int64, global; weight_grad
              [V_local, H] fp32. Returns (loss scalar, metrics [4] fp64 in the order of `METRICS`, logprobs [N],
              entropy [N]) in fp32 (fp64 for fp64 inputs), all but the first without gradient.
    Units:    nats.
    Ranks:    `group`'s ranks hold the other columns and the same hidden. One gather of 4 floats a token and chunk, and
              one sum of the gradient of hidden; all results are bitwise equal on all ranks.
    Raises:   ValueError if shapes, dtypes, devices or terms do not fit; RuntimeError in backward when the upstream
              gradient is not `loss_scale`.
    """
    projection = project(hidden, weight, labels, temperature=terms.temperature, impl=impl, shard=shard)
    check_weight_grad(weight_grad, weight)
    _check_terms(terms, hidden, projection)
    return _LinearPPO.apply(hidden, weight, terms, projection, loss_scale, weight_grad)


def _check_terms(terms: PolicyTerms, hidden: Tensor, projection: Projection) -> None:
    per_token = {"logprobs": terms.logprobs, "advantages": terms.advantages, "ref_logprobs": terms.ref_logprobs}
    for name, tensor in per_token.items():
        if tensor is not None:
            check(name, tensor, (hidden.shape[0],), (projection.dtype,), hidden)
    check_positive("clip_range", terms.clip_range)
    if terms.kl_coef and terms.ref_logprobs is None:
        raise ValueError(f"kl_coef: {terms.kl_coef} needs ref_logprobs; pass them, or kl_coef=0.")


class _LinearPPO(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        terms: PolicyTerms,
        projection: Projection,
        loss_scale: float,
        weight_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        gradients = projection.gradients(hidden=wants_hidden, weight=wants_weight, weight_grad=weight_grad)
        logprobs, entropy = torch.empty(2, len(hidden), dtype=projection.dtype, device=hidden.device)
        loss = logprobs.new_zeros((), dtype=torch.float64)
        metrics = logprobs.new_zeros(len(METRICS), dtype=torch.float64)
        for chunk in projection.chunks():
            rows = chunk.rows
            statistics = torch.empty(4, rows.stop - rows.start, dtype=projection.dtype, device=hidden.device)
            projection.statistics(chunk, out=statistics)
            softmax = projection.softmax(statistics)
            logprobs[rows], entropy[rows] = softmax.logprobs, softmax.entropy
            part, seen, d_logprobs, d_entropy = _loss_and_gradient(terms, softmax, rows, projection.fast)
            loss += part
            metrics += seen
            if wants_hidden or wants_weight:
                d_entropy = loss_scale * d_entropy if terms.entropy_coef else None
                projection.backward(chunk, softmax, loss_scale * d_logprobs, d_entropy, gradients)
        ctx.loss_scale = loss_scale
        d_weight = gradients.weight if weight_grad is None else None
        ctx.save_for_backward(projection.summed(gradients), None if d_weight is None else d_weight.to(weight.dtype))
        ctx.mark_non_differentiable(metrics, logprobs, entropy)
        return loss.to(projection.dtype), metrics, logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Asserted where the number is: to look at it here would wait for the device once a micro-batch.
        torch.ops.aten._assert_async.msg(
            d_loss == ctx.loss_scale,
            f"linear_ppo: its gradients were made for loss_scale={ctx.loss_scale:g}, but its loss is weighted by "
            "another number; pass that as loss_scale.",
        )
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden, d_weight, None, None, None, None


def _loss_and_gradient(terms: PolicyTerms, softmax: Softmax, rows: slice, fast: bool) -> tuple[Tensor, ...]:
    """Loss and metrics of some rows, and the loss's gradients in their log-probs and entropy, by autograd: numbers a
    token, so it will do."""
    with torch.enable_grad():
        inputs = softmax.logprobs.detach().requires_grad_(), softmax.entropy.detach().requires_grad_()
        loss, metrics = terms.loss(*inputs, rows, impl="triton" if fast else "reference")
        d_logprobs, d_entropy = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return loss.detach(), metrics, d_logprobs, d_entropy
