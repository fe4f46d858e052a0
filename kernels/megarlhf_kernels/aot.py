"""Compile kernels for a GPU that is not here, and count what came out: `tools/compile_kernels.py` is the command.

A file with Triton kernels has a function `compile_cases() -> list[CompileCase]`: what its launchers would pass at the
shapes of Llama 3, block sizes and options taken from where the launchers take them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarlhf_kernels import _triton

H100 = 90
"""Compute capability 9.0, which H200 shares."""


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one set of compile-time arguments."""

    kernel: Any
    """The function under `@jit`."""
    variant: str
    """Which shapes: what a reader of the table must know to tell the kernel's cases apart."""
    signature: dict[str, str]
    """Triton type of every argument that is not constant: "*bf16", "*fp32", "*i64", "i32", "fp32"."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Compile-time arguments, and None for a pointer that is not passed."""
    divisible_by_16: tuple[str, ...] = ()
    """Sizes and strides that are multiples of 16 at these shapes: without them loads are narrow and not asynchronous.

    A launch finds that out by itself. Pointers count always: torch aligns what it allocates.
    """
    options: dict[str, int] = field(default_factory=dict)
    """num_warps, num_stages."""


@dataclass(frozen=True)
class Compiled:
    """What the assembler made of a case."""

    registers: int
    """Per thread, of 255."""
    stack: int
    """Bytes per thread in local memory; more than 0 means that registers were spilled."""
    shared: int
    """Bytes of shared memory of a program; an H100 has 232448."""
    hgmma: int
    """Instructions that multiply on the tensor cores for a whole warp group (from Hopper on)."""
    hmma: int
    """Instructions that multiply on the tensor cores for one warp."""
    async_copies: int
    """Instructions that copy global to shared memory in the background (LDGSTS) or by the copy engine (UTMA)."""

    @property
    def spills(self) -> bool:
        """Whether registers did not suffice."""
        return self.stack > 0


def compile_case(case: CompileCase, capability: int = H100) -> Compiled:
    """Compile for `capability` with the assembler inside the package triton; no GPU is needed.

    Raises:   RuntimeError without Triton, or under its interpreter; ValueError when the case does not name exactly the
              kernel's arguments; what Triton raises when the kernel does not compile.
    """
    if not _triton.INSTALLED or _triton.interpreted():
        raise RuntimeError("compiling needs the package triton, and TRITON_INTERPRET unset.")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names: list[str] = case.kernel.arg_names
    named = [*case.signature, *case.constants]
    if sorted(named) != sorted(names) or not set(case.divisible_by_16) <= set(names):
        odd = sorted(set(names).symmetric_difference(named) | (set(case.divisible_by_16) - set(names)))
        raise ValueError(f"{case.kernel.__name__}, {case.variant}: arguments {odd} are missing, unknown or double.")
    aligned = [name for name, kind in case.signature.items() if kind.startswith("*")] + list(case.divisible_by_16)
    source = ASTSource(
        case.kernel,
        signature={name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    kernel = _triton.triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)
    usage, code = _dump(kernel.asm["cubin"])
    return Compiled(
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        shared=kernel.metadata.shared,
        hgmma=len(re.findall(r"\bHGMMA\.", code)),
        hmma=len(re.findall(r"\bHMMA\.", code)),
        async_copies=len(re.findall(r"\b(?:LDGSTS|UTMALDG|UTMASTG)\b", code)),
    )


def _dump(cubin: bytes) -> tuple[str, str]:
    """Resource usage and machine code of a compiled kernel, as text."""
    tool = Path(_triton.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    return usage, code


def _number(pattern: str, text: str) -> int:
    # Functions that were not inlined have lines of their own: the greatest counts.
    return max(int(found) for found in re.findall(pattern, text))
