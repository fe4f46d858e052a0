"""The table of choices says what will really run."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from megarlhf.errors import ConfigError
from megarlhf.models import compute
from megarlhf.models.compute import ATTENTION_VARIABLES, Choice, ComputeConfig, resolve
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


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """An H100 with Transformer Engine, as far as `resolve` asks."""
    found = {"transformer_engine": object()}
    monkeypatch.setattr(compute.importlib.util, "find_spec", found.get)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(compute, "_choices", lambda *_: ())
    for name in ATTENTION_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return torch.device("cuda", 0)


@pytest.mark.parametrize("name", ATTENTION_VARIABLES)
def test_a_variable_that_megatron_would_assert_on_is_named(
    name: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(ComputeConfig(), gpu).transformer_engine
    monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigError, match=rf"{name}=0 contradicts the run's layers, .* wants 1; unset {name}"):
        resolve(ComputeConfig(), gpu)
    assert not resolve(ComputeConfig(layers="local"), gpu).transformer_engine
    monkeypatch.setenv(name, "1")
    for device in (gpu, CPU):
        with pytest.raises(ConfigError, match=rf"{name}=1 contradicts"):
            resolve(ComputeConfig(layers="local" if device is gpu else "auto"), device)
    assert resolve(ComputeConfig(), gpu).transformer_engine


def test_fp8_needs_a_gpu_that_has_it(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(ComputeConfig(fp8="hybrid"), gpu).fp8 == "hybrid"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 0))
    with pytest.raises(
        ConfigError, match=r"compute.fp8=e4m3 needs a GPU of compute capability 8.9 .* this one has 8.0"
    ):
        resolve(ComputeConfig(fp8="e4m3"), gpu)
    assert resolve(ComputeConfig(), gpu).fp8 is None


def test_each_fp8_recipe_has_its_name_its_sizes_and_its_gpus(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    off, current, blockwise = (
        ComputeConfig(),
        ComputeConfig(fp8="hybrid"),
        ComputeConfig(fp8="e4m3", fp8_recipe="blockwise"),
    )
    found = [resolve(config, gpu) for config in (off, current, blockwise)]
    assert [each.fp8_recipe for each in found] == ["tensorwise", "tensorwise", "blockwise"]
    assert [each.fp8_multiple for each in found] == [1, 16, 128]
    assert [config.fp8_multiple for config in (off, current, blockwise)] == [1, 16, 128]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (8, 9))
    assert resolve(current, gpu).fp8 == "hybrid"
    with pytest.raises(ConfigError) as caught:
        resolve(blockwise, gpu)
    assert "needs a GPU of compute capability 9.0 or more, but this one has 8.9; set compute.fp8_recipe=current or" in (
        str(caught.value)
    )


@pytest.mark.parametrize("fp8", ["off", "hybrid"])
def test_scales_of_numbers_before_are_refused(fp8: Literal["off", "hybrid"], gpu: torch.device) -> None:
    with pytest.raises(ConfigError, match=r"fp8_recipe=delayed .* saved state none; set .* to current or blockwise"):
        resolve(ComputeConfig(fp8=fp8, fp8_recipe="delayed"), gpu)
