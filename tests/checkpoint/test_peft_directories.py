"""Adapters that PEFT wrote become part of their base's weights by `convert`; nothing starts from them alone."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from megarlhf import cli
from megarlhf.checkpoint.adapters import PEFT_WEIGHTS
from megarlhf.checkpoint.hf_convert import Options, to_hf, to_megatron
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.errors import CheckpointError
from tests.helpers.models import language_model, score_model
from tests.helpers.peft_directory import ALPHA, RANK, TARGETS, adapters, weights

QUIET = Options(progress=False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder: Path = tmp_path_factory.mktemp("bases")
    language_model(folder / "language", seed=1)
    score_model(folder / "scalar", seed=3)
    return {name: folder / name for name in ("language", "scalar")}


def merged(source: Path, folder: Path, **options: Any) -> dict[str, Tensor]:
    """What a conversion there and back makes of the directory."""
    to_megatron(source, folder / "megatron", Options(progress=False, **options))
    to_hf(folder / "megatron", folder / "hf", QUIET)
    return weights(folder / "hf")


@pytest.mark.parametrize(
    ("changes", "scale"), [({}, ALPHA / RANK), ({"use_rslora": True, "target_modules": ".*_proj"}, ALPHA / RANK**0.5)]
)
def test_weights_are_those_of_base_and_adapters(
    changes: dict[str, Any], scale: float, bases: dict[str, Path], tmp_path: Path
) -> None:
    tensors = adapters(tmp_path / "peft", bases["language"], **changes)
    found, base = merged(tmp_path / "peft", tmp_path), weights(bases["language"])
    assert found.keys() == base.keys()
    for name, weight in base.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in tensors:
            assert torch.equal(found[name], weight), name
            continue
        added = tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        torch.testing.assert_close(found[name], weight + scale * added, atol=1e-5, rtol=1e-5, msg=name)
        assert not torch.allclose(found[name], weight, atol=0.1)


def test_a_scalar_head_that_was_trained_is_taken(bases: dict[str, Path], tmp_path: Path) -> None:
    tensors = adapters(tmp_path / "peft", bases["scalar"], modules_to_save=["score"])
    head = torch.full_like(weights(bases["scalar"])["score.weight"], 0.25)
    save_file({**tensors, "base_model.model.score.weight": head}, tmp_path / "peft" / PEFT_WEIGHTS)
    assert torch.equal(merged(tmp_path / "peft", tmp_path)["score.weight"], head)


def test_a_start_from_adapters_names_the_command_that_makes_a_start(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    adapters(tmp_path / "peft", bases["language"])
    with pytest.raises(CheckpointError, match="has adapters in PEFT's form and no weights") as refused:
        describe_model("peft")
    command = shlex.split(str(refused.value).split("`")[1])
    assert command[:2] == ["megarlhf", "convert"]
    assert cli.main(command[1:]) == 0
    assert describe_model("NEW").spec == describe_model(str(bases["language"])).spec


def test_the_base_may_be_elsewhere(bases: dict[str, Path], tmp_path: Path) -> None:
    adapters(tmp_path / "here", bases["language"])
    adapters(tmp_path / "away", bases["language"], base_model_name_or_path="meta-llama/Llama-3.1-8B")
    with pytest.raises(
        CheckpointError, match=r"'meta-llama/Llama-3.1-8B' is no Hugging Face directory here; .*base=DIR"
    ):
        to_megatron(tmp_path / "away", tmp_path / "megatron", QUIET)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    found = merged(tmp_path / "away", tmp_path / "one", base=str(bases["language"]))
    expected = merged(tmp_path / "here", tmp_path / "two")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_cannot_be_done_with_them_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    adapters(tmp_path / "peft", bases["language"])
    with pytest.raises(CheckpointError, match="leave base out"):
        to_megatron(bases["language"], tmp_path / "out", Options(base=str(bases["language"])))
    with pytest.raises(CheckpointError, match="leave verify out"):
        to_megatron(tmp_path / "peft", tmp_path / "out", Options(verify=lambda *_: None))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora=True is not known here; merge them with peft"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern="),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": 3}, r"is \[2, 64\], base and r=3 want \[3, 64\]"),
        ({"target_modules": [*TARGETS, "k_proj"]}, "the adapter of model.layers.0.self_attn.k_proj.weight is missing"),
    ],
)
def test_another_way_to_add_them_is_refused(
    changes: dict[str, Any], said: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapters(tmp_path / "peft", bases["language"], **changes)
    with pytest.raises(CheckpointError, match=said):
        to_megatron(tmp_path / "peft", tmp_path / "out", QUIET)


def lose(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if not key.endswith(name)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lose("layers.1.self_attn.v_proj.lora_B.weight"), "lora_A.weight is there and .*lora_B.weight is not"),
        (lambda tensors: {**tensors, "base_model.model.lm_head.bias": torch.ones(3)}, "lm_head.bias"),
        (lambda tensors: {**tensors, "base_model.model.model.norm.bias.weight": torch.ones(3)}, "norm.bias"),
        (lambda _: {"base_model.model.model.norm.weight": torch.ones(32)}, "the adapter of .* is missing"),
        (lambda tensors: {key: tensor * float("nan") for key, tensor in tensors.items()}, "not finite"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], said: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    tensors = adapters(tmp_path / "peft", bases["language"])
    save_file(change(tensors), tmp_path / "peft" / PEFT_WEIGHTS)
    with pytest.raises(CheckpointError, match=said):
        to_megatron(tmp_path / "peft", tmp_path / "out", QUIET)


def test_files_without_adapters_are_named(bases: dict[str, Path], tmp_path: Path) -> None:
    adapters(tmp_path / "peft", bases["language"])
    shutil.move(tmp_path / "peft" / PEFT_WEIGHTS, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="only safetensors are read"):
        to_megatron(tmp_path / "peft", tmp_path / "out", QUIET)
    adapters(tmp_path / "empty", bases["language"], target_modules=".*_proj")
    norm = {"base_model.model.model.norm.weight": weights(bases["language"])["model.norm.weight"]}
    save_file(norm, tmp_path / "empty" / PEFT_WEIGHTS)
    with pytest.raises(CheckpointError, match="the adapter of any is missing"):
        to_megatron(tmp_path / "empty", tmp_path / "out", QUIET)


def test_what_peft_makes_is_what_peft_computes(bases: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=[*TARGETS, "k_proj"], init_lora_weights=False)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(bases["language"]), lora)
    model.save_pretrained(tmp_path / "peft")
    merged(tmp_path / "peft", tmp_path)
    tokens = torch.arange(2, 34)[None]
    with torch.no_grad():
        theirs = model(input_ids=tokens).logits
        ours = LlamaForCausalLM.from_pretrained(tmp_path / "hf")(input_ids=tokens).logits
        base = LlamaForCausalLM.from_pretrained(bases["language"])(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(base, theirs, atol=0.01)
