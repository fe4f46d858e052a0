"""Packages that do not go together are named, each with what to do; those of this environment do."""

from __future__ import annotations

from pathlib import Path

import pytest

from megarlhf.gates.packages import installed, mismatches, packages_gate

HERE = installed()
ENGINE = {"transformer-engine": "2.11.0", "transformer-engine-torch": "2.11.0", "transformer-engine-cu13": "2.11.0"}


def found(changes: dict[str, str | None], *, gpu: bool = False, driver: bool = False) -> list[str]:
    """With some versions changed, or gone, where torch is for CUDA 13."""
    changed = {**HERE, **changes}
    there = {name: version for name, version in changed.items() if version is not None}
    return mismatches(there, "13.0", gpu=gpu, driver=driver)


def test_this_environment_has_none() -> None:
    gate = packages_gate()
    assert gate.holds, gate.remedy
    assert gate.value == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch": "2.8.0"}, ["megarlhf needs torch>=", "2.8.0 is installed", "pip install"]),
        ({"einops": None}, ["megarlhf needs einops, which is not installed; pip install 'einops>=0.8'"]),
        ({"megatron-core": "0.15.3"}, ["megarlhf needs megatron-core", "0.15.3 is installed"]),
        ({**ENGINE, "transformer-engine-torch": "2.9.0"}, ["transformer-engine-torch 2.9.0 beside", "2.11.0"]),
        (
            {"transformer-engine": "2.11.0", "transformer-engine-cu12": "2.11.0"},
            ["transformer-engine-cu12 beside torch for CUDA 13.0", "transformer-engine[core-cu13]"],
        ),
        ({"apex": "0.9.10.dev0"}, ["apex 0.9.10.dev0 is PyPI's", "pip uninstall apex"]),
    ],
)
def test_what_does_not_go_together_is_named_with_what_to_do(changes: dict[str, str | None], said: list[str]) -> None:
    (line,) = found(changes)
    assert all(part in line for part in said), line


@pytest.mark.parametrize("changes", [{"torch": "2.12.0a0+0291f960b6.nv26.4"}, ENGINE, {"apex": "0.1"}])
def test_images_of_nvidia_carry_what_is_taken(changes: dict[str, str | None]) -> None:
    assert not [line for line in found(changes) if "triton" not in line]


def test_a_gpu_that_torch_does_not_see_is_said() -> None:
    (without,) = mismatches({**HERE, "torch": "2.13.0+cpu"}, None, gpu=False, driver=True)
    assert without == "torch 2.13.0+cpu is built without CUDA and this machine has a GPU; install the build with CUDA."
    (blind,) = found({}, driver=True)
    assert "sees no GPU of this machine" in blind
    assert not found({}, gpu=True, driver=True)


def test_an_engine_that_was_compiled_for_another_torch_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").touch()
    (tmp_path / "transformer_engine" / "pytorch.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = found({**ENGINE}, gpu=True, driver=True)
    assert line.startswith("transformer-engine 2.11.0 cannot be imported (undefined symbol: _ZN3c10)")
    assert "docs/install.md" in line
