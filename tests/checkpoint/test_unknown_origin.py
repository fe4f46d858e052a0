"""What a model directory of unknown origin may hold: anything that is not the model is refused, at import as by the
converter, and nothing outside of it is read."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megarlhf.checkpoint import checksums
from megarlhf.checkpoint.hf_convert import Options, to_hf, to_megatron
from megarlhf.checkpoint.model_directory import MODEL, describe_model
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer, load_tokenizer
from megarlhf.errors import CheckpointError, DataError
from tests.helpers.hostile import sum_again
from tests.helpers.models import STRETCHED, language_model, score_model

QUIET = Options(progress=False)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.2.mlp.up_proj.weight"
FREQUENCIES = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(4)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face directories, one of two files; `model`, converted."""
    folder: Path = tmp_path_factory.mktemp("whole")
    language_model(folder / "hf", rope_parameters=STRETCHED)
    build_tiny_tokenizer(words()).save(folder / "hf")
    language_model(folder / "tied", tie_word_embeddings=True)
    score_model(folder / "scalar")
    shutil.copytree(folder / "hf", folder / "sharded")
    tensors = load_file(folder / "hf" / SINGLE)
    files = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: t for name, t in tensors.items() if files[name] == file}, folder / "sharded" / file)
    (folder / "sharded" / SINGLE).unlink()
    (folder / "sharded" / INDEX).write_text(json.dumps({"weight_map": files}))
    to_megatron(folder / "hf", folder / "model", QUIET)
    return folder


def copied(whole: Path, kind: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / kind, tmp_path / "given"))


def refused(directory: Path, says: str) -> None:
    """By the import and by the converter, in the same words, at once, and with nothing raw for a terminal."""
    convert = to_hf if (directory / MODEL).exists() else to_megatron
    for door in (lambda: describe_model(str(directory)), lambda: convert(directory, directory.parent / "out", QUIET)):
        begin = time.monotonic()
        with pytest.raises(CheckpointError) as error:
            door()
        # 2 seconds on an idle machine.
        assert time.monotonic() - begin < 20
        said = str(error.value)
        assert re.search(".*".join(map(re.escape, says.split(".*"))), said), said
        assert said.isprintable(), ascii(said)
        assert said.endswith("."), said
    assert not (directory.parent / "out").exists()


def added(**tensors: torch.Tensor) -> Callable[[Path], None]:
    """More tensors in the file, or others in place of its own."""

    def add(directory: Path) -> None:
        named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
        save_file({**load_file(directory / SINGLE), **named}, directory / SINGLE, {"format": "pt"})

    return add


def config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def quantise(directory: Path) -> None:
    """As FP8 files are made: the matrix in 8 bits, and the scale that makes it right beside it."""
    matrix = load_file(directory / SINGLE)[UP]
    scale = matrix.abs().max() / 448
    quantised = (matrix / scale).to(torch.float8_e4m3fn)
    added(**{UP: quantised, f"{UP}_scale": scale})(directory)


def link(name: str, to: str) -> Callable[[Path], None]:
    """A file of the directory moved beside it, or wherever, and a link in its place."""

    def lead(directory: Path) -> None:
        away = directory.parent / to
        if (directory / name).exists():
            shutil.move(directory / name, away)
        (directory / name).symlink_to(away)

    return lead


