"""A run of packed micro-batches that was stopped ends as one that never was."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from megarlhf.models.readings import LabelLogprobs
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers import ppo
from tests.helpers.models import frozen, name_of, whole_weights, worst
from tests.helpers.ranks import run_ranks
from tests.runs.test_resume import in_pieces, logged, policy_and_judge, ppo_settings, stopped_after


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("packed")
    policy_and_judge(folder)
    return str(folder)


def packed(layout: ParallelLayout, stop: int | None, where: str, folder: str) -> dict[str, torch.Tensor]:
    mesh = start(layout, seed=1)
    cfg = ppo_settings(Path(where), layout, folder, micro_batch_tokens=80)
    with stopped_after(stop) if stop else nullcontext():
        ppo.TRAINER.run(cfg, ppo.TRAINER.prepare(cfg), [], mesh)
    return {} if stop else whole_weights(frozen(f"{where}/model", LabelLogprobs(1.0), mesh))


@pytest.mark.parametrize("layout", [ParallelLayout(data=2), ParallelLayout(context=2)], ids=name_of)
def test_a_packed_run_goes_on_bit_for_bit(layout: ParallelLayout, folder: str, tmp_path: Path) -> None:
    (whole, _) = run_ranks(packed, 2, layout, None, str(tmp_path / "whole"), folder)
    run_ranks(packed, 2, layout, 2, str(tmp_path / "parts"), folder)
    (parts, _) = run_ranks(packed, 2, layout, None, str(tmp_path / "parts"), folder)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_a_state_of_context_ranks_goes_on_without_them_up_to_rounding(folder: str, tmp_path: Path) -> None:
    shared, alone = ParallelLayout(context=2), ParallelLayout()
    whole = in_pieces([(alone, None)], tmp_path / "whole", folder)
    moved = in_pieces([(shared, 2), (alone, 3), (shared, None)], tmp_path / "moved", folder)
    assert worst(moved, whole) < 1e-5
    first, other = (logged(tmp_path / name)[0] for name in ("whole", "moved"))
    assert other == pytest.approx(first, rel=1e-3, abs=1e-5)  # the same tokens were drawn
