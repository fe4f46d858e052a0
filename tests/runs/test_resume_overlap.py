"""A run whose sums of gradients and gathering of weights overlap with work is stopped and goes on bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.models import policy_and_judge
from tests.helpers.ranks import run_ranks
from tests.runs.test_resume import final_weights, logged, ppo_settings

BOTH = {"overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    found: Path = tmp_path_factory.mktemp("overlap")
    policy_and_judge(found)
    return str(found)


def run_ppo(layout: ParallelLayout, compute: dict[str, bool], stop: int | None, where: str, folder: str) -> dict:
    mesh = start(layout, seed=1)
    return final_weights(ppo_settings(Path(where), layout, folder, compute=compute), stop, mesh)


def pieces(compute: dict[str, bool], stops: list[int | None], where: Path, folder: str) -> dict[str, Tensor]:
    """The run on two data ranks, stopped after each of these steps: its last weights."""
    layout = ParallelLayout(data=2)
    return [run_ranks(run_ppo, 2, layout, compute, stop, str(where), folder)[0] for stop in stops][-1]


def test_a_stopped_run_that_overlaps_goes_on_bit_for_bit(folder: str, tmp_path: Path) -> None:
    """Stopped once both learners have taken steps. And it learns what it learns where nothing overlaps."""
    whole = pieces(BOTH, [None], tmp_path / "whole", folder)
    again = pieces(BOTH, [3, None], tmp_path / "again", folder)
    plain = pieces({}, [None], tmp_path / "plain", folder)
    assert logged(tmp_path / "again") == logged(tmp_path / "whole") == logged(tmp_path / "plain")
    for name, weight in whole.items():
        assert torch.equal(again[name], weight), name
        assert torch.equal(plain[name], weight), name
