"""Megatron-Core without CUDA: the one file that patches third-party code.

Megatron-Core names the CUDA device in its factories, streams, events and generators. On a machine without one,
`install()` points every such name at the CPU, so that the same models, schedules, optimisers and inference engine run
over gloo. On a machine with CUDA nothing is patched except what flash-attn would have provided, and on any the queue
for which Megatron's checkpoints start a process.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import queue
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]
from torch.utils._device import _device_constructors

from megarlhf.parallel.releases import quiet

CPU = torch.device("cpu")
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn")
LIKE_FACTORIES = ("empty_like", "zeros_like", "ones_like", "full_like")
OLDEST_FLASH_ATTENTION = "2.7.3"
"""Of flash-attn 2. Source: Megatron-Core's check before a rollout."""


class HostEvent:
    """Stands in for `torch.cuda.Event`: the host's clock, milliseconds."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.recorded_at = 0.0

    def record(self, stream: object = None) -> None:
        """Take the time."""
        self.recorded_at = time.perf_counter()

    def synchronize(self) -> None:
        """Host work is done when the call returns."""

    def wait(self, stream: object = None) -> None:
        """Host work is done when the call returns."""

    def query(self) -> bool:
        """Whether the event has happened."""
        return True

    def elapsed_time(self, end: HostEvent) -> float:
        """Milliseconds from this event to `end`."""
        return (end.recorded_at - self.recorded_at) * 1e3


class HostStream:
    """Stands in for a CUDA stream: everything on the host is already in order."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.cuda_stream = 0

    def __enter__(self) -> HostStream:
        return self

    def __exit__(self, *args: object) -> None:
        return None

    def wait_stream(self, stream: object) -> None:
        """Host work is done when the call returns."""

    def wait_event(self, event: object) -> None:
        """Host work is done when the call returns."""

    def record_event(self, event: HostEvent | None = None) -> HostEvent:
        """An event that has happened."""
        event = event or HostEvent()
        event.record()
        return event

    def synchronize(self) -> None:
        """Host work is done when the call returns."""


def host_device(device: Any) -> Any:
    """The CPU where `device` names CUDA, else `device` unchanged."""
    if isinstance(device, str) and device.startswith("cuda"):
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


