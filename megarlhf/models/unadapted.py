"""The model that adapters were put beside, read from where it is: a reference that costs no memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from megarlhf.batch.base import TokenRows
from megarlhf.models.lora import adapters_off
from megarlhf.models.memory_plan import Held
from megarlhf.models.readings import Reading
from megarlhf.models.role import FrozenRole, Part, Role


class UnadaptedRole(FrozenRole):
    """What `adapted` was before it learnt: its own weights with the adapters off, which never learn.

    It has no bytes of its own, and is resident where `adapted` is.
    """

    def __init__(self, name: str, adapted: Role) -> None:
        self.name, self.mesh = name, adapted.mesh
        self.spec, self.head, self.reading, self.settings = (
            adapted.spec,
            adapted.head,
            adapted.reading,
            adapted.settings,
        )
        self.chunks, self.lora, self.version = adapted.chunks, None, 0
        self._adapted = adapted

    def tensors(self, part: Part) -> list[Tensor]:
        """None: they are the adapted role's."""
        return []

    @property
    def planned(self) -> Held:
        """Nothing."""
        return Held(0)

    def resident_bytes(self) -> int:
        """None."""
        return 0

    @contextmanager
    def resident(self, *parts: Part) -> Iterator[None]:
        """Hold the adapted role's weights on the device inside the block."""
        with self._adapted.resident("weights"):
            yield

    def leave(self) -> None:
        """Nothing to do: the adapted role leaves by itself."""

    def _numbers_at(self, own: TokenRows, at: Tensor, reading: Reading) -> Tensor:
        # Here and not while resident: whoever holds both resident may read the adapted role in between.
        with adapters_off(self.chunks):
            return super()._numbers_at(own, at, reading)
