"""Planned beside measured memory: the committed figures, the document's table, and some cases measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_ranks
from tools.measure_memory import PARTS, compare, described, table
from tools.memory_bench.cases import CASES, Case
from tools.memory_bench.measure import measured

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = json.loads((ROOT / "benchmarks" / "memory_plan_cpu.json").read_text(encoding="utf-8"))["cases"]
BY_NAME = {case.name: case for case in CASES}
KEPT, PEAK = 0.05, 0.15
"""How far a plan may be off: of weights, gradients and optimiser state, and of a phase's peak."""
AGAIN = (
    "one rank, recompute",
    "one rank, selective recompute",
    "one rank, recompute of 3 layers",
    "critic, nothing offloaded",
    "data 2, float32, nothing offloaded",
    "pipeline 2 x virtual 2",
    "packed, critic, nothing offloaded",
)
"""Without sums over tensor ranks, whose buffers a busy machine's gloo keeps for longer than they are needed."""


def off(row: dict[str, Any]) -> list[tuple[str, str, float]]:
    """Parts of a row's phases that are farther off than they may be."""
    ratios = [
        (phase, part, planned / found if found else 1.0 + bool(planned))
        for phase, parts in row["planned_and_measured"].items()
        for part, (planned, found) in parts.items()
    ]
    return [
        (phase, part, ratio) for phase, part, ratio in ratios if abs(ratio - 1) > (PEAK if part == "peak" else KEPT)
    ]


@pytest.mark.parametrize("row", COMMITTED, ids=lambda row: row["case"])
def test_what_was_measured_is_near_what_is_planned(row: dict[str, Any]) -> None:
    assert off(row) == []


def test_every_case_is_committed_with_what_is_planned_now() -> None:
    assert [row["case"] for row in COMMITTED] == [case.name for case in CASES]
    assert len(CASES) >= 12
    for row in COMMITTED:
        case = BY_NAME[row["case"]]
        assert row["settings"] == described(case)
        now = case.planned()
        for phase, parts in row["planned_and_measured"].items():
            of = now[phase]
            planned = [of.weights, of.gradients, of.optimiser, of.total]
            assert [parts[part][0] for part in PARTS] == planned


def test_the_cases_cover_what_changes_memory() -> None:
    layouts = [case.layout for case in CASES]
    for axis in ("tensor", "pipeline", "context", "data", "virtual_pipeline"):
        assert any(dict(layout)[axis] > 1 for layout in layouts)
    assert any(layout.sequence_parallel for layout in layouts)
    for values in (
        {case.dtype for case in CASES},
        {case.offload for case in CASES},
    ):
        assert len(values) == 2
    assert {case.recompute for case in CASES} == {"none", "selective", "full", 2, 3}
    assert sum(case.micro_batch_tokens is not None for case in CASES) >= 2
    assert {case.role for case in CASES} == {"actor", "critic", "model"}
    assert {case.distributed for case in CASES} == {True, False}


def test_the_document_has_the_same_table() -> None:
    document = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    rows = [line for line in document.splitlines() if line.startswith(tuple(f"| {case.name} |" for case in CASES))]
    assert rows == table(COMMITTED)


@pytest.mark.parametrize("name", AGAIN)
def test_measured_again(name: str) -> None:
    case: Case = BY_NAME[name]
    row = compare(case, run_ranks(measured, case.layout.world_size, case))
    assert off(row) == []
