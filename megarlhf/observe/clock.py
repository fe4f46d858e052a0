"""Where the time goes: seconds, tokens and FLOPs per phase, peak memory, and the share of the device's peak."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megarlhf.observe.memory import peak_resident
from megarlhf.observe.metrics import PHASES, Metrics
from megarlhf.observe.trail import Trail

# Dense bf16 peak in FLOP/s, without sparsity. Source: NVIDIA's data sheets (A100, H100, H200, B200).
_PEAK_FLOPS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
)


def peak_flops(device: torch.device) -> float:
    """Dense bf16 peak of a device in FLOP/s; 0 when it is not known, as for any CPU, and then no MFU is reported."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_FLOPS if known in name), 0.0)


class Clock:
    """Times named phases; `metrics()` reports everything since the last call and starts afresh.

    Phases nest: the inner phase's time is not counted in the outer one, so the phases of an iteration add up to at
    most its wall time.

    Units:    tokens are global (all ranks); FLOPs are this device's share.
    Ranks:    local, no communication. On a GPU each phase border waits for the device, else work would be booked late.
    """

    def __init__(
        self, device: torch.device, trail: Trail | None = None, *, now: Callable[[], float] = time.perf_counter
    ) -> None:
        """Start timing on `device`; phases leave their mark on `trail`; `now` is the source of seconds."""
        self._device, self._now, self._peak_flops = device, now, peak_flops(device)
        self._trail = Trail() if trail is None else trail
        self._stack: list[str] = []
        self._restart()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Book the time of the enclosed block to `phase`, one of PHASES."""
        if phase not in PHASES:
            raise ValueError(f"clock phase {phase!r}: not one of {', '.join(PHASES)}; add it to observe/metrics.py.")
        self._book()
        self._stack.append(phase)
        self._trail.enter(phase)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def add(self, phase: str, *, tokens: int = 0, flops: float = 0.0) -> None:
        """Count work done in `phase`."""
        self._tokens[phase] += tokens
        self._flops[phase] += flops

    def seconds(self, phase: str) -> float:
        """Seconds booked to `phase` since the last `metrics()`."""
        return self._seconds[phase]

    def metrics(self) -> Metrics:
        """Return seconds, rates and peak memory since the last call, then reset; call it outside any phase."""
        self._book()
        result: Metrics = {"time/iteration_s": self._mark - self._start, "memory/peak_bytes": float(self._peak_bytes())}
        for phase, seconds in self._seconds.items():
            result[f"time/{phase}_s"] = seconds
            if seconds > 0 and self._tokens[phase]:
                result[f"throughput/{phase}_tokens_per_s"] = self._tokens[phase] / seconds
            if seconds > 0 and self._flops[phase]:
                result[f"throughput/{phase}_flops_per_s"] = self._flops[phase] / seconds
                if self._peak_flops:
                    result[f"mfu/{phase}"] = self._flops[phase] / seconds / self._peak_flops
        self._restart()
        return result

    def _restart(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._tokens: dict[str, int] = defaultdict(int)
        self._flops: dict[str, float] = defaultdict(float)
        self._start = self._mark = self._now()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def _book(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = self._now()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._mark
        self._mark = now

    def _peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return peak_resident()
