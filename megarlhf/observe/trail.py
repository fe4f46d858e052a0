"""Where a rank is: what it would have to say for itself if it failed now."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarlhf.observe.files import write_whole


@dataclass
class Trail:
    """Kept up to date by the loop, the clock, the roles and the collectives; read when something goes wrong."""

    step: int = 0
    """Steps (of a policy: iterations) done."""
    phase: str = ""
    """Of the clock."""
    role: str = ""
    """That works or has worked last."""
    collective: str = ""
    """Entered last, with its axis."""
    axis: Any = ""
    """Of that collective."""
    moved: float = field(default_factory=time.monotonic)
    """When it last entered a phase or a collective."""
    work: Any = field(default=None, repr=False)
    """The rows that the role works on."""
    part: int = 0
    """Of the batch they are of, which part, counted from 0."""
    trainer: str = ""
    """Module of the trainer that the run is of."""
    attempt: str = ""
    """Of which start of the run this is a part."""
    sign: Path | None = None
    """File in which this rank says where it is, for the others to read when it no longer answers."""

    @property
    def where(self) -> str:
        """In words: step 12, phase score, role reference."""
        parts = (("step", str(self.step)), ("phase", self.phase), ("role", self.role))
        return ", ".join(f"{name} {value}" for name, value in parts if value)

    def enter(self, phase: str) -> None:
        """Note the phase, and leave a sign of life."""
        self.phase, self.moved = phase, time.monotonic()
        self.show()

    def join(self, collective: str, axis: Any) -> None:
        """Note the collective, over ranks along `axis`."""
        self.collective, self.axis, self.moved = f"{collective} over {axis}", axis, time.monotonic()

    def show(self) -> None:
        """Write the sign of life, where there is a place for it."""
        if self.sign is not None:
            write_whole(self.sign, f"{self.attempt} {self.where}\n")
