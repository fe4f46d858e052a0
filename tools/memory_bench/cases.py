"""What is measured: a layout, numbers, and how memory is spared; and what the plan says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megarlhf.models.activations import Arithmetic
from megarlhf.models.phases import PhaseBytes, phases_of
from megarlhf.models.recompute import Recompute
from megarlhf.models.spec import ModelSpec
from megarlhf.models.workload import Job, RoleWork, Split, Workload
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.micro_batches import Cut, InRows, InTokens

SPEC = ModelSpec(
    vocab_size=1024, hidden_size=128, layers=8, heads=4, kv_heads=2, ffn_size=384, head_dim=32, max_positions=1024
)
"""Large enough that activations outweigh what is left out, small enough for four ranks on two cores."""
PROMPT, RESPONSE, MICRO_BATCHES = 32, 96, 2
"""Tokens of a row, and micro-batches of a step on each data rank."""
WIDTH = PROMPT + RESPONSE
RAGGED = (WIDTH, 3 * WIDTH // 4, WIDTH // 2, WIDTH // 4)
"""Lengths of rows that are packed, as often one as another; each with as great a part of it prompt."""


@dataclass(frozen=True)
class Case:
    """One combination."""

    name: str
    layout: ParallelLayout
    role: Literal["actor", "critic", "model"] = "actor"
    """An actor's loss is fused, a critic has a scalar head, and a model under supervision goes through log-probs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    recompute: Recompute = "none"
    offload: bool = True
    distributed: bool = True
    micro_batch: int = 4
    micro_batch_tokens: int | None = None
    """In place of micro_batch: rows are then of lengths that fill it."""

    @property
    def cut(self) -> Cut:
        """What a micro-batch takes."""
        return InRows(self.micro_batch) if self.micro_batch_tokens is None else InTokens(self.micro_batch_tokens)

    @property
    def lengths(self) -> list[int]:
        """Of the rows of an optimiser step, over all data ranks."""
        if self.micro_batch_tokens is None:
            return [WIDTH] * (MICRO_BATCHES * self.micro_batch * self.layout.data)
        each = MICRO_BATCHES * self.layout.data * self.micro_batch_tokens // sum(RAGGED)
        return [*RAGGED] * each

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.lengths)

    @property
    def job(self) -> Job:
        """What the plan counts with."""
        head = "scalar" if self.role == "critic" else "language"
        loss = "fused" if self.role == "actor" else "composed"
        role = RoleWork(self.role, f"{self.role}.init", "", head, True, self.distributed, scores=1, loss=loss)
        work = Workload((role,), PROMPT, RESPONSE, self.rows, self.rows, "global_batch")
        split = Split(self.layout, self.cut, self.recompute, self.offload)
        arithmetic = Arithmetic(4 if self.dtype == "float32" else 2, engine=False, recompute=self.recompute, cpu=True)
        return Job(work, {self.role: SPEC}, split, arithmetic)

    def planned(self) -> dict[str, PhaseBytes]:
        """By phase, on the pipeline rank where the phase takes most."""
        return {phase.phase: phase for phase in phases_of(self.job, 0)}


TP2, PP2, DP2 = ParallelLayout(tensor=2), ParallelLayout(pipeline=2), ParallelLayout(data=2)
SP2 = ParallelLayout(tensor=2, sequence_parallel=True)
CASES = (
    Case("one rank", ParallelLayout()),
    Case("one rank, bfloat16", ParallelLayout(), dtype="bfloat16"),
    Case("one rank, recompute", ParallelLayout(), recompute="full"),
    Case("one rank, bfloat16, recompute", ParallelLayout(), dtype="bfloat16", recompute="full"),
    Case("one rank, selective recompute", ParallelLayout(), recompute="selective"),
    Case("one rank, bfloat16, selective recompute", ParallelLayout(), dtype="bfloat16", recompute="selective"),
    Case("one rank, recompute of 3 layers", ParallelLayout(), recompute=3),
    Case("critic, nothing offloaded", ParallelLayout(), role="critic", offload=False),
    Case("supervised, composed loss, bfloat16", ParallelLayout(), role="model", dtype="bfloat16"),
    Case("data 2", DP2, dtype="bfloat16"),
    Case("data 2, optimiser not distributed", DP2, dtype="bfloat16", distributed=False),
    Case("data 2, float32, nothing offloaded", DP2, offload=False),
    Case("tensor 2", TP2),
    Case("tensor 2, sequence parallel", SP2),
    Case("tensor 2, sequence parallel, bfloat16, recompute", SP2, dtype="bfloat16", recompute="full"),
    Case("pipeline 2", PP2),
    Case("pipeline 2, bfloat16, recompute", PP2, dtype="bfloat16", recompute="full", role="critic"),
    Case("pipeline 2 x virtual 2", ParallelLayout(pipeline=2, virtual_pipeline=2), micro_batch=2),
    Case("tensor 2 x pipeline 2", ParallelLayout(tensor=2, pipeline=2), dtype="bfloat16"),
    Case("tensor 2, selective recompute", TP2, recompute="selective"),
    Case("pipeline 2, recompute of 2 layers", PP2, recompute=2),
    Case("tensor 2 x data 2, recompute", ParallelLayout(tensor=2, data=2), recompute="full", dtype="bfloat16"),
    Case("context 2", ParallelLayout(context=2)),
    Case("context 2, critic, recompute", ParallelLayout(context=2), role="critic", recompute="full"),
    Case("context 2, supervised, bfloat16", ParallelLayout(context=2), role="model", dtype="bfloat16"),
    Case("context 2 x pipeline 2", ParallelLayout(context=2, pipeline=2), offload=False),
    Case("pipeline 2 x data 2", ParallelLayout(pipeline=2, data=2), role="model", offload=False),
    Case("packed", ParallelLayout(), micro_batch_tokens=640),
    Case("packed, bfloat16, recompute", ParallelLayout(), dtype="bfloat16", recompute="full", micro_batch_tokens=640),
    Case("packed, critic, nothing offloaded", ParallelLayout(), "critic", offload=False, micro_batch_tokens=640),
    Case("packed, tensor 2, sequence parallel", SP2, micro_batch_tokens=640),
    Case("packed, pipeline 2", PP2, role="model", dtype="bfloat16", micro_batch_tokens=640),
    Case("packed, context 2", ParallelLayout(context=2), micro_batch_tokens=640),
    Case("packed, data 2, selective recompute", DP2, recompute="selective", micro_batch_tokens=640),
)
