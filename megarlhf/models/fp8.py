"""FP8 beside the number format of the weights: copies that Transformer Engine keeps, and forwards that do without.

The copies of weights outlive a forward, where no list of parameters shows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from megarlhf.models.transformer import LlamaModel


def fp8_copies(chunks: Iterable[LlamaModel]) -> list[Tensor]:
    """The tensors behind the copies that exist now."""
    copies = [copy for workspaces in _workspaces(chunks) for copy in workspaces.values()]
    return [tensor for copy in copies for tensor in vars(copy).values() if isinstance(tensor, Tensor)]


def drop_fp8_copies(chunks: Iterable[LlamaModel]) -> None:
    """Give their memory back; the next forward makes them anew."""
    for workspaces in _workspaces(chunks):
        workspaces.clear()


@contextmanager
def without_fp8(chunks: Iterable[LlamaModel]) -> Iterator[None]:
    """Inside, forwards multiply in the number format of the weights, and copies stay as they are."""
    configs: list[Any] = [chunk.config for chunk in chunks]
    formats = [config.fp8 for config in configs]
    for config in configs:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in zip(configs, formats, strict=True):
            config.fp8 = fp8


def _workspaces(chunks: Iterable[LlamaModel]) -> Iterator[dict[str, Any]]:
    from megatron.core.extensions.transformer_engine import TELinear

    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, TELinear):
                yield module._fp8_workspaces
