"""Every kernel compiles for an H100 without spilling registers; in a process of its own, without the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from megarlhf_kernels.aot import Compiled
from tools.compile_kernels import report_case

ROOT = Path(__file__).parents[2]


def in_own_process(cache: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])}
    environment |= {"TRITON_DEFAULT_FP_FUSION": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def compiled(tmp_path: Path, *files: str) -> list[dict[str, Any]]:
    """A row of every case in the kernels' `files`, of all by default; none of them spills."""
    pytest.importorskip("triton")
    path = tmp_path / "kernels.json"
    done = in_own_process(tmp_path / "cache", "tools/compile_kernels.py", *files, "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(path.read_text())
    assert report["wrong"] == []
    assert all(row["stack"] == 0 and 0 < row["registers"] <= 255 for row in report["kernels"])
    return report["kernels"]


@pytest.mark.slow
def test_the_kernel_nearest_to_its_registers_does_not_spill(tmp_path: Path) -> None:
    assert compiled(tmp_path, "policy_value_loss")


@pytest.mark.slow
def test_no_kernel_spills_and_attention_is_on_tensor_cores(tmp_path: Path) -> None:
    kernels = compiled(tmp_path)
    attention = [row for row in kernels if row["kernel"] == "paged_attention._paged_attention"]
    prefill, decode = ([row for row in attention if row["variant"].startswith(f"{x} 8B bf16")] for x in PHASES)
    assert prefill
    assert all(row["hgmma"] > 0 and row["async_copies"] > 0 for row in prefill)
    assert decode
    assert all(row["hmma"] > 0 and row["async_copies"] > 0 for row in decode)
    # What the smallest GPUs since Ampere have for one program.
    assert max(row["shared"] for row in attention) <= 99 * 1024


PHASES = ("prefill", "decode")

SPILLING = """
from dataclasses import replace
from megarlhf_kernels.aot import compile_case
from megarlhf_kernels.paged_attention import compile_cases
case = next(case for case in compile_cases() if case.variant == "decode 1B bf16 blocks of 256")
print(compile_case(replace(case, options={**case.options, "maxnreg": 32})).stack)
"""


@pytest.mark.slow
def test_spills_are_seen(tmp_path: Path) -> None:
    """A kernel of 63 registers is given half of them."""
    pytest.importorskip("triton")
    done = in_own_process(tmp_path, "-c", SPILLING)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


@pytest.mark.parametrize("outcome", [Compiled(255, 8, 0, 0, 0, 0), ValueError("no such type")])
def test_what_is_wrong_is_told(outcome: Compiled | Exception) -> None:
    future: Future[Compiled] = Future()
    if isinstance(outcome, Compiled):
        future.set_result(outcome)
    else:
        future.set_exception(outcome)
    (told,) = report_case({"kernel": "a.b", "variant": "c"}, future)
    assert told == ("a.b, c: spills, 8 bytes" if isinstance(outcome, Compiled) else "a.b, c: no such type")
