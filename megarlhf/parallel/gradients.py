"""Megatron-Core's gradient buffers, which it hangs on objects whose types do not know them, and what travels meanwhile.

With `overlap_grad_reduce` a bucket's gradients are summed over the data ranks while backward makes the next. With
`overlap_param_gather` a step leaves each rank with its own share of the new weights; those of the others are gathered,
bucket by bucket when the next forward comes to them, or all at once by `gather_weights`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor


class _Buffer(Protocol):
    grad_data: Tensor


def main_grad(parameter: Tensor) -> Tensor | None:
    """The fp32 buffer that a parameter's gradient is summed in; None where the model is not trained."""
    attributes: dict[str, Any] = vars(parameter)
    return attributes.get("main_grad")


def gradient_buffers(wrapped: DistributedDataParallel) -> list[Tensor]:
    """The flat buffers that hold all of them. An attribute of the instance, under the name of torch's own method."""
    buffers = cast(Sequence[_Buffer], vars(wrapped)["buffers"])
    return [buffer.grad_data for buffer in buffers]


class _Said(torch.autograd.Function):
    """A weight whose gradient has gone into Megatron's buffer already: what remains is none, and is said to be zeros.

    Megatron waits for each weight's gradient to count a bucket as complete, and takes none at all for a fault.
    """

    @staticmethod
    def forward(_ctx: Any, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]  # zeros where there is none: autograd makes them


def said(weight: Tensor) -> Tensor:
    """`weight` [V, H], with a gradient of zeros for what goes into its buffer beside autograd. Takes its size once."""
    saying: Any = _Said.apply(weight)
    return saying


def gather_head(wrapped: DistributedDataParallel, weight: Tensor) -> None:
    """Wait for a weight that no module's forward reads. Collective over the data ranks where it is not whole.

    One that does not learn, beside adapters, is in no bucket, and always whole.
    """
    group: Any = wrapped.param_to_bucket_group.get(weight)
    if group is not None:
        group.finish_param_sync()


def gather_weights(wrapped: DistributedDataParallel) -> None:
    """Wait until every weight is whole; nothing where all are. Collective over the data ranks."""
    groups: Any = wrapped.bucket_groups
    for group in groups:
        if not group.param_gather_dispatched or group.param_gather_handle is not None:
            group.start_param_sync(force_sync=True)
