"""The table of choices says what will really run."""

from __future__ import annotations

import pytest
import torch

from megarlhf.models.compute import Choice, ComputeConfig, resolve
from megarlhf_kernels._triton import interpreted

CPU = torch.device("cpu")


def choice_of(part: str) -> Choice:
    return next(choice for choice in resolve(ComputeConfig(), CPU).choices if choice.part == part)


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash-attn may be installed with a GPU")
def test_rollout_attention_says_which_implementation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice_of("rollout attention") == Choice("rollout attention", "torch, paged", "flash-attn needs a GPU")
    assert choice_of("log-probs, losses, GAE") == Choice("log-probs, losses, GAE", "torch", "Triton needs a GPU")
    if not interpreted():
        return
    monkeypatch.setenv("MEGARLHF_KERNELS", "triton")
    assert choice_of("rollout attention").implementation == "Triton, paged"
    assert choice_of("log-probs, losses, GAE").implementation == "Triton"
