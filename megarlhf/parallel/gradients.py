"""Megatron-Core's gradient buffers, which it hangs on objects whose types do not know them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

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
