"""Which implementation runs, and what it says when it cannot."""

from __future__ import annotations

import logging

import pytest
import torch

from megarlhf_kernels import _triton, dispatch
from megarlhf_kernels.dispatch import use_triton

CPU = torch.zeros(1)


def test_auto_is_the_reference_on_a_cpu_also_where_the_interpreter_runs() -> None:
    assert use_triton("k", "auto", CPU) is False


def test_triton_by_name_runs_in_the_interpreter_and_not_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_triton("k", "triton", CPU) is True
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"k cannot run in Triton: the tensors are on cpu; use impl='reference'"):
        use_triton("k", "triton", CPU)
    monkeypatch.setattr(_triton, "INSTALLED", False)
    with pytest.raises(RuntimeError, match="the package triton is not installed"):
        use_triton("k", "triton", CPU)


def test_the_environment_replaces_auto_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.OVERRIDE, "triton")
    assert use_triton("k", "auto", CPU) is True
    assert use_triton("k", "reference", CPU) is False
    monkeypatch.setenv(dispatch.OVERRIDE, "fast")
    with pytest.raises(ValueError, match=r"MEGARLHF_KERNELS='fast' in the environment; must be 'auto'"):
        use_triton("k", "auto", CPU)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"impl: 'cuda'; must be 'auto', 'reference' or 'triton'"):
        use_triton("k", "cuda", CPU)  # type: ignore[arg-type]


def test_a_gpu_without_triton_gets_a_warning_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu(torch.Tensor):
        """Says that it is on a GPU, which is all that dispatch asks."""

        is_cuda = True

    monkeypatch.setattr(_triton, "INSTALLED", False)
    with caplog.at_level(logging.WARNING, "megarlhf_kernels"):
        for _ in range(3):
            assert use_triton("k", "auto", OnGpu()) is False
            assert use_triton("k", "auto", CPU) is False
    assert [record.getMessage() for record in caplog.records] == [
        "k runs its torch reference, which is slower: the package triton is not installed"
    ]
