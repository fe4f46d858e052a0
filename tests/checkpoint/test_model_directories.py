"""Model directories: the same bits in every layout, and a message that names what is broken (invariant 8)."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from megarlhf.checkpoint import checksums
from megarlhf.checkpoint.hf_names import tensor_names
from megarlhf.checkpoint.model_directory import Card, describe_model, load_model, save_model, save_weights
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer, load_tokenizer
from megarlhf.errors import CheckpointError
from megarlhf.models.readings import SequenceScores
from megarlhf.models.role import FrozenRole
from megarlhf.models.spec import ModelSpec
from megarlhf.models.transformer import HeadKind
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.rng import generator
from tests.helpers.hostile import sum_again
from tests.helpers.models import (
    LAYOUTS,
    STRETCHED,
    blank,
    language_model,
    name_of,
    ragged_rollout,
    score_model,
    settings,
    whole_weights,
)
from tests.helpers.ranks import run_ranks

ONE, TENSOR, STAGES = ParallelLayout(), ParallelLayout(tensor=2), ParallelLayout(pipeline=2)
KINDS: dict[str, HeadKind] = {"untied": "language", "tied": "language", "scalar": "scalar"}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def hand_on(layout: ParallelLayout, sources: dict[str, str], targets: dict[str, str]) -> dict[str, dict[str, Tensor]]:
    """Load every model into NaNs, save it where `targets` says, and return its weights under Hugging Face names."""
    mesh = start(layout, seed=1)
    weights = {}
    for kind, directory in sources.items():
        role = blank(describe_model(directory).spec, KINDS[kind], mesh)
        load_model(role, directory, seed=1)
        assert all(bool(parameter.isfinite().all()) for chunk in role.chunks for parameter in chunk.parameters())
        weights[kind] = whole_weights(role)
        if kind in targets:
            role.leave()
            save_model(
                role, Path(targets[kind]), Card(build_tiny_tokenizer(words()), score_offset=0.25, score_scale=2.0)
            )
            assert role.resident_bytes() == 0
    return weights


def directories(folder: Path) -> dict[str, str]:
    return {kind: str(folder / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face directories; 131 tokens, so that two tensor ranks pad the vocabulary and one does not."""
    folder: Path = tmp_path_factory.mktemp("originals")
    language_model(folder / "untied", seed=1, rope_parameters=STRETCHED)
    language_model(folder / "tied", seed=2, tie_word_embeddings=True)
    score_model(folder / "scalar", seed=3)
    return folder


def test_a_model_passes_through_every_layout_bit_for_bit(originals: Path, tmp_path: Path) -> None:
    """Hugging Face -> TP2 -> PP2 -> one rank -> PP2 x VP2 -> TP2 x PP2, each from the directory the last one wrote."""
    expected = {kind: load_file(originals / kind / "model.safetensors") for kind in KINDS}
    assert all(set(tensor_names(spec_of(originals / kind), KINDS[kind])) == set(expected[kind]) for kind in KINDS)
    source = originals
    for layout in (TENSOR, STAGES, ONE, LAYOUTS[4], LAYOUTS[6]):
        target = tmp_path / name_of(layout)
        for rank in run_ranks(hand_on, layout.world_size, layout, directories(source), directories(target)):
            assert all(same(rank[kind], expected[kind]) for kind in KINDS), name_of(layout)
        source = target
    found = describe_model(str(source / "scalar"))
    assert (found.head, found.score_offset, found.score_scale) == ("scalar", 0.25, 2.0)
    assert describe_model(str(source / "untied")).spec == spec_of(originals / "untied")
    assert load_tokenizer(source / "tied" / "tokenizer").vocab_size == build_tiny_tokenizer(words()).vocab_size
    assert {path.name for path in source.iterdir()} == set(KINDS)  # no partial or old directory is left


def spec_of(directory: Path) -> ModelSpec:
    return ModelSpec.from_hf(directory)


def test_saving_again_replaces_and_a_failed_save_changes_nothing(originals: Path, tmp_path: Path) -> None:
    target = {"untied": str(tmp_path / "model")}
    run_ranks(hand_on, 1, ONE, {"untied": str(originals / "untied")}, target)
    (tmp_path / "model" / "stale").touch()
    other = tmp_path / "other"
    model = language_model(other, seed=9)
    rank = run_ranks(hand_on, 1, ONE, {"untied": str(other)}, target)[0]
    assert not (tmp_path / "model" / "stale").exists()
    again = run_ranks(hand_on, 1, ONE, target, {})[0]
    assert same(rank["untied"], again["untied"])
    assert same(again["untied"], {name: tensor.detach() for name, tensor in model.state_dict().items()})


