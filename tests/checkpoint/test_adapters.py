"""Adapters that are saved in one layout load in another, merge on the way to Hugging Face, and are PEFT's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from megarlhf.checkpoint.adapters import PEFT_CONFIG, PEFT_WEIGHTS
from megarlhf.checkpoint.checksums import write_checksums
from megarlhf.checkpoint.hf_convert import Options, to_hf
from megarlhf.checkpoint.hf_verify import compare_logits
from megarlhf.checkpoint.model_directory import Card, describe_model, save_model
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import CheckpointError
from megarlhf.models.lora import adapted
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs, PositionValues
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.adapters import LORA, adapted_learner
from tests.helpers.models import frozen, language_model, ragged_rollout, score_model, settings
from tests.helpers.ranks import run_ranks

ROWS = ragged_rollout(8)
WHERE = [ParallelLayout(), ParallelLayout(tensor=2, pipeline=2)]
SCALE = LORA.alpha / LORA.rank


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder: Path = tmp_path_factory.mktemp("bases")
    language_model(folder / "language", seed=1)
    score_model(folder / "scalar", seed=3)
    return {name: str(folder / name) for name in ("language", "scalar")}


def save(layout: ParallelLayout, folder: str, bases: dict[str, str]) -> dict[str, Tensor]:
    """An actor and a critic with adapters, saved in this layout; and what they say."""
    mesh = start(layout, seed=1)
    said = {}
    for name, base in bases.items():
        role = adapted_learner(base, settings(mesh), mesh, OptimConfig())
        save_model(role, Path(folder) / name, Card(build_tiny_tokenizer(words()), origin=base))
        said[name] = role.score(ROWS)
    return said


def read(folder: str) -> dict[str, Tensor]:
    """What the saved models say where nothing knows of adapters."""
    mesh = start(ParallelLayout(), seed=1)
    readings = {"language": LabelLogprobs(0.7), "scalar": PositionValues()}
    roles = {name: frozen(f"{folder}/{name}", reading, mesh) for name, reading in readings.items()}
    assert not [each for role in roles.values() for each in adapted(role.chunks)], "the adapters are still there"
    return {name: role.score(ROWS) for name, role in roles.items()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, str]) -> dict[int, tuple[Path, dict[str, Tensor]]]:
    """By ranks: where the models are, and what they said before they were saved."""
    found = {}
    for layout in WHERE:
        folder = tmp_path_factory.mktemp("saved")
        found[layout.world_size] = folder, run_ranks(save, layout.world_size, layout, str(folder), bases)[0]
    return found


def theirs(model: Any) -> Tensor:
    """transformers' log-probs of the rows' labels where responses are, 0 elsewhere."""
    with torch.no_grad():
        logits = model(input_ids=ROWS.tokens).logits[:, :-1].float() / 0.7
    return logits.log_softmax(-1).gather(2, ROWS.labels[..., None])[..., 0] * ROWS.response_mask


def by_hand(base: Any, adapter: Path) -> Any:
    """The base model with PEFT's tensors added to its weights by their names; all else replaced by its name."""
    with torch.no_grad():
        tensors = load_file(adapter / PEFT_WEIGHTS)
        for name, a in tensors.items():
            place = name.removeprefix("base_model.model.")
            if place.endswith(".lora_A.weight"):
                b = tensors[name.replace(".lora_A.", ".lora_B.")]
                base.get_submodule(place.removesuffix(".lora_A.weight")).weight += SCALE * b @ a
            elif ".lora_B." not in place:
                base.get_parameter(place).copy_(a)
    return base


def test_other_layouts_and_roles_without_adapters_read_the_same_model(saved: Any) -> None:
    for folder, said in saved.values():
        assert describe_model(str(folder / "language")).lora == LORA
        loaded = run_ranks(read, 1, str(folder))[0]
        for name, expected in said.items():
            torch.testing.assert_close(loaded[name], expected, atol=1e-5, rtol=0, msg=name)


def test_the_adapters_do_something(saved: Any, bases: dict[str, str]) -> None:
    base = theirs(LlamaForCausalLM.from_pretrained(bases["language"]))
    assert float((saved[1][1]["language"] - base).abs().max()) > 0.1


def test_two_layouts_save_the_same_peft_files(saved: Any) -> None:
    for name in ("language", "scalar"):
        first, second = (load_file(folder / name / "adapter" / PEFT_WEIGHTS) for folder, _ in saved.values())
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", ["language", "scalar"])
def test_converted_weights_are_merged(name: str, saved: Any, tmp_path: Path) -> None:
    folder, said = saved[4]
    to_hf(folder / name, tmp_path / "hf", Options(progress=False))
    if name == "language":
        got = theirs(LlamaForCausalLM.from_pretrained(tmp_path / "hf"))
        torch.testing.assert_close(got, said[name], atol=2e-5, rtol=0)
    gap = run_ranks(compare_logits, 1, tmp_path / "hf", folder / name)[0]
    assert gap.largest < 1e-4


def test_peft_tensors_added_by_hand_make_our_model(saved: Any, bases: dict[str, str]) -> None:
    folder, said = saved[4]
    model = by_hand(LlamaForCausalLM.from_pretrained(bases["language"]), folder / "language" / "adapter")
    torch.testing.assert_close(theirs(model), said["language"], atol=2e-5, rtol=0)
    scalar = by_hand(LlamaForSequenceClassification.from_pretrained(bases["scalar"]), folder / "scalar" / "adapter")
    with torch.no_grad():
        values = scalar.score(scalar.model(input_ids=ROWS.tokens).last_hidden_state)[:, :-1, 0]
    mask = ROWS.response_mask
    torch.testing.assert_close(values[mask], said["scalar"][mask], atol=2e-5, rtol=0)


def test_peft_loads_the_adapter(saved: Any, bases: dict[str, str]) -> None:
    folder, said = saved[4]
    base = LlamaForCausalLM.from_pretrained(bases["language"])
    model = peft.PeftModel.from_pretrained(base, str(folder / "language" / "adapter"))
    torch.testing.assert_close(theirs(model), said["language"], atol=2e-5, rtol=0)
    scalar = LlamaForSequenceClassification.from_pretrained(bases["scalar"])
    inner: Any = peft.PeftModel.from_pretrained(scalar, str(folder / "scalar" / "adapter")).base_model.model
    with torch.no_grad():
        values = inner.score(inner.model(input_ids=ROWS.tokens).last_hidden_state)[:, :-1, 0]
    mask = ROWS.response_mask
    torch.testing.assert_close(values[mask], said["scalar"][mask], atol=2e-5, rtol=0)


def test_the_peft_config_names_modules_and_base(saved: Any, bases: dict[str, str]) -> None:
    config = json.loads((saved[1][0] / "scalar" / "adapter" / PEFT_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 12.0, bases["scalar"])
    modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) == modules
    assert config["modules_to_save"] == ["score"]


@pytest.mark.parametrize("loss", ["all of it", "its alpha"])
def test_a_model_that_lost_its_adapters_is_refused(loss: str, saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved[1][0] / "language", tmp_path / "model")
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    if loss == "all of it":
        description["lora"] = None
    else:
        del description["lora"]["alpha"]
    (tmp_path / "model" / "model.json").write_text(json.dumps(description))
    write_checksums(tmp_path / "model")
    with pytest.raises(CheckpointError, match="lora" if loss == "all of it" else "alpha is missing"):
        describe_model(str(tmp_path / "model"))