LEFT_OVER = "tensors are not of the model that config.json describes, first "
FOREIGN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "8 bits and a scale": ("hf", quantise, f"'{UP}' is of type F8_E4M3; weights must be one of F32, BF16, F16: name"),
    "a scale alone": ("hf", added(**{f"{UP}_scale": torch.ones(1)}), f"1 {LEFT_OVER}'{UP}_scale'; .*multiply scales"),
    "integers": ("hf", added(**{UP: torch.ones(64, 32, dtype=torch.int8)}), "is of type I8"),
    "64 bits": ("hf", added(**{UP: torch.ones(64, 32, dtype=torch.float64)}), "is of type F64"),
    "adapters inside": ("hf", added(model__layers__0__self_attn__q_proj__lora_A__weight=torch.ones(2, 32)), "lora_A"),
    "adapters beside": ("hf", text("adapter_config.json", "{}"), "adapter_config.json: adapters are not read; merge"),
    "another file": (
        "sharded",
        lambda d: save_file({"x": torch.ones(1)}, d / "adapter_model.safetensors"),
        "adapter_model.safetensors' is no part of the model; move it elsewhere",
    ),
    "more layers": ("hf", added(model__layers__4__input_layernorm__weight=torch.ones(32)), f"{LEFT_OVER}'model.layers"),
    "another norm": ("hf", added(model__layers__0__self_attn__q_norm__weight=torch.ones(8)), "q_norm.weight'"),
    "a bias": ("hf", added(model__layers__0__self_attn__q_proj__bias=torch.ones(32)), "q_proj.bias'"),
    "a value head": ("hf", added(v_head__summary__weight=torch.ones(1, 32)), "v_head.summary.weight'; .*other heads"),
    "a score": ("hf", added(score__weight=torch.ones(1, 32)), f"{LEFT_OVER}'score.weight'"),
    "a vocabulary head": ("scalar", added(lm_head__weight=torch.ones(131, 32)), f"{LEFT_OVER}'lm_head.weight'"),
    "another head, tied": ("tied", added(lm_head__weight=torch.ones(131, 32)), "is not equal to model.embed_tokens"),
    "a name for the terminal": ("hf", added(**{"\x1b[31mred": torch.ones(1)}), r"first '\x1b[31mred'"),
    "quantization_config": ("hf", config(quantization_config={"quant_method": "fp8"}), "quantization_config says"),
    "compression_config": ("hf", config(compression_config={}), "compression_config says that the weights are quant"),
    "rotary part": ("hf", config(rope_parameters={**STRETCHED, "partial_rotary_factor": 0.5}), "partial_rotary_fact"),
    "rotary part outside": ("hf", config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5, expected 1"),
    "two bases": ("hf", config(rope_theta=7.0), "rope_theta=7.0 and .* contradict each other"),
    "two stretches": ("hf", config(rope_scaling={"rope_type": "linear", "factor": 2.0}), "contradict each other"),
    "a link out, weights": ("hf", link(SINGLE, "elsewhere"), f"{SINGLE} is a link out of"),
    "a link out, tokenizer": ("hf", link("tokenizer.json", "elsewhere"), "tokenizer.json is a link out of"),
    "a link to nothing": ("hf", link("special_tokens_map.json", "nowhere"), "special_tokens_map.json is a link out of"),
    "an index that leads out": (
        "sharded",
        lambda d: (shutil.move(d / "a.safetensors", d.parent / "a.safetensors"), rename(d, "../a.safetensors")),
        "'../a.safetensors' is not the name of a safetensors file beside it",
    ),
    "an absolute index": ("sharded", lambda d: rename(d, str(d / "a.safetensors")), "is not the name of a"),
    "an index for the terminal": ("sharded", lambda d: rename(d, "\x1b[2J.safetensors"), r"'\x1b[2J.safetensors' is"),
    "half a character in the index": ("sharded", lambda d: rename(d, "\ud83d.safetensors"), r"'\ud83d.safetensors' is"),
    **{f"index: weight_map is {v}": ("sharded", text(INDEX, f'{{"weight_map": {v}}}'), f"{INDEX}: not an index")
       for v in ("5", "null", "[]", "{}", '"x"')},
    "index: numbers": ("sharded", text(INDEX, '{"weight_map": {"x": 5}}'), f"{INDEX}: 5 is not the name"),
    **{f"index: {name}": ("sharded", text(INDEX, content), f"{INDEX}: not an index of tensors (") for name, content in
       (("text", "{"), ("a list", "[]"), ("Latin-1", '{"é": 1}'.encode("latin-1")), ("deep", "[" * 100_000))},
    "a header that claims terabytes": (
        "hf", text(SINGLE, (10**13).to_bytes(8, "little") + bytes(64)), "claims 10,000,000,000,000 bytes, at most",
    ),
    "a header of very many names": (
        "hf", text(SINGLE, (9 << 20).to_bytes(8, "little") + bytes(9 << 20)), "claims 9,437,184 bytes, at most 8,388",
    ),
    "an index of very many names": (
        "sharded", text(INDEX, "[" + "0," * (5 << 20) + "0]"), f"{INDEX}: not an index of tensors (it has 10,485,763 b",
    ),
    "an endless generation config": ("hf", text("generation_config.json", " " * (9 << 20)), "it has 9,437,184 bytes"),
    **{f"config: {name}": ("hf", text("config.json", content), "config.json: not JSON (") for name, content in
       (("text", "{"), ("a list", "[]"), ("null", "null"), ("UTF-16", '{"a": 1}'.encode("utf-16")),
        ("deep", '{"a":' * 100_000), ("digits", '{"a": ' + "9" * 5000 + "}"), ("NaN", '{"rms_norm_eps": NaN}'))},
    **{f"architectures={v!r}": ("hf", config(architectures=v), f"architectures={v!r} is unknown; use one of")
       for v in (5, {"a": 1}, [5], [["LlamaForCausalLM"]], "LlamaForCausalLM", ["x", "LlamaForCausalLM"],
                 ["\x1b[31m"])},
    **{f"{key}={v!r}": ("hf", config(**{key: v}), "config.json: not a Llama 3 configuration (") for key, v in (
        ("num_hidden_layers", 10**9), ("vocab_size", 10**12), ("hidden_size", 2**40), ("intermediate_size", 2**50),
        ("num_attention_heads", 0), ("num_attention_heads", 10**30), ("num_key_value_heads", -1), ("head_dim", "8"),
        ("num_hidden_layers", True), ("num_hidden_layers", "4"), ("num_hidden_layers", None), ("hidden_size", 1.5),
        ("rms_norm_eps", 1e300), ("rms_norm_eps", "small"), ("max_position_embeddings", 10**12), ("vocab_size", {}),
        ("rope_parameters", 5), ("rope_parameters", [1]), ("tie_word_embeddings", "x"), ("tie_word_embeddings", None),
        ("rope_parameters", {**STRETCHED, "factor": 0}), ("rope_parameters", {**STRETCHED, "low_freq_factor": 4.0}),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "llama3"}), ("model_type", "\x1b[31m"), ("model_type", []),
    )},
    "sizes within bounds": ("hf", config(num_hidden_layers=9999), "89955 tensors that config.json asks for are"),
    **{f"normalisation {v!r}": ("scalar", config(megarlhf=v), "should hold a score_offset, a positive score_scale")
       for v in (5, [], {}, {"score_scale": 2.0}, {"score_offset": 1.0}, {"score_offset": "x", "score_scale": 1.0})},
}  # fmt: skip


