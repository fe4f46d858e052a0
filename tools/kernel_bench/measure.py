"""Errors against fp64, seconds and memory of providers, and the rates that the machine reaches at its best."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from megarlhf.observe.memory import PeakMemory
from tools.kernel_bench.base import SUM_UPSTREAM, Case, Inputs, Maker, Outputs, Provider, Run, Sizes, size_in_bytes

BLOCK = 512
"""Tokens at a time in fp64."""
HEAD_START = 2 << 30
"""Bytes that a GPU fills before it is timed: the kernels that are timed are in its queue when it is done."""

T = TypeVar("T")

_log = logging.getLogger("bench_kernels")


class Error(NamedTuple):
    """Of one output or gradient, in its largest element."""

    absolute: float
    relative: float
    """To the largest element there should be."""


@dataclass
class Measured:
    """What is known of a provider."""

    provider: Provider
    errors: dict[str, Error] = field(default_factory=dict)
    wrong: bool = False
    failure: str = ""
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def usable(self) -> bool:
        """Whether it runs, and is right."""
        return not (self.wrong or self.failure)


def measure(case: Case, providers: list[Provider], maker: Maker, repeats: int) -> list[Measured]:
    """Judge all providers, time those that are right in turns, then let each run once more for its memory."""
    measured, device = [Measured(provider) for provider in providers], maker.device
    if device.type == "cuda":
        torch.compiler.reset()  # it gives up on a function that it has compiled for 8 sizes
    check(case, measured, maker.sizes.check_tokens)
    copies = itertools.cycle(_copies(case, device))
    for repeat in range(-1, repeats):  # the first is to warm up
        turn = max(repeat, 0) % len(measured)
        for one in measured[turn:] + measured[:turn]:
            took = _attempt(one, seconds, partial(perform, one.provider.run, case, next(copies)), device)
            if took is not None and repeat >= 0:
                one.seconds.append(took)
    for one in measured:
        one.peak_bytes = _attempt(one, peak, partial(perform, one.provider.run, case, next(copies)), device)
    return measured


def _attempt(one: Measured, call: Callable[..., T], *arguments: object) -> T | None:
    """What `call` returns, if the provider is still usable; one that fails says so in its row, and the others go on."""
    if not one.usable:
        return None
    try:
        return call(*arguments)
    except Exception as error:  # noqa: BLE001 (other people's kernels: it may be anything)
        one.failure = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
        _log.warning("%s failed", one.provider.name, exc_info=True)
        return None


# Errors.


def tolerance(case: Case) -> float:
    """Relative error from which a provider is wrong: far above rounding, far below a wrong sign or scale."""
    halves = (torch.bfloat16, torch.float16)
    return 5e-2 if any(x.dtype in halves for x in case.inputs.values()) else 1e-4


def check(case: Case, measured: list[Measured], tokens: int) -> None:
    """Compare every provider with the definition in fp64, on the first tokens."""
    groups: dict[tuple[str, ...], list[tuple[Measured, Outputs]]] = {}
    inputs = with_leaves(case, case.rows(case.inputs, slice(0, tokens)) if case.splits else case.inputs)
    for one in measured:
        got = _attempt(one, perform, one.provider.run, case, inputs)
        if got is not None:
            groups.setdefault(tuple(got), []).append((one, {name: x.cpu() for name, x in got.items()}))
    # One set of outputs at a time, and all others in the host's memory: gradients in fp64 are large.
    for names, group in groups.items():
        expected = in_fp64(case, inputs, names)
        for one, got in group:
            one.errors = {name: error(got[name], expected[name]) for name in names}
            one.wrong = not all(found.relative <= tolerance(case) for found in one.errors.values())


def in_fp64(case: Case, inputs: Inputs, names: tuple[str, ...]) -> Outputs:
    """The definition's outputs and gradients of those names (a gradient's is `d_` and its input's)."""

    def wanted(x: Inputs) -> Outputs:
        return {name: output for name, output in case.definition(x).items() if name in names}

    exact = {name: x.detach().double() if x.is_floating_point() else x for name, x in inputs.items()}
    shared, parts, sums = {f"d_{name}" for name in case.shared}, [], {}
    for block in _blocks(case, exact):
        part = perform(wanted, case, with_leaves(case, block))
        for name in [name for name, x in part.items() if name in shared or not x.ndim]:
            added = part.pop(name)
            sums[name] = sums[name].add_(added) if name in sums else added
        parts.append(part)
    return {name: sums[name] if name in sums else torch.cat([part[name] for part in parts]) for name in names}


