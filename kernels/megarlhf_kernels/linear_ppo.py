"""PPO's policy loss straight from hidden states, with three matrix products and without an [N, V] tensor.

    loss = sum_i w_i (max(-A_i r_i, -A_i clip(r_i, 1 - low, 1 + high)) - entropy_coef H_i + kl_coef k_i)
    r_i = exp(logprob_i - old_i)     k_i: `kl_loss` to the reference     z = hidden weight^T / temperature

What a token's log-prob is worth to the loss is known as soon as the log-prob is, since the sum's divisor is applied
elsewhere. So each chunk of logits goes all the way: statistics, merge over ranks, loss, gradient in place, gradients of
hidden and weight. Backward has nothing left to do. Taking per-token gradients from outside, as `linear_logprob` does,
costs a fourth product, for the logits must be computed again.

Memory:   one chunk of logits (100 MiB on a CPU, 2 GiB on a GPU), the gradients, a few numbers a token.
Source:   Schulman et al. 2017, eq. 7, or CISPO's loss; both as in `policy_value_loss`. Loss inside the chunk: Hsu et
          al. 2024 (Liger), there with small chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarlhf_kernels._checks import check, check_positive
from megarlhf_kernels._projection import Projection, check_weight_grad, project
from megarlhf_kernels._shards import Shard
from megarlhf_kernels.dispatch import Impl
from megarlhf_kernels.policy_value_loss import MAX_LOG_RATIO, Clip, clipped_policy_loss, clipped_weight_loss, k3
from megarlhf_kernels.token_logprob import Softmax

METRICS: tuple[str, ...] = ("clip_fraction", "approx_kl", "ratio", "entropy")
"""What `linear_ppo` says besides, as sums over tokens: those of `policy_value_loss`, and the entropy."""


Estimator = Literal["k1", "k2", "k3"]
Surrogate = Literal["clip", "cispo"]


@dataclass(frozen=True)
class Anchor:
    """What the policy is kept near by a term of the loss: tensors [N] fp32, in nats."""

    logprobs: Tensor
    """When the rollout was made."""
    ref_logprobs: Tensor
    coef: float
    """Cost of a nat."""
    estimator: Estimator


@dataclass(frozen=True)
class PolicyTerms:
    """What the loss says of each token: tensors [N] fp32, and the weights of its terms."""

    logprobs: Tensor
    """When the rollout was made, in nats."""
    advantages: Tensor
    clip: Clip
    surrogate: Surrogate = "clip"
    """`clip`: max(-A r, -A clip(r)); `cispo`: -A clip(r) logprob, the clipped ratio held constant."""
    weights: Tensor | None = None
    """Of each token in the whole loss, not negative; None: 1."""
    temperature: float = 1.0
    entropy_coef: float = 0.0
    """Reward of a nat of entropy."""
    anchor: Anchor | None = None

    def rows(self, rows: slice) -> PolicyTerms:
        """Those of some tokens."""
        anchor = self.anchor
        if anchor is not None:
            anchor = replace(anchor, logprobs=anchor.logprobs[rows], ref_logprobs=anchor.ref_logprobs[rows])
        weights = None if self.weights is None else self.weights[rows]
        return replace(
            self, logprobs=self.logprobs[rows], advantages=self.advantages[rows], weights=weights, anchor=anchor
        )

    def loss(self, new_logprobs: Tensor, entropy: Tensor, rows: slice, *, impl: Impl) -> tuple[Tensor, Tensor]:
        """The sum over `rows`, whose log-probs and entropy [n] are given; and what `METRICS` names, unweighted."""
        old, advantages = self.logprobs[rows], self.advantages[rows]
        weights = None if self.weights is None else self.weights[rows]
        if weights is not None:
            # A weight that is not negative goes into the maximum as it is: w max(-A r, ...) = max(-(w A) r, ...).
            advantages = weights * advantages
        if self.surrogate == "cispo":
            total, seen = clipped_weight_loss(new_logprobs, old, advantages, clip=self.clip)
        else:
            every = torch.ones_like(new_logprobs, dtype=torch.bool)
            total, _, seen = clipped_policy_loss(new_logprobs, old, advantages, every, clip=self.clip, impl=impl)
        seen["entropy"] = entropy.detach().sum(dtype=torch.float64)
        metrics = torch.stack([seen[name].double() for name in METRICS])
        if self.entropy_coef:
            total = total - self.entropy_coef * _summed(entropy, weights)
        if self.anchor is not None:
            anchor = self.anchor
            kl = kl_loss(new_logprobs, anchor.logprobs[rows], anchor.ref_logprobs[rows], anchor.estimator)
            total = total + anchor.coef * _summed(kl, weights)
        return total, metrics


def kl_loss(new_logprobs: Tensor, logprobs: Tensor, ref_logprobs: Tensor, estimator: Estimator) -> Tensor:
    """Of each token, a term whose mean gradient is that of KL(policy || reference), whoever sampled the token.

        k1: r x        k2: sg[r] x^2 / 2        k3: r (e^-x - 1 + x)        x = new - ref     r = e^(new - old)

    Without r the gradients of k1 and k3 are 0 and that of the other KL, even on the policy's own rollouts, and that of
    k2 is wrong after the first step. The gradients of k2 and k3 are the same in every token, r x; that of k1 is r more,
    whose mean is 0.

    Shapes:   all [n]; differentiable in new_logprobs. Units: nats. r is clamped as in `policy_value_loss`; k3's value
              too, where the reference is likelier by more than 20 nats, but not its gradient.
    Source:   arXiv 2506.09477, 2512.21852; k3 with r: DeepSeek-V3.2 (2512.02556).
    """
    ratio = (new_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    gap = new_logprobs - ref_logprobs
    match estimator:
        case "k1":
            return ratio * gap
        case "k2":
            return 0.5 * ratio.detach() * gap**2
        case "k3":
            # Its own gradient is a difference of terms of e^-x that cancel to r x, but not where e^-x is clamped.
            half = 0.5 * ratio.detach() * gap**2
            return half + (ratio * k3(-gap) - half).detach()


def _summed(x: Tensor, weights: Tensor | None) -> Tensor:
    return x.sum() if weights is None else (weights * x).sum()


def definition(hidden: Tensor, weight: Tensor, labels: Tensor, terms: PolicyTerms) -> Tensor:
    """What `linear_ppo` computes, for a whole vocabulary on one rank, as one would write it down."""
    distribution = torch.log_softmax(hidden @ weight.t() / terms.temperature, dim=1)
    logprobs = distribution.gather(1, labels[:, None])[:, 0]
    ratio = (logprobs - terms.logprobs).exp()
    clipped = ratio.clamp(1 - terms.clip.low, 1 + terms.clip.high)
    if terms.surrogate == "cispo":
        loss = -terms.advantages * clipped.detach() * logprobs
    else:
        loss = torch.maximum(-terms.advantages * ratio, -terms.advantages * clipped)
        loss = torch.where(terms.advantages < 0, loss.clamp(max=-terms.clip.dual * terms.advantages), loss)
    loss = loss + terms.entropy_coef * (distribution.exp() * distribution).sum(1)
    if terms.anchor is not None:
        gap = logprobs - terms.anchor.ref_logprobs
        moved = (logprobs - terms.anchor.logprobs).exp()
        each = {"k1": moved * gap, "k2": moved.detach() * gap**2 / 2, "k3": moved * (torch.exp(-gap) - 1 + gap)}
        loss = loss + terms.anchor.coef * each[terms.anchor.estimator]
    return (loss if terms.weights is None else loss * terms.weights).sum()


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
    per_token = {"logprobs": terms.logprobs, "advantages": terms.advantages, "weights": terms.weights}
    if terms.anchor is not None:
        per_token |= {"anchor.logprobs": terms.anchor.logprobs, "anchor.ref_logprobs": terms.anchor.ref_logprobs}
    for name, tensor in per_token.items():
        if tensor is not None:
            check(name, tensor, (hidden.shape[0],), (projection.dtype,), hidden)
    check_positive("clip.low", terms.clip.low)
    check_positive("clip.high", terms.clip.high)


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
