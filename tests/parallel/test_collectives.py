"""Named-axis collectives on real ranks, against what each rank is known to hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megarlhf.batch.rollouts import PolicyRows, Rollout
from megarlhf.errors import LayoutError
from megarlhf.parallel.collectives import (
    all_reduce,
    broadcast,
    broadcast_object,
    check_divides,
    gather,
    gather_rows,
    own_part,
)
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Axis, start
from tests.helpers.models import ragged_rollout
from tests.helpers.ranks import run_ranks

AXES: tuple[Axis, ...] = ("tensor", "pipeline", "data", "model", "world")
LAYOUT = ParallelLayout(tensor=2, data=2)
MEMBERS = {
    "tensor": {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)},
    "pipeline": {rank: (rank,) for rank in range(4)},
    "data": {0: (0, 2), 1: (1, 3), 2: (0, 2), 3: (1, 3)},
    "model": {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)},
    "world": dict.fromkeys(range(4), (0, 1, 2, 3)),
}
"""Who shares each axis: tensor ranks are neighbours, data ranks come last."""


def whole() -> PolicyRows:
    rows = ragged_rollout(8)
    rollout = Rollout(**{**vars(rows), "answers": tuple("abcdefgh")})
    return PolicyRows(rollout, rows.labels.float(), 2.0 * rows.labels.float())


def work(layout: ParallelLayout) -> dict[str, Any]:
    mesh = start(layout, seed=1)
    seen: dict[str, Any] = {}
    for axis in AXES:
        mine = torch.tensor([float(mesh.rank), 10.0])
        ragged = torch.full((mesh.rank, 2), float(mesh.rank))  # rank 0 has no row at all
        size = mesh.size(axis)
        seen[axis] = {
            "sum": all_reduce(mine, mesh, axis),
            "max": all_reduce(mine, mesh, axis, op="max"),
            "min": all_reduce(mine, mesh, axis, op="min"),
            "gather": gather(ragged, mesh, axis)[:, 0],
            "broadcast": broadcast(mine, mesh, axis, source=size - 1),
            "object": broadcast_object({"rank": mesh.rank}, mesh, axis, source=size - 1),
            "flags": gather(torch.tensor([mesh.rank % 2 == 0]), mesh, axis),
        }
        assert mine.tolist() == [mesh.rank, 10.0]  # inputs are left as they are
    own = whole().rows(own_part(8, mesh))
    seen["own"] = own.rollout.prompt_ids
    if layout.data == 2:
        with pytest.raises(ValueError, match="3 rows do not divide over 2 data ranks; 1 are left over"):
            check_divides(whole().rows(slice(0, 3)), mesh)
    seen["part"] = [own_part(count, mesh) for count in (0, 1, 2, 5)]
    # Each data rank's rows as wide as its own longest text, as a sampler would leave them.
    together = gather_rows(own.trimmed(int(own.lengths.max()) - 1), mesh)
    seen["round trip"] = vars(together) | vars(together.rollout)
    seen["place"] = (mesh.tensor_rank, mesh.pipeline_rank, mesh.data_rank, mesh.is_main)
    return seen


def test_every_collective_over_every_axis() -> None:
    expected = whole()
    for number, rank in enumerate(run_ranks(work, 4, LAYOUT)):
        for axis in AXES:
            members, seen = MEMBERS[axis][number], rank[axis]
            assert seen["sum"].tolist() == [sum(members), 10.0 * len(members)]
            assert seen["max"].tolist() == [max(members), 10.0]
            assert seen["min"].tolist() == [min(members), 10.0]
            assert seen["gather"].tolist() == [float(member) for member in members for _ in range(member)]
            assert seen["broadcast"].tolist() == [members[-1], 10.0]
            assert seen["object"] == {"rank": members[-1]}
            assert seen["flags"].tolist() == [member % 2 == 0 for member in members]
        assert rank["place"] == (number % 2, 0, number // 2, number == 0)
        assert rank["own"].tolist() == list(range(4 * (number // 2), 4 * (number // 2) + 4))
        parts = [(0, 0), (0, 1), (0, 1), (0, 3)] if number < 2 else [(0, 0), (1, 1), (1, 2), (3, 5)]
        assert [(part.start, part.stop) for part in rank["part"]] == parts
        for name, value in (vars(expected) | vars(expected.rollout)).items():
            found = rank["round trip"][name]
            if isinstance(value, torch.Tensor):
                assert torch.equal(found, value), name
            elif name == "answers":
                assert found == tuple("abcdefgh")


def test_the_pipeline_axis() -> None:
    for number, rank in enumerate(run_ranks(work, 2, ParallelLayout(pipeline=2))):
        assert rank["place"] == (0, number, 0, number == 0)
        assert rank["pipeline"]["gather"].tolist() == [1.0]
        assert rank["data"]["sum"].tolist() == [number, 10.0]
        assert rank["own"].tolist() == list(range(8))


def misfit() -> str:
    try:
        start(LAYOUT, seed=1)
    except LayoutError as error:
        return str(error)
    return "started"


def test_ranks_that_do_not_fit_are_counted() -> None:
    message = run_ranks(misfit, 1)[0]
    assert message.startswith("layout needs 4 ranks (tensor 2 x pipeline 1 x data 2) but 1 were started")
