"""Without a GPU nothing runs in Triton, installed or not: its interpreter would hide a kernel that cannot run."""

from __future__ import annotations

import pytest
import torch

from megarlhf.parallel.layout import ParallelLayout
from megarlhf.rollout.sampling import SamplingConfig
from tests.helpers.ranks import run_ranks
from tests.rollout.worlds import actor, engine, prompts


def refuse(kernel: object, _grid: object) -> None:
    raise AssertionError(f"{kernel} was launched")


def roll_and_score() -> int:
    from triton.runtime.jit import KernelInterface  # what both the compiler's and the interpreter's kernels are

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelInterface, "__getitem__", refuse)
        role = actor(ParallelLayout())
        rollout = engine(role).generate(prompts(), SamplingConfig(max_new_tokens=4), seed=1, group_size=2)
        return len(role.score(rollout))


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs run Triton kernels")
def test_rollouts_launch_no_triton_kernel() -> None:
    pytest.importorskip("triton")
    assert run_ranks(roll_and_score, 1) == [10]