def rename(directory: Path, file: str) -> None:
    """What the index calls the file that holds half of the tensors."""
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = {k: file if v == "a.safetensors" else v for k, v in index["weight_map"].items()}
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_the_model_is_refused_at_import_as_by_the_converter(name: str, whole: Path, tmp_path: Path) -> None:
    kind, spoil, says = FOREIGN[name]
    given = copied(whole, kind, tmp_path)
    spoil(given)
    refused(given, says)


def test_what_is_known_not_to_be_needed_is_said_once(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = copied(whole, "tied", tmp_path)
    embedding = load_file(given / SINGLE)["model.embed_tokens.weight"]
    added(**FREQUENCIES, lm_head__weight=embedding, model__rotary_emb__inv_freq=torch.ones(4))(given)
    assert describe_model(str(given)) == describe_model(str(whole / "tied"))
    for target in ("one", "two"):
        to_megatron(given, tmp_path / target, QUIET)
    assert capsys.readouterr().err.splitlines() == [
        f"{given}: 6 tensors are not needed and left out, first model.layers.0.self_attn.rotary_emb.inv_freq"
    ]
    # Nothing of them is left on the way back.
    to_hf(tmp_path / "one", tmp_path / "back", QUIET)
    original = load_file(whole / "tied" / SINGLE)
    back = load_file(tmp_path / "back" / SINGLE)
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)


