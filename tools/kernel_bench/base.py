"""A case of the kernel benchmark: one kernel at one size, what defines it and what computes it; and the workloads.

A run takes tensors by name and returns outputs by name, each one number a token (or row), or a sum over all of them: so
a definition in fp64 can go through the tokens in blocks. A provider that computes less returns other outputs, and is
judged by those alone. Upstream gradients are inputs too: `d_x` of output x, random; SUM_UPSTREAM for sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megarlhf_kernels.dispatch import Impl, use_triton

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
Run = Callable[[Inputs], Outputs]

SUM_UPSTREAM = 0.5


@dataclass(frozen=True)
class Sizes:
    """A workload; pairs are (tokens or rows, columns)."""

    dtype: str
    linear: tuple[tuple[int, int], ...]
    """(tokens, hidden size) of the kernels that start from hidden states."""
    vocab: int
    logits: tuple[int, int]
    """(tokens, vocabulary) of those that start from logits."""
    rollouts: tuple[int, int]
    decode: tuple[int, int]
    prefill: tuple[int, int]
    heads: tuple[int, int, int]
    """(query heads, kv heads, head size)."""
    page: int
    check_tokens: int
    """At most so many tokens are compared with fp64."""
    matmul: int
    copy_bytes: int


PRESETS = {
    "cpu": Sizes(
        dtype="float32",
        linear=((4096, 512),),
        vocab=32_768,
        logits=(1024, 32_768),
        rollouts=(512, 2048),
        decode=(16, 1024),
        prefill=(4, 512),
        heads=(16, 4, 64),
        page=64,
        check_tokens=640,
        matmul=2048,
        copy_bytes=256 << 20,
    ),
    "gpu": Sizes(
        dtype="bfloat16",
        linear=tuple((tokens, hidden) for hidden in (4096, 8192, 16_384) for tokens in (4096, 8192)),
        vocab=128_256,
        logits=(8192, 128_256),
        rollouts=(512, 4096),
        decode=(64, 4096),
        prefill=(8, 2048),
        heads=(32, 8, 128),
        page=256,  # flash-attn takes multiples of this
        check_tokens=4352,
        matmul=8192,
        copy_bytes=4 << 30,
    ),
    "tiny": Sizes(
        dtype="float32",
        linear=((48, 16),),
        vocab=97,
        logits=(24, 97),
        rollouts=(6, 40),
        decode=(3, 20),
        prefill=(2, 12),
        heads=(4, 2, 8),
        page=8,
        check_tokens=32,
        matmul=128,
        copy_bytes=1 << 20,
    ),
}


@dataclass(frozen=True)
class Provider:
    """One way to compute a case."""

    name: str
    run: Run
    implementation: str = "torch"
    lacks: str = ""
    """What it does not compute."""
    is_peer: bool = True
    """Whether ours are compared with it: it is not ours, and takes a gradient or has a loss term for every token."""


@dataclass(frozen=True)
class Case:
    """One kernel at one size, forward or forward and backward."""

    kernel: str
    shape: str
    inputs: Inputs
    definition: Run
    providers: list[Provider]
    work: float
    """FLOP of the matrix products, or bytes of inputs and outputs: what cannot be saved."""
    bound: Literal["matmul", "copy"] = "copy"
    leaves: tuple[str, ...] = ()
    """Inputs that want gradients; none: forward only."""
    shared: tuple[str, ...] = ()
    """Inputs that belong to all tokens."""
    splits: bool = True
    """Whether the other inputs can be cut into blocks of tokens."""
    adapt: Callable[[Run], Run] = lambda run: run
    """What stands between a peer's outputs and the case's."""

    @property
    def passes(self) -> str:
        """What is timed."""
        return "forward+backward" if self.leaves else "forward"

    def rows(self, inputs: Inputs, rows: slice) -> Inputs:
        """Those inputs of some tokens."""
        return {name: x if name in self.shared else x[rows] for name, x in inputs.items()}


@dataclass(frozen=True)
class Maker:
    """Makes inputs and providers on one device."""

    sizes: Sizes
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, activations and caches; numbers a token are fp32."""
        return vars(torch)[self.sizes.dtype]

    def normal(self, *shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal random numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(*shape, generator=generator, device=self.device).mul_(scale).to(dtype)

    def whole(self, low: int, high: int, *shape: int, seed: int) -> Tensor:
        """Random integers low .. high - 1."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randint(low, high, shape, generator=generator, device=self.device)

    def step(self, *shape: int, seed: int) -> Tensor:
        """Small steps, and large ones: none near the edge of a clip range of 0.2, where rounding would decide."""
        draws = self.normal(*shape, seed=seed)
        return torch.where(self.whole(0, 5, *shape, seed=seed) == 0, 0.5 * draws.sign(), 0.05 * draws.clamp(-1.5, 1.5))

    def providers(self, kernel: str, ours: Callable[[Impl], Run], plain: Run, *, lacks: str = "") -> list[Provider]:
        """Ours, our reference where that is another, plain torch, and torch.compile of it on a GPU."""
        fast = use_triton(kernel, "auto", torch.empty(0, device=self.device))
        found = [Provider("ours", ours("auto"), "triton" if fast else "reference", is_peer=False)]
        if fast:
            found.append(Provider("our reference", ours("reference"), "reference", is_peer=False))
        found.append(Provider("torch", plain, lacks=lacks))
        if self.device.type == "cuda" and kernel not in ("rewards_gae", "paged_prefill"):  # loops: compiled for ages
            found.append(Provider("torch.compile", torch.compile(plain, dynamic=False), lacks=lacks))
        return found


def size_in_bytes(*tensors: Tensor) -> float:
    """Of all elements."""
    return float(sum(x.numel() * x.element_size() for x in tensors))
