"""Hugging Face -> Megatron -> Hugging Face is the same bits for every Llama 3, through every layout (invariant 8)."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from megarlhf import cli
from megarlhf.checkpoint import hf_convert
from megarlhf.checkpoint.checksums import CHECKSUMS
from megarlhf.checkpoint.hf_convert import Options, to_hf, to_megatron
from megarlhf.checkpoint.hf_names import shape_of, tensor_names
from megarlhf.checkpoint.hf_pieces import Ledger, pieces_of
from megarlhf.checkpoint.hf_verify import compare_logits
from megarlhf.checkpoint.model_directory import Card, describe_model, load_model, save_model
from megarlhf.commands import convert
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer, load_tokenizer
from megarlhf.errors import CheckpointError, OutputError
from megarlhf.models.spec import PRESETS, ModelSpec
from megarlhf.models.transformer import HeadKind
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.models import STRETCHED, blank, language_model, llama_config, score_model, whole_weights
from tests.helpers.ranks import run_ranks

TENSOR, STAGES = ParallelLayout(tensor=2), ParallelLayout(pipeline=2)
QUIET = Options(progress=False)
SHARDED = Options(progress=False, max_shard_bytes=60_000)

VARIANTS: dict[str, dict[str, Any]] = {
    "llama3": {},
    "llama3.1": {"rope_parameters": STRETCHED},
    "llama3.2": {"rope_parameters": {**STRETCHED, "factor": 32.0}, "tie_word_embeddings": True},
    "no groups": {"num_key_value_heads": 4, "vocab_size": 130},
    "wide heads": {"head_dim": 16, "intermediate_size": 60},
    "bfloat16": {"dtype": "bfloat16", "tie_word_embeddings": True},
    "reward": {"rope_parameters": STRETCHED},
    "bfloat16 reward": {"dtype": "bfloat16", "tie_word_embeddings": True},
}
"""131 and 130 tokens: two tensor ranks pad the first. Two query groups, not eight: a checkpoint's pieces are uneven."""


def weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory; a name in two files fails."""
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in found
            found[name] = tensor
    return found


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of every variant, with a tokenizer and a generation config."""
    folder: Path = tmp_path_factory.mktemp("originals")
    for seed, (name, changes) in enumerate(VARIANTS.items()):
        build = score_model if "reward" in name else language_model
        model = build(folder / name, seed=seed, **{k: v for k, v in changes.items() if k != "dtype"})
        if "dtype" in changes:
            model.bfloat16().save_pretrained(folder / name)
        build_tiny_tokenizer(words()).save(folder / name)
        GenerationConfig(temperature=0.6, top_p=0.9, do_sample=True).save_pretrained(folder / name)
    return folder


def hand_on(layout: ParallelLayout, directories: dict[str, str], targets: dict[str, str]) -> list[bool]:
    """Load each directory into NaNs, save it again; whether the weights were those of the originals."""
    mesh = start(layout, seed=1)
    equal = []
    for name, directory in directories.items():
        found = describe_model(directory)
        role = blank(found.spec, found.head, mesh)
        load_model(role, directory, seed=1)
        original = load_file(Path(targets["originals"], name, "model.safetensors"))
        equal.append(same(whole_weights(role), {key: tensor.float() for key, tensor in original.items()}))
        target = Path(targets["saved"], name)
        save_model(
            role,
            target,
            Card(
                build_tiny_tokenizer(words()),
                score_offset=0.25,
                score_scale=2.0,
                score_wrong=-1.5,
                step_separator=". ",
            ),
        )
    return equal