def test_the_links_of_the_hubs_cache_are_followed(whole: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "5e1"
    shutil.copytree(whole / "hf", blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    assert describe_model(str(snapshot)) == describe_model(str(whole / "hf"))
    assert load_tokenizer(snapshot).vocab_size == load_tokenizer(whole / "hf").vocab_size
    shutil.move(blobs / SINGLE, tmp_path / SINGLE)
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match="is a link out of"):
        describe_model(str(snapshot))


def test_a_tokenizer_directory_does_not_lead_elsewhere(whole: Path, tmp_path: Path) -> None:
    given = copied(whole, "hf", tmp_path)
    link("tokenizer_config.json", "elsewhere")(given)
    with pytest.raises(DataError, match=r"tokenizer_config\.json is a link out of .*; put the file itself there\."):
        load_tokenizer(given)


def listing(change: Callable[[dict[str, str]], Any], folder: str = "") -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        path = directory / folder / checksums.CHECKSUMS
        sums = json.loads(path.read_text())
        changed = change(sums)
        path.write_text(json.dumps(sums if changed is None else changed))
        if folder:
            (directory / checksums.CHECKSUMS).unlink()
            checksums.write_checksums(directory)

    return spoil


def described(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """model.json, with sums that fit."""

    def spoil(directory: Path) -> None:
        content = json.loads((directory / MODEL).read_text())
        changed = change(content)
        (directory / MODEL).write_text(json.dumps(content if changed is None else changed))
        sum_again(directory)

    return spoil


def flip(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        data = bytearray((directory / name).read_bytes())
        data[len(data) // 2] ^= 1
        (directory / name).write_bytes(data)

    return spoil


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{f"a byte of {name}": (flip(name), f"{name} was changed after it was saved; save the model again")
       for name in ("model.json", "tokenizer/tokenizer.json", "huggingface/config.json", "weights/.metadata",
                    "weights/common.pt", "weights/metadata.json", "weights/checksums.json")},
    "a lost tokenizer": (lambda d: (d / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json is missing; save"),
    "a file more": (text("tokenizer/chat_template.json", "{}"), "does not list 'tokenizer/chat_template.json'"),
    "no sums": (lambda d: (d / "checksums.json").unlink(), "checksums.json is missing: .* write_checksums(Path("),
    **{f"sums {folder} {name}": (listing(change, folder), says)
       for folder in ("", "weights") for name, change, says in (
        ("empty", lambda s: {}, "checksums.json does not list"),
        ("list", lambda s: [], "it holds list in place of an object"),
        ("text", lambda s: "x", "it holds str in place of an object"),
        ("shortened", lambda s: s.popitem() and None, "checksums.json does not list"),
        ("numbers", lambda s: dict.fromkeys(s, 5), "is no file in it with a sum"),
        ("outside", lambda s: {**s, "../x": "0"}, "'../x' is no file in it with a sum"),
        ("absolute", lambda s: {**s, "/etc/passwd": "0"}, "'/etc/passwd' is no file in it with a sum"),
    )},
    **{f"lost {name}": (described(lambda m, name=name: m.pop(name) and None), f"model.json: {name} is missing; save")
       for name in ("head", "score_scale")},
    "lost score_offset": (described(lambda m: m.update({"x": m.pop("score_offset")})), "score_offset is missing"),
    "lost max_positions": (described(lambda m: m["spec"].pop("max_positions") and None), "max_positions is missing"),
    "lost factor": (described(lambda m: m["spec"]["rope_scaling"].pop("factor") and None), "factor is missing"),
    **{f"model.json {v!r}": (described(lambda m, v=v: v), "model.json: it holds") for v in (5, [], "x")},
    **{f"spec {key}={v!r}": (described(lambda m, key=key, v=v: m["spec"].update({key: v})), f"model.json: spec.{key}: ")
       for key, v in (("layers", 10**9), ("layers", True), ("layers", "4"), ("vocab_size", 10**12), ("heads", None),
                      ("norm_eps", 1e300), ("rope_scaling", 5), ("tie_embeddings", "yes"), ("colour", "red"))},
    **{f"model.json {key}={v!r}": (described(lambda m, key=key, v=v: m.update({key: v})), f"model.json: {key}")
       for key, v in (("spec", 5), ("spec", None), ("head", "two"), ("head", []), ("score_scale", 0),
                      ("score_offset", "1"))},
    "more layers": (described(lambda m: m["spec"].update(layers=9999)), "layernorm.weight is [4, 32], model.json"),
    "a link out": (link("tokenizer/tokenizer.json", "elsewhere"), "tokenizer/tokenizer.json is a link out of"),
    "a link to the weights": (link("weights/__0_0.distcp", "elsewhere"), "weights/__0_0.distcp is a link out of"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_or_forged_model_directory_is_refused(name: str, whole: Path, tmp_path: Path) -> None:
    spoil, says = DAMAGED[name]
    given = copied(whole, "model", tmp_path)
    spoil(given)
    refused(given, says)


def test_the_remedy_for_an_older_directory_works(whole: Path, tmp_path: Path) -> None:
    given = copied(whole, "model", tmp_path)
    (given / "checksums.json").unlink()
    with pytest.raises(CheckpointError) as error:
        describe_model(str(given))
    code = re.search(r'python -c "(.*)"', str(error.value))
    assert code is not None
    subprocess.run([sys.executable, "-c", code[1]], check=True, cwd=Path(__file__).parents[2])
    assert describe_model(str(given)) == describe_model(str(whole / "model"))


def test_notes_beside_the_model_are_nobodys_business(whole: Path, tmp_path: Path) -> None:
    """README.md and .git, as a model that lies in a repository has them."""
    given = copied(whole, "model", tmp_path)
    (given / ".git").mkdir()
    for name in ("README.md", ".git/config"):
        (given / name).touch()
    assert describe_model(str(given)) == describe_model(str(whole / "model"))
