"""Log-prob and entropy of labels straight from hidden states, without an [N, V] tensor.

    z = hidden weight^T / temperature     logprob = z[label] - lse(z)     entropy = lse(z) - sum softmax(z) z

Four matrix products: backward computes the chunks' logits again, except for a few that a CPU keeps. Where the loss is
known before the forward pass, `linear_ppo` needs three.

Memory:   the logits of some rows (at most 300 MiB on a CPU, 2 GiB on a GPU), 4 numbers a token, and the gradients.
Source:   chunking as in Wijmans et al. 2024 ("Cut Your Losses"); statistics as in `token_logprob`.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megarlhf_kernels._projection import Projection, check_weight_grad, project
from megarlhf_kernels._shards import Shard
from megarlhf_kernels.dispatch import Impl
from megarlhf_kernels.token_logprob import Softmax
from megarlhf_kernels.token_logprob import definition as logits_definition


def definition(hidden: Tensor, weight: Tensor, labels: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """What `linear_logprob` computes, for a whole vocabulary on one rank, as one would write it down."""
    return logits_definition(hidden @ weight.t(), labels, temperature=temperature)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
    weight_grad: Tensor | None = None,
    impl: Impl = "auto",
    **shard: Unpack[Shard],
) -> tuple[Tensor, Tensor]:
    """log p(label) and the entropy of p = softmax(hidden weight^T / temperature), differentiable in hidden and weight.

    With `weight_grad` backward adds the weight's gradient to it and returns none: one fp32 sum over all chunks and
    micro-batches. A label outside the vocabulary gets log-prob -1e30 and no gradient.

    Shapes:   hidden [N, H] and weight [V_local, H], one float dtype; labels [N] int64, global. weight_grad
              [V_local, H] fp32. Returns (logprobs [N], entropy [N]) in fp32 (fp64 for fp64 inputs), or entropy [0]
              without `with_entropy`.
    Units:    nats.
    Ranks:    `group`'s ranks hold the other columns and the same hidden. Forward gathers 4 floats a token, backward
              sums the gradient of hidden; both end bitwise equal on all ranks.
    Raises:   ValueError if shapes, dtypes or devices do not fit, or temperature is not positive.
    """
    projection = project(hidden, weight, labels, temperature=temperature, impl=impl, shard=shard)
    check_weight_grad(weight_grad, weight)
    return _LinearLogprob.apply(hidden, weight, weight_grad, projection, with_entropy)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, weight_grad: Tensor | None, projection: Projection, with_entropy: bool
    ) -> tuple[Tensor, Tensor]:
        statistics = torch.empty(4, len(hidden), dtype=projection.dtype, device=hidden.device)
        keep = projection.kept_chunks if any(ctx.needs_input_grad) else 0
        chunks = []
        for chunk in projection.chunks(keep=keep):
            projection.statistics(chunk, with_entropy=with_entropy, out=statistics[:, chunk.rows])
            chunks.append(chunk)
        softmax = projection.softmax(statistics, with_entropy=with_entropy)
        if not with_entropy:
            ctx.mark_non_differentiable(softmax.entropy)
        ctx.set_materialize_grads(False)
        ctx.projection, ctx.weight_grad = projection, weight_grad
        ctx.kept = chunks[len(chunks) - min(keep, len(chunks)) :]
        ctx.save_for_backward(hidden, weight, *softmax)
        return softmax.logprobs, softmax.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        projection: Projection = ctx.projection
        _, weight, *rest = ctx.saved_tensors  # raises if somebody has changed them since
        softmax = Softmax(*rest)
        wants_hidden, wants_weight, *_ = ctx.needs_input_grad
        gradients = projection.gradients(hidden=wants_hidden, weight=wants_weight, weight_grad=ctx.weight_grad)
        kept, ctx.kept = ctx.kept, []  # they will hold gradients, so that they serve once
        for chunk in projection.chunks(kept):
            rows = chunk.rows
            upstream = [None if gradient is None else gradient[rows] for gradient in (d_logprobs, d_entropy)]
            projection.backward(chunk, softmax.rows(rows), *upstream, out=gradients)
        d_weight = None
        if gradients.weight is not None and ctx.weight_grad is None:
            d_weight = gradients.weight.to(weight.dtype)
        return projection.summed(gradients), d_weight, None, None, None
