"""What a start with context ranks says of itself, and what its ranks hold between them."""

from __future__ import annotations

from megarlhf.checkpoint.model_directory import weight_bytes
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole
from megarlhf.models.spec import preset
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runtime.roles import role_settings
from megarlhf.runtime.settings import RanksConfig
from tests.helpers.ranks import run_ranks


def told(layout: ParallelLayout) -> tuple[str, int, list[int], list[int]]:
    """The last line of the table, bytes of one copy of the weights, and the ranks of this one's sequence and copies."""
    mesh = start(layout, seed=1)
    settings = role_settings(RanksConfig(layout=layout), mesh)
    role = FrozenRole("model", preset("tiny-xs"), "language", LabelLogprobs(1.0), settings, mesh)
    last = settings.compute.choices[-1]
    said = f"{last.part}: {last.implementation} ({last.reason})"
    return said, weight_bytes(role), mesh.ranks("context"), mesh.ranks("loss")


def test_ranks_that_share_a_sequence_are_neighbours_and_hold_one_copy_each() -> None:
    ranks = run_ranks(told, 4, ParallelLayout(context=2, data=2))
    assert [rank[2] for rank in ranks] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert all(rank[3] == [0, 1, 2, 3] for rank in ranks)
    assert {rank[1] for rank in ranks} == {4 * preset("tiny-xs").parameters}
    assert ranks[0][0] == "sequences: on 2 ranks, keys and values gathered (layout.context)"
    (alone,) = run_ranks(told, 1, ParallelLayout())
    assert alone[0].startswith("CUDA graphs: off")