def _on_host(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_host(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = host_device(kwargs["device"])
        kwargs.pop("pin_memory", None)  # pinning needs a CUDA driver
        return factory(*args, **kwargs)

    return on_host


def _to_on_host(to: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(to)
    def to_on_host(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = host_device(kwargs["device"])
        return to(self, *[host_device(a) for a in args], **kwargs)

    return to_on_host


def _cuda_type_name(type_: Callable[..., Any]) -> Callable[..., Any]:
    # Gradient clipping and the distributed optimizer compare `tensor.type()` with "torch.cuda.FloatTensor".
    @functools.wraps(type_)
    def cuda_type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = type_(self, *args, **kwargs)
        if isinstance(name, str) and not name.startswith("torch.cuda."):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    return cuda_type_name


def _no_op() -> Callable[..., None]:
    """A new function that does nothing; torch's compiler keeps a table of functions and wants each name's its own."""
    return lambda *args, **kwargs: None


def _install_host_device() -> None:
    """Point `torch.cuda` and every factory that names it at the CPU."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, _no_op())
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.current_stream = lambda *args, **kwargs: HostStream()
    cuda.default_stream = lambda *args, **kwargs: HostStream()
    cuda.Stream = HostStream
    cuda.Event = HostEvent
    cuda.memory_stats = lambda *args: {"allocated_bytes.all.current": 0, "reserved_bytes.all.current": 0}
    cuda.nvtx.range_push, cuda.nvtx.range_pop = _no_op(), _no_op()
    # torch remembers, when it first needs to know, which functions obey `with torch.device(...)`. It must remember the
    # real ones: `from_pretrained` builds on the meta device, and would leave rotary frequencies uninitialised.
    _device_constructors()
    module: Any = torch
    for name in FACTORIES + LIKE_FACTORIES:
        setattr(module, name, _on_host(vars(torch)[name]))
    tensor: Any = torch.Tensor
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.to = _to_on_host(torch.Tensor.to)
    tensor.type = _cuda_type_name(torch.Tensor.type)


def _import_megatron_uncompiled() -> None:
    """Import Megatron-Core with its `jit_fuser` doing nothing: compiling small CPU fusions costs more than it saves."""
    module: Any = torch
    compile_ = torch.compile
    module.compile = lambda function=None, **kwargs: function
    try:
        import megatron.core.jit  # noqa: F401
    finally:
        module.compile = compile_


def _install_megatron() -> None:
    """The places where Megatron-Core reaches past `torch.cuda`."""
    import megatron.core.inference.communication_utils as communication
    import megatron.core.inference.contexts.dynamic_context as dynamic_context
    import megatron.core.tensor_parallel.random as random

    rng: Any = random
    rng._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    rng._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    # Asserts that tensors broadcast between pipeline stages live on a GPU.
    wire: Any = communication
    wire._is_cuda = _no_op()
    # The context falls back to its torch path where the Triton kernel is None.
    context: Any = dynamic_context
    context.triton_append_key_value_cache = None


def _install_paged_attention() -> None:
    """Give Megatron's dynamic-batching attention our paged attention where flash-attn is not installed."""
    import megatron.core.transformer.attention as attention

    from megarlhf_kernels import paged_attention

    module: Any = attention
    module.flash_attn_varlen_func = paged_attention.paged_prefill
    module.flash_attn_with_kvcache = paged_attention.paged_decode
    module.is_fa_min_version = lambda version: True


@functools.cache
def _gloo_devices(interfaces: str, process: int) -> list[ProcessGroupGloo.Device]:
    """What listens on these network interfaces (comma between them; empty: that of the host's name) in this process."""
    if not interfaces:
        return [ProcessGroupGloo.create_default_device()]
    return [ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]


def _install_gloo_device() -> None:
    """Have the process groups of a process share what listens for them.

    torch gives each a device of its own, whose thread wakes up a hundred times a second. A rank has dozens of groups,
    and shares the cores of its machine with other ranks.
    """
    group: Any = ProcessGroupGloo
    options: Any = group._Options
    theirs = group.__init__

    def of_shared_devices(self: object, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        chosen = options()
        chosen._devices = _gloo_devices(os.environ.get("GLOO_SOCKET_IFNAME", ""), os.getpid())
        chosen._timeout = timeout
        theirs(self, store, rank, size, chosen)

    group.__init__ = of_shared_devices


def _install_results_queue() -> None:
    """Give Megatron's checkpoint writers a queue of this process for what they say of their files.

    Theirs lies in a process of its own, 268 MiB a rank, which outlives the rank and does not outlive a signal to the
    process group. A state's writers send their word over pipes instead (`checkpoint/state_writer.py`).
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    module: Any = filesystem_async
    module._results_queue = queue.SimpleQueue()


def has_flash_attention() -> bool:
    """Whether Megatron-Core has the functions of flash-attn 3, or of 2 in a release that it takes; they need CUDA.

    A package of that name says little: it may be flash-attn 4, which has other functions, or built for another torch.
    """
    if not torch.cuda.is_available():
        return False
    import megatron.core.transformer.attention as attention

    from megarlhf_kernels import paged_attention

    prefill: Any = attention.flash_attn_varlen_func
    theirs = prefill is not None and prefill is not paged_attention.paged_prefill
    return attention.HAVE_FA3 or (theirs and attention.is_fa_min_version(OLDEST_FLASH_ATTENTION))


@functools.cache
def install() -> None:
    """Make Megatron-Core run on this machine's devices. Idempotent; call before building any Megatron object.

    Raises:   ImportError when `psutil` or `einops` is missing: Megatron would hang or fail far from the cause.
    """
    for name in ("psutil", "einops"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"megatron-core needs the package {name!r}; install it with: pip install {name}")
    # Megatron warns once per module about each missing optional package; the run's own table says it once.
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|transformer_engine).*")
    warnings.filterwarnings("ignore", message=".*is experimental and still under active development.*")
    # Its distributed optimizer clears the .grad of views, and it calls collectives by names that torch will retire.
    warnings.filterwarnings("ignore", message=".*not a leaf Tensor is being accessed.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch\.distributed|megatron\.core)")
    quiet()
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")
        _import_megatron_uncompiled()
        _install_host_device()
        _install_gloo_device()
        _install_megatron()
    if not has_flash_attention():
        _install_paged_attention()
    _install_results_queue()