def _blocks(case: Case, inputs: Inputs) -> Iterator[Inputs]:
    tokens = next(len(x) for name, x in inputs.items() if name not in case.shared)
    if not case.splits:
        yield inputs
        return
    for start in range(0, tokens, BLOCK):
        yield case.rows(inputs, slice(start, min(start + BLOCK, tokens)))


def error(got: Tensor, expected: Tensor) -> Error:
    """The largest differences; infinite when the shapes differ, NaN when there is one."""
    if got.shape != expected.shape:
        return Error(float("inf"), float("inf"))
    pairs = zip(got.reshape(-1).split(1 << 26), expected.reshape(-1).split(1 << 26), strict=True)
    worst = torch.stack([(a.to(b.device).double() - b).abs().max() for a, b in pairs]).max().item()
    return Error(worst, worst / max(expected.abs().max().item(), 1e-30))


def perform(run: Run, case: Case, inputs: Inputs) -> Outputs:
    """Outputs, and with leaves their gradients under upstream gradients that differ from token to token."""
    if not case.leaves:
        with torch.no_grad():
            return run(inputs)
    outputs = run(inputs)
    upstream = [
        inputs[f"d_{name}"].to(output.dtype) if output.ndim else torch.full_like(output, SUM_UPSTREAM)
        for name, output in outputs.items()
    ]
    gradients = torch.autograd.grad(list(outputs.values()), [inputs[name] for name in case.leaves], upstream)
    named = zip(case.leaves, gradients, strict=True)
    return {name: output.detach() for name, output in outputs.items()} | {f"d_{name}": x for name, x in named}


def with_leaves(case: Case, inputs: Inputs) -> Inputs:
    """The same tensors, and the leaves among them want gradients."""
    return {name: x.detach().requires_grad_(name in case.leaves) for name, x in inputs.items()}


# Seconds and bytes.


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long it takes: by CUDA events on a GPU, whose queue is never empty meanwhile unless `call` waits for it."""
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.empty(HEAD_START, dtype=torch.uint8, device=device).zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _copies(case: Case, device: torch.device) -> Iterable[Inputs]:
    """On a GPU so many that a call finds nothing of its inputs in the L2 cache."""
    yield with_leaves(case, case.inputs)
    if device.type == "cuda":
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        for _ in range(min(16, int(3 * cache / size_in_bytes(*case.inputs.values())) + 1)):
            yield with_leaves(case, {name: x.clone() for name, x in case.inputs.items()})


def peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes beyond those in use before: allocated on a GPU, resident in this process on a Linux CPU; None elsewhere."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform != "linux":
        return None
    gc.collect()
    _return_freed_memory()
    memory = PeakMemory()
    memory.start()
    call()
    return memory.peak()


def _return_freed_memory() -> None:
    """What the C library holds back would be resident already, and not count."""
    with contextlib.suppress(AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def ceilings(sizes: Sizes, device: torch.device) -> dict[str, float]:
    """FLOP/s of a square matrix product of random numbers, and bytes/s, read and written, of a copy."""
    a, b, out = (torch.randn(sizes.matmul, sizes.matmul, device=device).to(vars(torch)[sizes.dtype]) for _ in range(3))
    product = _fastest(partial(torch.mm, a, b, out=out), device)
    source = torch.ones(sizes.copy_bytes, dtype=torch.uint8, device=device)
    copy = _fastest(partial(torch.zeros_like(source).copy_, source), device)
    return {"matmul": 2.0 * sizes.matmul**3 / product, "copy": 2.0 * sizes.copy_bytes / copy}


def _fastest(call: Callable[[], object], device: torch.device) -> float:
    # Not the median: what disturbed it would flatter everything that is measured by it.
    return min(seconds(call, device) for _ in range(20))
