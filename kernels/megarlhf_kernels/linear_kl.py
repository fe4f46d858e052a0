"""Exact KL of two language models straight from their hidden states, without an [N, V] tensor.

    z = hidden weight^T / temperature     KL = sum_v p_v (log p_v - log q_v),  p and q the softmax of either model's z

Two matrix products, one a model, and `full_kl` on their logits in fp32, some rows at a time. There is no backward: this
is a measurement.

Memory:   the logits of some rows, of both models (at most 200 MiB on a CPU, 4 GiB on a GPU), and 4 bytes a token.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from megarlhf_kernels._projection import Projection, project
from megarlhf_kernels._shards import Shard
from megarlhf_kernels.dispatch import Impl
from megarlhf_kernels.full_kl import definition as logits_definition
from megarlhf_kernels.full_kl import full_kl


class Projected(NamedTuple):
    """A model's final hidden states [N, H] and this shard's rows of its vocabulary projection [V_local, H]."""

    hidden: Tensor
    weight: Tensor


def definition(policy: Projected, reference: Projected, *, temperature: float = 1.0) -> Tensor:
    """What `linear_kl` computes, for a whole vocabulary on one rank, as one would write it down."""
    logits, ref_logits = (model.hidden @ model.weight.t() for model in (policy, reference))
    return logits_definition(logits, ref_logits, temperature=temperature, ref_temperature=temperature)


@torch.no_grad()
def linear_kl(
    policy: Projected, reference: Projected, *, temperature: float = 1.0, impl: Impl = "auto", **shard: Unpack[Shard]
) -> Tensor:
    """KL(policy || reference) of every token over the whole vocabulary; both at `temperature`. Without gradient.

    Shapes:   hidden [N, H] and weight [V_local, H] of each, one float dtype a model; H may differ. Returns [N] in fp32
              (fp64 for fp64 inputs).
    Units:    nats.
    Ranks:    as `full_kl`, once for every chunk of rows; the result is bitwise the same on all ranks of `group`.
    Raises:   ValueError if shapes, dtypes or devices do not fit, or temperature is not positive.
    """
    count, device = len(policy.hidden), policy.hidden.device
    if (len(reference.hidden), len(reference.weight)) != (count, len(policy.weight)):
        raise ValueError(
            f"linear_kl: policy has {count} states and {len(policy.weight)} columns, reference "
            f"{len(reference.hidden)} and {len(reference.weight)}; they must be of the same tokens and vocabulary."
        )

    def projection(model: Projected) -> Projection:
        nothing = torch.zeros(count, dtype=torch.int64, device=device)
        return project(model.hidden, model.weight, nothing, temperature=temperature, impl=impl, shard=shard)

    ours, others = projection(policy), projection(reference)
    out = torch.empty(count, dtype=ours.dtype, device=device)
    for mine, theirs in zip(ours.chunks(), others.chunks(), strict=True):
        out[mine.rows] = full_kl(mine.logits, theirs.logits, temperature=temperature, impl=impl, **shard)
    return out
