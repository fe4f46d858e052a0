"""Which GPU a rank takes, and what it tells torch of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megarlhf.errors import LayoutError
from megarlhf.parallel import mesh
from tests.helpers.ranks import run_ranks

CPU = torch.device("cpu")


def show(patch: pytest.MonkeyPatch, rank: int, gpus: int) -> None:
    patch.setenv("LOCAL_RANK", str(rank))
    patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    patch.setattr(torch.cuda, "device_count", lambda: gpus)


@pytest.mark.parametrize(
    ("rank", "gpus", "device"),
    [(0, 8, "cuda:0"), (7, 8, "cuda:7"), (0, 1, "cuda:0"), (3, 1, "cuda:0"), (1, 0, "cpu")],
)
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_sees(
    rank: int, gpus: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is what `srun --gpus-per-task=1` shows to each task, whatever its number on the machine."""
    show(monkeypatch, rank, gpus)
    assert mesh.local_device() == torch.device(device)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    show(monkeypatch, 2, 2)
    with pytest.raises(
        LayoutError, match=r"LOCAL_RANK=2 but 2 GPUs are visible; start at most 2 ranks on this machine"
    ):
        mesh.local_device()


@pytest.mark.parametrize("rank", ["3", None])
def test_torch_hears_at_once_which_gpu_is_this_ranks(rank: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a barrier guesses the GPU, and communicators are made in the middle of the first step."""
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(mesh.dist, "init_process_group", lambda **options: told.append(options))
    if rank is None:
        monkeypatch.delenv("RANK", raising=False)
    else:
        monkeypatch.setenv("RANK", rank)
    for device in (torch.device("cuda", 3), CPU):
        mesh._init_process_group(device, 5.0)
    assert [(each["backend"], each["device_id"]) for each in told] == [
        ("nccl", torch.device("cuda", 3)),
        ("gloo", None),
    ]
    assert all(each["timeout"].total_seconds() == 5.0 for each in told)
    assert all(("store" in each) == (rank is None) for each in told)


def visible() -> tuple[str, str]:
    import os

    return os.environ["CUDA_VISIBLE_DEVICES"], str(mesh.local_device())


def test_ranks_of_a_test_do_without_gpus_where_there_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert run_ranks(visible, 2) == [("", "cpu")] * 2
