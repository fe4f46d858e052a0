"""What a role's phases take on a CPU, counted by torch's own allocator: every storage, temporary ones too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megarlhf.batch.rollouts import PolicyRows, Rollout, ValueRows
from megarlhf.batch.supervised import TokenBatch
from megarlhf.checkpoint.model_directory import load_tensors
from megarlhf.checkpoint.random_weights import RandomTensors
from megarlhf.models.compute import ComputeConfig, resolve
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs, PositionValues
from megarlhf.models.role import RoleSettings, TrainableRole
from megarlhf.parallel.mesh import Mesh, start
from megarlhf.parallel.micro_batches import Loss
from megarlhf.parallel.offload import resident_bytes
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig, value_loss
from megarlhf.trainers.sft import next_token_loss
from tools.memory_bench.cases import PROMPT, SPEC, WIDTH, Case

REPEATS = 3


def measured(case: Case) -> dict[str, dict[str, int]]:
    """Bytes of this rank by phase and part, and the most that were live at once. Collective over the case's ranks."""
    mesh = start(case.layout, seed=1)
    role = _role(case, mesh)
    rows, loss = _lesson(case, role)
    role.update(rows, loss)  # which gives the optimiser its moments
    role.leave()
    with role.resident("weights"):
        scored = _beside(lambda: role.score(rows), role)
    with role.resident(*role.parts):
        learnt = _beside(lambda: role.update(rows, loss), role)
    return {"score": scored, "train": learnt}


def _beside(work: Callable[[], object], role: TrainableRole) -> dict[str, int]:
    """What is resident, each storage once: masters of fp32 weights are those weights."""
    weights = role.tensors("weights")
    resident = {"weights": resident_bytes(weights)}
    for part in ("gradients", "optimizer"):
        resident[part] = resident_bytes([*weights, *role.tensors(part)]) - resident["weights"]
    return {
        **resident,
        "peak": sum(resident.values()) + peak_bytes(work, REPEATS),
    }


def peak_bytes(work: Callable[[], object], repeats: int) -> int:
    """The most bytes that `work` had allocated at once and not yet given back; the least of `repeats` times.

    On a busy machine what is let go is late: by gloo's threads of what they have sent, and in the profiler's record.
    """
    return min(_peak_bytes(work) for _ in range(repeats))


def _peak_bytes(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    profiler: Any = seen.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def _role(case: Case, mesh: Mesh) -> TrainableRole:
    compute = resolve(ComputeConfig(dtype=case.dtype, recompute=case.recompute), mesh.device)
    reading = PositionValues() if case.role == "critic" else LabelLogprobs(1.0)
    settings = RoleSettings(compute, case.cut, "host" if case.offload else "none")
    role = TrainableRole(case.role, SPEC, reading.head, reading, settings, mesh)
    load_tensors(role, RandomTensors(SPEC, 1))
    role.prepare(OptimConfig(lr=1e-6, distributed=case.distributed), steps=10)
    return role


def _lesson(case: Case, role: TrainableRole) -> tuple[Any, Loss[Any]]:
    """Rows of a case's lengths, and the role's loss on them."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, SPEC.vocab_size, (case.rows, WIDTH), generator=generator)
    lengths = torch.tensor(case.lengths)
    starts = lengths * PROMPT // WIDTH
    ended, none = torch.ones(case.rows, dtype=torch.bool), torch.zeros(case.rows, WIDTH - 1)
    rollout = Rollout(tokens, starts, lengths, ended, none, torch.arange(case.rows), ("",) * case.rows)
    numbers = torch.randn(case.rows, WIDTH - 1, generator=generator)
    cfg = PPOConfig(run_dir=Path("runs/none"))
    match case.role:
        case "actor":
            return PolicyRows(rollout, none - 7, numbers), policy_loss(role, cfg)
        case "critic":
            return ValueRows(rollout, none, numbers), value_loss(role, cfg)
        case "model":
            return TokenBatch(tokens, lengths, rollout.response_mask), next_token_loss(role)
