"""What a run's iterations took, from its own metrics, and what moving its models to the host and back takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

from megarlhf.commands.plan import specs_of
from megarlhf.models.activations import Arithmetic
from megarlhf.models.compute import resolve
from megarlhf.models.phases import PhaseBytes, phases_of
from megarlhf.models.role import Role
from megarlhf.models.workload import Job, Split, Workload
from megarlhf.observe.work import WORKED
from megarlhf.parallel.collectives import barrier
from megarlhf.parallel.mesh import Mesh
from megarlhf.runs.settings import RunConfig

Rows = Sequence[Mapping[str, float]]
"""Metrics of iterations."""


def phases(rows: Rows, gpus: int) -> list[dict[str, Any]]:
    """Of each phase, and of the whole iteration: medians of seconds, of tokens and FLOPs a second, and of MFU.

    Rates of tokens are of all `gpus`, and of one; FLOP/s and MFU are of one. The iteration's tokens are those that it
    draws, or learns from where it draws none.
    """
    found: list[dict[str, Any]] = []
    for name in ("iteration", *WORKED, "estimate"):
        seconds = [row[f"time/{name}_s"] for row in rows if f"time/{name}_s" in row]
        if not seconds:
            continue
        of_phase: dict[str, Any] = {"phase": name, "seconds": statistics.median(seconds), "all_seconds": seconds}
        for rate in ("tokens_per_s", "flops_per_s"):
            if values := [row[key] for row in rows if (key := f"throughput/{name}_{rate}") in row]:
                of_phase[rate] = statistics.median(values)
        if "tokens_per_s" in of_phase:
            of_phase["tokens"] = [round(row[f"throughput/{name}_tokens_per_s"] * row[f"time/{name}_s"]) for row in rows]
            of_phase["tokens_per_s_per_gpu"] = of_phase["tokens_per_s"] / gpus
        if values := [row[f"mfu/{name}"] for row in rows if f"mfu/{name}" in row]:
            of_phase["mfu"] = statistics.median(values)
        found.append(of_phase)
    whole, counted = found[0], "rollout" if "time/rollout_s" in rows[0] else "train"
    tokens = [row[f"throughput/{counted}_tokens_per_s"] * row[f"time/{counted}_s"] for row in rows]
    rates = [each / row["time/iteration_s"] for each, row in zip(tokens, rows, strict=True)]
    whole["tokens_per_s"] = statistics.median(rates)
    whole["tokens_per_s_per_gpu"] = whole["tokens_per_s"] / gpus
    return found


def planned(work: Workload, cfg: RunConfig, mesh: Mesh) -> PhaseBytes:
    """What the plan says of the phase that takes most, on the rank where it does.

    On a GPU it is what torch allocates; on a CPU a process has its libraries besides.
    """
    compute, gpu = resolve(cfg.compute, mesh.device), mesh.device.type == "cuda"
    split = Split(cfg.layout, cfg.cut, compute.recompute, cfg.offload == "host", work.elsewhere)
    arithmetic = Arithmetic(compute.dtype.itemsize, engine=compute.transformer_engine, recompute=compute.recompute)
    job = Job(work, specs_of(work, {}), split, arithmetic, fp8_multiple=compute.fp8_multiple)
    memory = torch.cuda.mem_get_info(mesh.device)[1] if gpu else psutil.virtual_memory().total
    phases = [phase for phase in phases_of(job, memory) if not phase.phase.startswith("save")]  # nothing is saved here
    return max(phases, key=lambda phase: phase.total)


def moved(role: Role, repeats: int) -> dict[str, Any]:
    """Bytes that this rank sends to the host and fetches again, and how long each way takes. Collective.

    A pinned copy is what is measured on a GPU; on a CPU it is a copy in memory.
    """
    size = role.resident_bytes()
    there, back = [], []
    for _ in range(repeats):
        with role.resident(*role.parts):
            size = role.resident_bytes()
            _settled(role)
            begun = time.perf_counter()
        _settled(role)
        there.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        with role.resident(*role.parts):
            _settled(role)
            back.append(time.perf_counter() - begun)
    host, device = statistics.median(there), statistics.median(back)
    return {
        "role": role.name,
        "bytes": size,
        "to_host_s": host,
        "to_device_s": device,
        "to_host_gb_per_s": size / host / 1e9,
        "to_device_gb_per_s": size / device / 1e9,
    }


def _settled(role: Role) -> None:
    if role.mesh.device.type == "cuda":
        torch.cuda.synchronize(role.mesh.device)
    barrier(role.mesh)
