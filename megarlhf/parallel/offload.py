"""Which of a model's bytes are on the device: weights, gradients and optimiser state come and go by storage.

A storage is emptied in place (`resize_(0)`) and refilled in place, so every view into it (Megatron's flat buffers and
the parameters that point into them) stays valid without being rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Away:
    storage: torch.UntypedStorage
    host: Tensor | None
    """The bytes, pinned where there is CUDA; None when the contents were dropped."""
    size: int


class Offloader:
    """Moves one part of one role (its weights, its gradients, or its optimiser state) between device and host."""

    def __init__(self, *, keep_contents: bool) -> None:
        self._keep = keep_contents
        self._away: list[_Away] = []
        self.is_away = False
        """Whether the part has been sent to the host; it may have had no bytes yet (optimiser state before a step)."""

    def to_host(self, tensors: Iterable[Tensor]) -> None:
        """Empty the storages of `tensors`. Gradients (`keep_contents=False`) are dropped, everything else is copied."""
        for storage in unique_storages(tensors):
            self._away.append(_Away(storage, _host_copy(storage) if self._keep else None, storage.nbytes()))
            storage.resize_(0)
        self.is_away = True

    def to_device(self) -> None:
        """Refill what `to_host` emptied, bit for bit; dropped contents come back as zeros."""
        for away in self._away:
            away.storage.resize_(away.size)
            device = _bytes(away.storage)
            if away.host is None:
                device.zero_()
            else:
                device.copy_(away.host, non_blocking=device.is_cuda)
        self._away.clear()
        self.is_away = False


def unique_storages(tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
    """Each storage that holds bytes, once, in order of first appearance."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [storage for storage in storages.values() if storage.nbytes()]


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes on the device behind `tensors`, shared storages counted once."""
    return sum(storage.nbytes() for storage in unique_storages(tensors))


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _host_copy(storage: torch.UntypedStorage) -> Tensor:
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
    return host.copy_(_bytes(storage))