def summed_while_saving(source: str, target: str) -> list[str]:
    """The files whose bytes this rank read to sum them."""
    role = blank(describe_model(source).spec, "language", start(TENSOR, seed=1))
    summed: list[str] = []
    checksum = checksums.checksum

    def noted(path: Path) -> str:
        summed.append(path.name)
        return checksum(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "checksum", noted)
        save_weights(role, Path(target))
    return summed


def test_every_rank_sums_what_it_wrote(originals: Path, tmp_path: Path) -> None:
    """Rank 0 alone would sum the 810 GB of Llama 3.1 405B for longer than the others wait in a barrier."""
    ranks = run_ranks(summed_while_saving, 2, str(originals / "untied"), str(tmp_path / "weights"))
    for rank, summed in enumerate(ranks):
        weights = [name for name in summed if name.endswith(".distcp")]
        assert weights
        assert all(name.startswith(f"__{rank}_") for name in weights)
    files = {path.name for path in (tmp_path / "weights").iterdir()}
    assert files - set(json.loads((tmp_path / "weights" / "checksums.json").read_text())) == {"checksums.json"}


def heads(layout: ParallelLayout, language: str, saved: str) -> dict[str, Any]:
    """A preset, and scalar heads put on language models: from Hugging Face, from a preset, from our own directory."""
    mesh = start(layout, seed=1)
    drawn = {}
    for name, init, seed in (("preset", "tiny-xs", 5), ("other seed", "tiny-xs", 6)):
        role = blank(describe_model(init).spec, "language", mesh)
        load_model(role, init, seed=seed)
        drawn[name] = whole_weights(role)
    for name, init in (("hf", language), ("ours", saved), ("scalar preset", "tiny-xs")):
        role = blank(describe_model(init).spec, "scalar", mesh)
        load_model(role, init, seed=5)
        drawn[name] = whole_weights(role)
        role.reading = SequenceScores()
        assert bool(role.score(ragged_rollout()).isfinite().all())
    return drawn


