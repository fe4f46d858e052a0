"""Where the time goes: seconds, tokens and FLOPs per phase, peak memory, and the share of the device's peak."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megarlhf.observe.memory import peak_resident
from megarlhf.observe.metrics import Metrics
from megarlhf.observe.trail import Trail
from megarlhf.observe.work import PHASES, Work

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

    Units:    tokens are of all ranks; rates of FLOPs are of one device.
    Ranks:    local, no communication. On a GPU each phase border waits for the device, else work would be booked late.
    """

    def __init__(
        self,
        device: torch.device,
        trail: Trail | None = None,
        work: Work | None = None,
        *,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Start timing on `device`.

        trail: on which phases leave their mark. work: told of the phase, and read for what was done in it. now: the
        source of seconds.
        """
        self._device, self._now, self._peak_flops = device, now, peak_flops(device)
        self._trail = Trail() if trail is None else trail
        self._work = Work() if work is None else work
        self._stack: list[str] = []
        self._restart()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Book the time of the enclosed block to `phase`, one of PHASES."""
        if phase not in PHASES:
            raise ValueError(f"clock phase {phase!r}: not one of {', '.join(PHASES)}; add it to observe/work.py.")
        self._book()
        self._stack.append(phase)
        self._work.phase = phase
        self._trail.enter(phase)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()
            self._work.phase = self._stack[-1] if self._stack else ""

    def seconds(self, phase: str) -> float:
        """Seconds booked to `phase` since the last `metrics()`."""
        return self._seconds[phase]

    def metrics(self) -> Metrics:
        """Seconds, rates and peak memory since the last call, FLOPs since the run began; call it outside any phase."""
        self._book()
        result: Metrics = {"time/iteration_s": self._mark - self._start, "memory/peak_bytes": float(self._peak_bytes())}
        for phase, seconds in self._seconds.items():
            result[f"time/{phase}_s"] = seconds
            tokens = self._work.tokens[phase] - self._tokens[phase]
            flops = (self._work.flops[phase] - self._flops[phase]) / self._work.ranks
            if seconds > 0 and tokens:
                result[f"throughput/{phase}_tokens_per_s"] = tokens / seconds
            if seconds > 0 and flops:
                result[f"throughput/{phase}_flops_per_s"] = flops / seconds
                if self._peak_flops:
                    result[f"mfu/{phase}"] = flops / seconds / self._peak_flops
        if self._work.flops:
            result |= {f"compute/{phase}_flops": float(flops) for phase, flops in self._work.flops.items()}
            result["compute/flops"] = float(sum(self._work.flops.values()))
        self._restart()
        return result

    def _restart(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._tokens, self._flops = self._work.tokens.copy(), self._work.flops.copy()
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
