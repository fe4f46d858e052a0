"""Compile every Triton kernel at the shapes of Llama 3 for an H100, and print what the assembler made of it; no GPU.

    python tools/compile_kernels.py                      a table of all kernels
    python tools/compile_kernels.py paged token          ... of the files whose names contain one of these
    python tools/compile_kernels.py --json kernels.json  ... and write it down, with versions and commit

    registers   per thread, of 255; two programs of 8 warps share a multiprocessor up to 128
    stack       bytes per thread in local memory: more than 0 means that registers were spilled
    shared      bytes per program, of 232448
    HGMMA HMMA  tensor-core instructions, of a warp group and of a warp
    async       asynchronous copies into shared memory

The exit code is 1 when a kernel spills, does not compile, or has no cases. A kernel's cases are in its own file, in the
function `compile_cases` (see `megarlhf_kernels/aot.py`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

if __name__ in ("__main__", "__mp_main__"):
    # Before triton is imported: under its interpreter it compiles nothing.
    os.environ.pop("TRITON_INTERPRET", None)
    # Whether a * b + c is one rounding or two: 3.9 fuses and warns that 3.10 will not. Launches of today fuse, so the
    # kernels counted here do too.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import megarlhf_kernels
from megarlhf.observe.provenance import versions
from megarlhf_kernels import _triton
from megarlhf_kernels.aot import CompileCase, Compiled, compile_case

COLUMNS = ("registers", "stack", "shared", "hgmma", "hmma", "async_copies")
HEADINGS = ("registers", "stack", "shared", "HGMMA", "HMMA", "async")


def cases(module: ModuleType) -> list[CompileCase]:
    """What the module's file declares; nothing when it has no kernels."""
    declared: Callable[[], list[CompileCase]] | None = vars(module).get("compile_cases")
    return declared() if declared else []


def without_cases(module: ModuleType) -> list[str]:
    """Kernels of the module that no case compiles: neither launched by one, nor used in another kernel."""
    kernels = [value for value in vars(module).values() if isinstance(value, _triton.triton.runtime.JITFunction)]
    own = [kernel for kernel in kernels if kernel.__module__ == module.__name__]
    compiled = [case.kernel for case in cases(module)]
    used = [kernel for kernel in own if any(_names(other, kernel.__name__) for other in own if other is not kernel)]
    return [_name(kernel) for kernel in own if kernel not in compiled and kernel not in used]


def _names(kernel: Any, name: str) -> bool:
    return re.search(rf"\b{name}\b", kernel.src) is not None


def _name(kernel: Any) -> str:
    return f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"


def compile_one(module: str, index: int) -> Compiled:
    """Case `index` of a module: kernels do not travel between processes, their places do."""
    return compile_case(cases(importlib.import_module(module))[index])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print and write; 0 when all is well."""
    options = _parser().parse_args(arguments)
    names = [f"megarlhf_kernels.{module.name}" for module in pkgutil.iter_modules(megarlhf_kernels.__path__)]
    chosen = [name for name in names if not options.file or any(part in name for part in options.file)]
    modules = [importlib.import_module(name) for name in chosen]
    rows, wrong = [], [f"{name}: has no compile case" for module in modules for name in without_cases(module)]
    print(f"{'kernel':34}{'variant':36}" + "".join(f"{heading:>10}" for heading in HEADINGS))
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        results = [
            (case, pool.submit(compile_one, module.__name__, index))
            for module in modules
            for index, case in enumerate(cases(module))
        ]
        for case, future in results:
            row = {"kernel": _name(case.kernel), "variant": case.variant, **case.options}
            wrong += report_case(row, future)
            rows.append(row)
    if options.json:
        command = f"python tools/compile_kernels.py {shlex.join(sys.argv[1:] if arguments is None else arguments)}"
        report = {"command": command, "target": "sm_90", "versions": versions(), "kernels": rows, "wrong": wrong}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def report_case(row: dict, future: Future[Compiled]) -> list[str]:
    """Wait for a case, complete and print its row; what is wrong with it."""
    where = f"{row['kernel']:34}{row['variant']:36}"
    error = future.exception()
    if error is not None:
        row["error"] = str(error)
        print(f"{where} does not compile", flush=True)
        return [f"{row['kernel']}, {row['variant']}: {error}"]
    compiled = future.result()
    row |= asdict(compiled)
    print(where + "".join(f"{row[column]:>10}" for column in COLUMNS), flush=True)
    return [f"{row['kernel']}, {row['variant']}: spills, {compiled.stack} bytes"] if compiled.spills else []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="*", help="parts of kernel files' names; all files without any")
    parser.add_argument("--json", type=Path, help="where to write what is printed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; as many as cores")
    return parser


if __name__ == "__main__":
    sys.exit(main())