@pytest.mark.slow
def test_random_weights_and_new_heads_are_the_same_in_every_layout(originals: Path, tmp_path: Path) -> None:
    untied = {"untied": str(originals / "untied")}
    run_ranks(hand_on, 2, TENSOR, untied, {"untied": str(tmp_path / "saved")})
    arguments = (untied["untied"], str(tmp_path / "saved"))
    reference = run_ranks(heads, 1, ONE, *arguments)[0]
    for layout in (TENSOR, STAGES, LAYOUTS[4], LAYOUTS[5]):
        for rank in run_ranks(heads, layout.world_size, layout, *arguments):
            assert all(same(rank[name], reference[name]) for name in reference), name_of(layout)
    body = load_file(originals / "untied" / "model.safetensors")
    for name in ("hf", "ours"):
        head = reference[name].pop("score.weight")
        assert same(reference[name], {key: value for key, value in body.items() if key != "lm_head.weight"})
        # Drawn, not what lies at the head's place in the file: that is of nearly the same spread.
        drawn = torch.randn(1, 32, generator=generator(5, "weights", "score.weight")) * (1 / math.sqrt(33))
        assert torch.equal(head, drawn)
    preset = reference["preset"]
    assert not same(preset, reference["other seed"])
    assert torch.equal(preset["model.norm.weight"], torch.ones(64))
    # 4096 and more draws: std within 5 %.
    assert float(preset["model.embed_tokens.weight"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(preset["model.layers.1.mlp.down_proj.weight"].std()) == pytest.approx(0.02 / math.sqrt(8), rel=0.05)
    layers = [preset[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in range(4)]
    assert not any(torch.equal(layers[0], layer) for layer in layers[1:])


def damage(originals: Path, saved: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    """Broken directories, and what the message about each must name."""
    folder.mkdir()
    cases: dict[str, tuple[Path, str]] = {}

    def copy(name: str, source: Path, named: str) -> Path:
        cases[name] = (folder / name, named)
        return Path(shutil.copytree(source, folder / name))

    (copy("no metadata", saved, "weights/ is missing or partial") / "weights" / "metadata.json").unlink()
    shutil.rmtree(copy("no weights", saved, "weights/ is missing or partial") / "weights")
    (copy("corrupt model.json", saved, "model.json") / "model.json").write_text('{"spec": ')
    described = copy("unknown setting", saved, "model.json") / "model.json"
    described.write_text(json.dumps({**json.loads(described.read_text()), "colour": "red"}))
    sum_again(described.parent)
    part = next((copy("truncated part", saved, "was changed after it was saved") / "weights").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 3])
    part = next((copy("one other byte", saved, "was changed after it was saved") / "weights").glob("*.distcp"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    next((copy("lost part", saved, ".distcp is missing") / "weights").glob("*.distcp")).unlink()

    hf = originals / "untied"
    (copy("no config", hf, "config.json is missing") / "config.json").unlink()
    (copy("corrupt config", hf, "config.json: not JSON") / "config.json").write_text("{")
    single = copy("truncated safetensors", hf, "model.safetensors: cannot be read") / "model.safetensors"
    single.write_bytes(single.read_bytes()[:5000])
    (copy("no safetensors", hf, "only safetensors are read") / "model.safetensors").rename(folder / "spare")
    only_bin = copy(".bin only", hf, "AutoModelForCausalLM.from_pretrained(DIR)")
    (only_bin / "model.safetensors").rename(only_bin / "pytorch_model.bin")
    tensors = load_file(hf / "model.safetensors")
    gone = copy("missing tensor", hf, "first model.layers.2.mlp.up_proj.weight") / "model.safetensors"
    save_file({k: v for k, v in tensors.items() if k != "model.layers.2.mlp.up_proj.weight"}, gone)
    wrong = copy("wrong shape", hf, "model.norm.weight is [31], config.json says [32]") / "model.safetensors"
    save_file({**tensors, "model.norm.weight": torch.ones(31)}, wrong)
    LlamaForCausalLM.from_pretrained(hf).save_pretrained(folder / "sharded", max_shard_size="60KB")
    first = "model-00001-of"
    next((copy("missing shard", folder / "sharded", first)).glob(f"{first}*")).unlink()
    shard = next((copy("truncated shard", folder / "sharded", "cannot be read")).glob(f"{first}*"))
    shard.write_bytes(shard.read_bytes()[:2000])
    index = copy("corrupt index", folder / "sharded", "model.safetensors.index.json") / "model.safetensors.index.json"
    index.write_text("{}")
    return cases


def attempt(cases: dict[str, str], spec: ModelSpec, whole: str) -> dict[str, str]:
    """The message of each failed load; and whether a sharded Hugging Face directory that is whole loads."""
    mesh = start(ONE, seed=1)
    messages = {}
    for name, directory in cases.items():
        role = blank(spec, "language", mesh)
        try:
            load_model(role, directory, seed=1)
            messages[name] = "loaded"
        except CheckpointError as error:
            messages[name] = str(error)
    role = FrozenRole("reward", spec, "language", SequenceScores(), settings(mesh), mesh)
    load_model(role, whole, seed=1)
    return messages


def test_each_broken_directory_is_named(originals: Path, tmp_path: Path) -> None:
    untied = str(originals / "untied")
    run_ranks(hand_on, 1, ONE, {"untied": untied}, {"untied": str(tmp_path / "saved")})
    cases = damage(originals, tmp_path / "saved", tmp_path / "broken")
    paths = {name: str(path) for name, (path, _) in cases.items()}
    spec = spec_of(originals / "untied")
    messages = run_ranks(attempt, 1, paths, spec, str(tmp_path / "broken" / "sharded"))[0]
    for name, (path, named) in cases.items():
        assert str(path) in messages[name], f"{name}: {messages[name]}"
        assert named in messages[name], f"{name}: {messages[name]}"
        assert "Traceback" not in messages[name], f"{name}: {messages[name]}"
    assert messages.keys() == cases.keys()


def test_what_is_no_model_at_all_is_named(originals: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'nowhere' is neither a directory nor a preset; .*tiny-xs"):
        describe_model("nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        describe_model(str(tmp_path))
    for change, named in (
        ({"model_type": "mistral"}, "model_type='mistral', expected 'llama'"),
        (
            {"architectures": ["LlamaForTokenClassification"]},
            r"\['LlamaForTokenClassification'\] is unknown",
        ),
        ({"attention_bias": True}, "attention_bias=True, expected False"),
        ({"hidden_size": "wide"}, "not a Llama 3 configuration"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn'"),
    ):
        path = Path(shutil.copytree(originals / "untied", tmp_path / named[:12])) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(CheckpointError, match=named):
            describe_model(str(path.parent))


def wrong_head(directory: str) -> str:
    mesh = start(ONE, seed=1)
    try:
        load_model(blank(describe_model(directory).spec, "language", mesh), directory, seed=1)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_scalar_head_cannot_speak(originals: Path) -> None:
    message = run_ranks(wrong_head, 1, str(originals / "scalar"))[0]
    assert "has a scalar head, but the blank needs a language model" in message
