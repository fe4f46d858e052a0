"""Planned bytes beside measured ones, on a CPU: layouts, number formats, offloading and recomputation.

    python tools/measure_memory.py --json benchmarks/memory_plan_cpu.json      every case, and what is committed
    python tools/measure_memory.py --only "tensor 2"                           cases whose names have these words

Each case is a real role on real gloo ranks: a small Llama of random weights takes optimiser steps and scores. Weights,
gradients and optimiser state are the storages behind its tensors. The peak of a phase adds the most bytes that torch's
allocator had given out at once meanwhile, temporary ones inside of operations included, as its profiler reports them.
Planned is what `megarlhf plan` counts with, for the local layers of a CPU. docs/plan.md has the table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Its parts are beside it in tools.memory_bench.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.multiprocessing.spawn import start_processes

from megarlhf.observe.provenance import machine, versions
from megarlhf.parallel.mesh import STORE
from tools.memory_bench.cases import CASES, Case
from tools.memory_bench.measure import measured

PARTS = ("weights", "gradients", "optimizer", "peak")


def compare(case: Case, ranks: Sequence[dict[str, dict[str, int]]]) -> dict[str, Any]:
    """Planned and measured bytes of the rank where each is most."""
    rows: dict[str, Any] = {}
    for phase, planned in case.planned().items():
        if phase in ranks[0]:
            found = {part: max(rank[phase][part] for rank in ranks) for part in PARTS}
            plan = (planned.weights, planned.gradients, planned.optimiser, planned.total)
            rows[phase] = {part: [size, found[part]] for part, size in zip(PARTS, plan, strict=True)}
    return {"case": case.name, "settings": described(case), "planned_and_measured": rows}


def described(case: Case) -> dict[str, Any]:
    """What a case is, for a reader of the file."""
    return {**asdict(case), "layout": {name: value for name, value in case.layout if value not in (1, False)}}


def run(case: Case) -> list[dict[str, dict[str, int]]]:
    """What each rank of a case measures."""
    with tempfile.TemporaryDirectory() as directory:
        # Forked off a server that has imported what measures, once.
        start_processes(_rank, (case, directory), nprocs=case.layout.world_size, start_method="forkserver")
        return [json.loads((Path(directory) / str(rank)).read_text()) for rank in range(case.layout.world_size)]


def _rank(rank: int, case: Case, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.layout.world_size)}
    os.environ[STORE] = f"{directory}/store"
    (Path(directory) / str(rank)).write_text(json.dumps(measured(case)))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words in the names of the cases to measure")
    parser.add_argument("--json", type=Path, help="file to write")
    args = parser.parse_args()
    multiprocessing.set_forkserver_preload(["tools.memory_bench.measure"])
    rows = []
    for case in (case for case in CASES if args.only in case.name):
        rows.append(compare(case, run(case)))
        print("\n".join(table(rows[-1:])), flush=True)
    if args.json:
        found = {"machine": machine(torch.device("cpu")), "versions": versions(), "cases": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of docs/plan.md: MiB of the peak of both phases, and planned over measured of each part."""
    lines = []
    for row in rows:
        learnt, scored = (row["planned_and_measured"][phase] for phase in ("train", "score"))
        parts = [f"{_ratio(learnt[part]):.3f}" for part in PARTS]
        peak = f"{learnt['peak'][0] / 2**20:.1f} | {learnt['peak'][1] / 2**20:.1f}"
        lines.append(
            f"| {row['case']} | {' | '.join(parts[:3])} | {peak} | {parts[3]} | {_ratio(scored['peak']):.3f} |"
        )
    return lines


def _ratio(both: Sequence[int]) -> float:
    planned, found = both
    return planned / found


if __name__ == "__main__":
    main()
