"""The table of choices says what will really run."""

from __future__ import annotations

import pytest
import torch

from megarlhf.models.compute import Choice, ComputeConfig, resolve
from megarlhf_kernels._triton import interpreted

CPU = torch.device("cpu")


def rollout_attention() -> Choice:
    return next(choice for choice in resolve(ComputeConfig(), CPU).choices if choice.part == "rollout attention")


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash-attn may be installed with a GPU")
def test_rollout_attention_says_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rollout_attention() == Choice("rollout attention", "torch, paged", "flash-attn needs a GPU")
    if not interpreted():
        return
    monkeypatch.setenv("MEGARLHF_KERNELS", "triton")
    assert rollout_attention().implementation == "Triton, paged"