@pytest.fixture(scope="module")
def converted(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory of every variant."""
    folder: Path = tmp_path_factory.mktemp("converted")
    for name in VARIANTS:
        to_megatron(originals / name, folder / name, QUIET)
    return folder


@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back_is_the_same_bits(name: str, originals: Path, converted: Path, tmp_path: Path) -> None:
    back, original = tmp_path / "back", originals / name
    done = to_hf(converted / name, back, SHARDED)
    expected = weights(original)
    assert same(weights(back), expected)
    assert (done.tensors, done.bytes_written) == (len(expected), sum(tensor.nbytes for tensor in expected.values()))
    config = json.loads((original / "config.json").read_text())
    assert config.items() <= json.loads((back / "config.json").read_text()).items()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (back / file).read_bytes() == (original / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back"]


def test_shards_are_as_transformers_writes_them(originals: Path, converted: Path, tmp_path: Path) -> None:
    to_hf(converted / "llama3", tmp_path / "back", SHARDED)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    tensors = weights(originals / "llama3")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 2
    for file in files:
        with safe_open(tmp_path / "back" / file, framework="pt") as opened:
            names = set(opened.keys())
            assert opened.metadata() == {"format": "pt"}
        assert names == {name for name, place in index["weight_map"].items() if place == file}
        assert sum(tensors[name].nbytes for name in names) <= 60_000
    to_hf(converted / "llama3", tmp_path / "single", QUIET)
    assert [path.name for path in (tmp_path / "single").glob("model*")] == ["model.safetensors"]


def test_a_changed_byte_of_an_exported_weight_is_found(converted: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    to_hf(converted / "llama3", exported, QUIET)
    file = exported / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-3] ^= 1  # a weight that is finite before and after
    file.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"model\.safetensors was changed .*, remove .*checksums\.json"):
        to_megatron(exported, tmp_path / "again", QUIET)
    for said in run_ranks(refusal_of_two, 2, str(exported)):
        assert "model.safetensors was changed after it was saved; convert" in said
    (exported / CHECKSUMS).unlink()  # as the message says
    to_megatron(exported, tmp_path / "again", QUIET)


def refusal_of_two(directory: str) -> str:
    role = blank(describe_model(directory).spec, "language", start(ParallelLayout(data=2), seed=1))
    with pytest.raises(CheckpointError) as refused:
        load_model(role, directory, seed=1)
    return str(refused.value)


def test_every_layout_reads_it_and_what_a_layout_saves_goes_back(
    originals: Path, converted: Path, tmp_path: Path
) -> None:
    """Converted -> two tensor ranks -> two stages; each reads and saves, and each of those goes back."""
    source = converted
    for layout, target in ((TENSOR, tmp_path / "tp2"), (STAGES, tmp_path / "pp2")):
        directories = {name: str(source / name) for name in VARIANTS}
        targets = {"originals": str(originals), "saved": str(target)}
        assert run_ranks(hand_on, 2, layout, directories, targets) == [[True] * len(VARIANTS)] * 2
        source = target
        for name in VARIANTS:
            expected = weights(originals / name)
            dtype = next(iter(expected.values())).dtype  # the ranks above compute, and save, in fp32
            back = tmp_path / f"{target.name} {name}"
            to_hf(target / name, back, Options(dtype=dtype, progress=False))
            assert same(weights(back), expected)
            # A checkpoint that was trained has no config.json: one is written anew.
            assert ModelSpec.from_hf(back) == ModelSpec.from_hf(originals / name)
            ours, theirs = (LlamaConfig.from_pretrained(path) for path in (back, originals / name))
            assert (ours.rope_parameters, ours.dtype) == (theirs.rope_parameters, theirs.dtype)
            assert (ours.architectures, ours.pad_token_id) == (theirs.architectures, load_tokenizer(back).pad_id)
            assert AutoTokenizer.from_pretrained(back).chat_template
    # A reward model's normalisation survives in config.json, where transformers leaves it alone.
    to_megatron(tmp_path / "pp2 reward", tmp_path / "again", QUIET)
    assert describe_model(str(tmp_path / "again")) == describe_model(str(tmp_path / "pp2" / "reward"))
    assert describe_model(str(tmp_path / "again")).score_offset == 0.25
    again = describe_model(str(tmp_path / "again"))
    assert again.score_wrong == -1.5
    assert again.step_separator == ". "
    assert describe_model(str(tmp_path / "pp2 reward")).score_offset == 0.25  # also without conversion


def test_type_is_changed_only_when_asked(originals: Path, tmp_path: Path) -> None:
    half = Options(dtype=torch.bfloat16, progress=False)
    to_megatron(originals / "llama3", tmp_path / "model", half)
    to_hf(tmp_path / "model", tmp_path / "back", QUIET)
    expected = {name: tensor.bfloat16() for name, tensor in weights(originals / "llama3").items()}
    assert same(weights(tmp_path / "back"), expected)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_rounded_result_is_verified_against_its_source_rounded_alike(
    dtype: str, originals: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def swap_heads(directory: Path) -> None:
        tensors = weights(directory)
        queries = tensors["model.layers.1.self_attn.q_proj.weight"]
        tensors["model.layers.1.self_attn.q_proj.weight"] = queries.roll(8, 0)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    out = str(tmp_path / "out")
    try:
        given = (f"model={converted / 'llama3.1'}", f"output={out}", "to=hf", f"dtype={dtype}", "verify=true")
        assert cli.main(["convert", *given]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert f"the weights of both rounded to {dtype}" in capsys.readouterr().out
    rounded = {name: tensor.to(type_of(dtype)) for name, tensor in weights(originals / "llama3.1").items()}
    assert same(weights(tmp_path / "out"), rounded)
    gap = compare_logits(tmp_path / "out", converted / "llama3.1", type_of(dtype))
    # As close as without rounding; seen: 2e-6.
    assert gap.largest < 1e-5 < gap.bound
    # The rounding itself: what the bound would have to allow for otherwise.
    assert compare_logits(tmp_path / "out", converted / "llama3.1").largest > 20 * gap.largest
    swap_heads(tmp_path / "out")
    assert not compare_logits(tmp_path / "out", converted / "llama3.1", type_of(dtype)).holds


def type_of(name: str) -> torch.dtype:
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def fail_verifying(*_: object, **__: object) -> None:
    raise CheckpointError("transformers cannot load it.")


def fail_writing(*_: object) -> None:
    raise OutputError("the disk took less than it was given.")


@pytest.mark.parametrize(
    ("where", "name", "fault"), [(convert, "_verify", fail_verifying), (hf_convert, "_write_parts", fail_writing)]
)
def test_what_fails_after_the_input_was_read_is_not_its_fault(
    where: Any, name: str, fault: Any, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, fault)
    given = (f"model={converted / 'llama3'}", f"output={tmp_path / 'out'}", "to=hf", "verify=true")
    assert cli.main(["convert", *given]) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_cannot_hold_the_numbers_is_refused(originals: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(originals / "llama3", tmp_path / "source"))
    tensors = weights(source)
    tensors["model.norm.weight"][3] = -7e4
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: .* 7e\+04, is too large for float16; choose"):
        to_megatron(source, tmp_path / "out", Options(dtype=torch.float16, progress=False))
    to_megatron(source, tmp_path / "model", QUIET)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: .* is too large for float16; choose another type"):
        to_hf(tmp_path / "model", tmp_path / "out", Options(dtype=torch.float16, progress=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "source"]


def test_logits_are_those_of_transformers(originals: Path, converted: Path, tmp_path: Path) -> None:
    for name in ("llama3.1", "bfloat16 reward"):
        gap = compare_logits(originals / name, converted / name)
        # fp32 through four layers whose logits reach 3; seen: 2e-6.
        assert gap.largest < 1e-5 < gap.bound
        assert gap.holds
    # Two query heads of one layer in each other's place.
    changed = tmp_path / "changed"
    to_hf(converted / "llama3.1", changed, QUIET)
    tensors = weights(changed)
    rows = tensors["model.layers.2.self_attn.q_proj.weight"]
    rows[:16] = rows[:16].roll(8, 0).clone()
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    assert not compare_logits(changed, converted / "llama3.1").holds


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("head", ["language", "scalar"])
def test_pieces_use_every_number_of_every_preset_once(name: str, head: HeadKind) -> None:
    """Also where nothing divides; on names and shapes alone, 405B included."""
    spec = PRESETS[name]
    for layers, vocabulary in ((8, 8), (1, 4), (7, 5)):
        pieces = [p for g in pieces_of(spec, head, layer_cuts=layers, vocabulary_cuts=vocabulary) for p in g]
        theirs = Ledger("HF", {n: torch.Size(shape_of(n, spec)).numel() for n in tensor_names(spec, head)})
        ours = Ledger("Megatron", {piece.key: torch.Size(piece.size).numel() for piece in pieces})
        for piece in pieces:
            assert sum(torch.Size(part.shape).numel() for part in piece.parts) == torch.Size(piece.shape).numel()
            ours.add(piece.key, torch.Size(piece.shape).numel())
            for part in piece.parts:
                theirs.add(part.name, torch.Size(part.shape).numel())
        theirs.close()
        ours.close()
        # No number twice: boxes that do not overlap, and whose sizes add up.
        assert len({(piece.key, piece.offset) for piece in pieces}) == len(pieces)


def test_a_ledger_complains_of_twice_and_of_never() -> None:
    ledger = Ledger("tensors", {"a": 4, "b": 2})
    ledger.add("a", 4)
    with pytest.raises(RuntimeError, match=r"tensors: 1 tensors were not used up: \{'b': 2\}"):
        ledger.close()
    with pytest.raises(RuntimeError, match="1 numbers of a were used twice"):
        ledger.add("a", 1)


MEASURE = """
import sys
from pathlib import Path
from megarlhf.checkpoint.hf_convert import Options, to_hf, to_megatron
folder, quiet = Path(sys.argv[1]), Options(progress=False)
for name in ("small", "large"):  # the small one loads libraries, whose pages would count
    there = to_megatron(folder / name, folder / f"{name} model", quiet)
    back = to_hf(folder / f"{name} model", folder / f"{name} back", quiet)
print(there.peak_bytes, back.peak_bytes, there.bound_bytes, there.bytes_written)
"""


@pytest.mark.slow
def test_memory_stays_near_one_tensor(tmp_path: Path) -> None:
    """A model of 150 MB moves through 27 MB: 1.5 times a layer's gate and up and the embedding."""
    write_llama(tmp_path / "small", hidden=64, layers=2)
    write_llama(tmp_path / "large", hidden=768, layers=12)
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout.split()
    there, back, bound, total = map(int, said)
    assert total > 5 * bound
    assert 0 < there < bound, f"to-megatron: {there} of {bound}"
    assert 0 < back < bound, f"to-hf: {back} of {bound}"


def write_llama(directory: Path, *, hidden: int, layers: int) -> None:
    config = llama_config(
        vocab_size=8000,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=2 * hidden,
        head_dim=hidden // 4,
    )
    with torch.device("cpu"):
        LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
