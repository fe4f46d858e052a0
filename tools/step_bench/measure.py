"""Seconds and peak memory, of sides that take turns."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from megarlhf.observe.memory import forget_peak, peak_resident


@dataclass(kw_only=True)
class Timing:
    """What one thing took in every round that counts."""

    seconds: list[float] = field(default_factory=list[float])
    peak_bytes: int = 0
    begun: float = 0.0

    def begin(self, device: torch.device) -> None:
        """Start the watch."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            forget_peak()
        self.begun = time.perf_counter()

    def end(self, device: torch.device, *, counts: bool) -> None:
        """Stop it, and keep what it says of a round that counts."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - self.begun
        if counts:
            self.seconds.append(seconds)
            self.peak_bytes = max(self.peak_bytes, _peak_bytes(device))


@dataclass
class Work(Timing):
    """What can be run on its own."""

    run: Callable[[], object]

    def take(self, device: torch.device, *, counts: bool) -> None:
        """Run it once."""
        self.begin(device)
        self.run()
        self.end(device, counts=counts)


@dataclass
class Phase(Work):
    """One of ours, with how often a peer does what for the same work."""

    name: str
    counterpart: dict[str, int]
    tokens: int
    flops: float


def _peak_bytes(device: torch.device) -> int:
    """Of this phase: allocated on a GPU, resident in this process on a Linux CPU; 0 elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident() if sys.platform == "linux" else 0


def measure(phases: list[Phase], peer: dict[str, Work], repeats: int, device: torch.device) -> None:
    """One round to warm up, then `repeats` rounds; each counterpart runs right before the first phase that needs it."""
    order: list[Work] = []
    for phase in phases:
        order += [peer[name] for name in phase.counterpart if not any(peer[name] is work for work in order)] + [phase]
    for number in range(1 + repeats):
        for work in order:
            work.take(device, counts=number > 0)


def results(phases: list[Phase], peer: Mapping[str, Timing], name: str) -> list[dict[str, Any]]:
    """One row a phase: medians, rates, peak memory, the seconds of the peer of that name, and the ratio."""
    rows: list[dict[str, Any]] = []
    for phase in phases:
        median = statistics.median(phase.seconds)
        theirs = sum(times * statistics.median(peer[work].seconds) for work, times in phase.counterpart.items())
        rows.append(
            {
                "phase": phase.name,
                "seconds": median,
                "tokens_per_s": phase.tokens / median,
                "flops_per_s": phase.flops / median,
                "peak_bytes": phase.peak_bytes,
                "counterpart": phase.counterpart,
                f"{name}_seconds": theirs,
                "ratio": median / theirs,
                "all_seconds": phase.seconds,
            }
        )
    return rows
