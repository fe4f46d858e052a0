"""A conversion that cannot be whole says what is wrong, and leaves nothing that looks like a model."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from megarlhf import cli
from megarlhf.checkpoint import hf_convert
from megarlhf.checkpoint.hf_convert import ConversionError, Options, to_hf, to_megatron
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import CheckpointError
from tests.helpers.hostile import sum_again
from tests.helpers.models import language_model

QUIET = Options(progress=False)
SINGLE = "model.safetensors"
UP = "model.layers.2.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00004.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, four shards; `single`, one file; `model`, what they convert to."""
    folder: Path = tmp_path_factory.mktemp("whole")
    language_model(folder / "single")
    build_tiny_tokenizer(words()).save(folder / "single")
    shutil.copytree(folder / "single", folder / "hf", ignore=shutil.ignore_patterns("model*"))
    LlamaForCausalLM.from_pretrained(folder / "single").save_pretrained(folder / "hf", max_shard_size="60KB")
    assert (folder / "hf" / FIRST).is_file()
    to_megatron(folder / "hf", folder / "model", QUIET)
    return folder


class Damage(NamedTuple):
    """What is done to a copy of one of the directories, and what the message must say."""

    to: str
    spoil: Callable[[Path], object]
    said: str


def flip(path: Path, position: int, byte: bytes | None = None) -> None:
    """Change one byte: to `byte`, or its lowest bit."""
    data = bytearray(path.read_bytes())
    data[position] = byte[0] if byte else data[position] ^ 1
    path.write_bytes(data)


def flip_in_header(path: Path, text: str, byte: bytes | None = None) -> None:
    flip(path, path.read_bytes().index(text.encode()), byte)


def cut(path: Path, to: int) -> None:
    path.write_bytes(path.read_bytes()[:to])


def rewrite(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    found = load_file(path)
    change(found)
    save_file(found, path, {"format": "pt"})


def weight(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    """Replace one matrix."""
    return lambda path: tensors(path / SINGLE, lambda found: found.update({UP: change(found[UP])}))


def config(**changes: Any) -> Callable[[Path], object]:
    """Change config.json."""
    return lambda path: rewrite(path / "config.json", **changes)


def spec(**changes: Any) -> Callable[[Path], object]:
    """Change the architecture in model.json."""

    def spoil(path: Path) -> None:
        described = json.loads((path / "model.json").read_text())
        rewrite(path / "model.json", spec={**described["spec"], **changes})
        sum_again(path)

    return spoil


def lead_away(path: Path) -> None:
    """Have the index name a file outside the directory."""
    shutil.copy(path / FIRST, path.parent / "away.safetensors")
    index_entry(path, UP, "../away.safetensors")


def index_entry(path: Path, name: str, file: str | None) -> None:
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    rewrite(path / INDEX, weight_map={k: v for k, v in {**weight_map, name: file}.items() if v})


def double(path: Path) -> None:
    """Put a tensor of the first shard into the second too, which the index does not know."""
    tensor = load_file(path / FIRST)["model.embed_tokens.weight"]
    tensors(path / FIRST.replace("00001", "00002"), lambda found: found.update({"model.embed_tokens.weight": tensor}))


def set_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[-1, -1] = float("nan")
    return tensor


HF_DAMAGE: dict[str, Damage] = {
    "truncated file": Damage("single", lambda p: cut(p / SINGLE, 50_000), f"{SINGLE}: cannot be read"),
    "truncated by a byte": Damage(
        "single", lambda p: cut(p / SINGLE, (p / SINGLE).stat().st_size - 1), f"{SINGLE}: cannot be read"
    ),
    "truncated shard": Damage("hf", lambda p: cut(p / FIRST, 2000), f"{FIRST}: cannot be read"),
    "empty shard": Damage("hf", lambda p: cut(p / FIRST, 0), f"{FIRST}: cannot be read"),
    "trailing bytes": Damage(
        "hf", lambda p: (p / FIRST).write_bytes((p / FIRST).read_bytes() + b"0"), f"{FIRST}: cannot be read"
    ),
    "lost shard": Damage("hf", lambda p: (p / FIRST).unlink(), f"{FIRST}' is missing"),
    "flip in the header's length": Damage("single", lambda p: flip(p / SINGLE, 0), f"{SINGLE}: cannot be read"),
    "flip in a name": Damage("single", lambda p: flip_in_header(p / SINGLE, "up_proj"), "up_proj.weight"),
    "flip in a shape": Damage("single", lambda p: flip_in_header(p / SINGLE, "131,"), f"{SINGLE}: cannot be read"),
    "flip in a type": Damage("single", lambda p: flip_in_header(p / SINGLE, "F32", b"I"), "is of type I32"),
    "flip in the index": Damage("hf", lambda p: flip_in_header(p / INDEX, "weight_map"), f"{INDEX}: not an index"),
    "flip in a name of the index": Damage("hf", lambda p: flip_in_header(p / INDEX, "up_proj"), "up_proj.weight"),
    "index that is no object": Damage("hf", lambda p: (p / INDEX).write_text("[]"), f"{INDEX}: not an index"),
    "index that leads elsewhere": Damage(
        "hf",
        lead_away,
        "'../away.safetensors' is not the name of a safetensors file beside it",
    ),
    "missing index entry": Damage("hf", lambda p: index_entry(p, UP, None), UP),
    "index entry for the wrong shard": Damage("hf", lambda p: index_entry(p, UP, FIRST), UP),
    "renamed key": Damage("single", lambda p: tensors(p / SINGLE, lambda t: t.update(renamed=t.pop(UP))), UP),
    "missing tensor": Damage("single", lambda p: tensors(p / SINGLE, lambda t: t.pop(UP)), UP),
    "extra tensor": Damage(
        "single", lambda p: tensors(p / SINGLE, lambda t: t.update(extra=torch.ones(2))), "first 'extra'"
    ),
    "tensor in two shards": Damage("hf", double, f"'model.embed_tokens.weight' is also in {FIRST}"),
    "two sets of weights": Damage("hf", lambda p: shutil.copy(p / FIRST, p / SINGLE), f"both {SINGLE} and {INDEX}"),
    "wrong shape": Damage("single", weight(lambda t: t[:, :31].clone()), f"{UP} is [64, 31]"),
    "wrong type": Damage(
        "single", weight(torch.Tensor.half), rf"{UP} is of type float16, others are float32; .*dtype=bfloat16"
    ),
    "integers": Damage("single", weight(torch.Tensor.int), f"'{UP}' is of type I32"),
    "not a number": Damage("single", weight(set_nan), f"{UP} holds numbers that are not finite"),
    ".bin only": Damage("single", lambda p: (p / SINGLE).rename(p / "pytorch_model.bin"), "safetensors"),
    "no config.json": Damage("hf", lambda p: (p / "config.json").unlink(), "config.json is missing"),
    "config.json cut short": Damage("hf", lambda p: cut(p / "config.json", 100), "config.json: not JSON"),
    "config of fewer layers": Damage("hf", config(num_hidden_layers=3), "first 'model.layers.3."),
    "config of more layers": Damage("hf", config(num_hidden_layers=5), "first model.layers.4."),
    "config of other heads": Damage(
        "hf", config(num_attention_heads=8), "q_proj.weight is [32, 32], config.json says [64, 32]"
    ),
    "config of other groups": Damage(
        "hf", config(num_key_value_heads=4), "k_proj.weight is [16, 32], config.json says [32, 32]"
    ),
    "config of another vocabulary": Damage(
        "hf", config(vocab_size=132), "embed_tokens.weight is [131, 32], config.json says [132, 32]"
    ),
    "config of another width": Damage("hf", config(intermediate_size=96), "is [64, 32], config.json says [96, 32]"),
    "config of tied embeddings": Damage("hf", config(tie_word_embeddings=True), "lm_head.weight is not equal to"),
    "config of a reward model": Damage("hf", config(architectures=["LlamaForSequenceClassification"]), "score.weight"),
    "config of another family": Damage("hf", config(model_type="mistral"), "model_type='mistral'"),
    "normalisation by 0": Damage("hf", config(megarlhf={"score_scale": 0}), "a positive score_scale"),
    "no score of wrong": Damage("hf", config(megarlhf={"score_wrong": "low"}), "if known, score_wrong, all finite"),
}


def extend_metadata(path: Path) -> None:
    shutil.copy(path / "weights" / "__0_0.distcp", path / "weights" / "__9_0.distcp")


def one_bit(path: Path) -> None:
    """A weight that is still a number."""
    content = bytearray((path / PART).read_bytes())
    content[len(content) // 2] ^= 1
    (path / PART).write_bytes(content)


PART = "weights/__1_0.distcp"
MODEL_DAMAGE: dict[str, Damage] = {
    "truncated part": Damage("model", lambda p: cut(p / PART, 9000), f"{PART} was changed after it was saved"),
    "lost part": Damage("model", lambda p: (p / PART).unlink(), f"{PART} is missing"),
    "longer part": Damage(
        "model", lambda p: (p / PART).write_bytes((p / PART).read_bytes() + b"0"), f"{PART} was changed after it"
    ),
    "part that is no archive": Damage("model", lambda p: flip(p / PART, 0, b"x"), f"{PART} was changed after it"),
    "one other byte": Damage("model", one_bit, f"{PART} was changed after it was saved; save the model again"),
    "no checksums": Damage("model", lambda p: (p / "weights" / "checksums.json").unlink(), "missing or partial"),
    "part of another checkpoint": Damage("model", extend_metadata, "does not list '__9_0.distcp'"),
    "no metadata": Damage("model", lambda p: (p / "weights" / ".metadata").unlink(), "missing or partial"),
    "metadata cut short": Damage("model", lambda p: cut(p / "weights" / ".metadata", 500), ".metadata was changed"),
    "another format": Damage(
        "model", lambda p: rewrite(p / "weights" / "metadata.json", sharded_backend="zarr"), "metadata.json"
    ),
    "no model.json": Damage("model", lambda p: (p / "model.json").unlink(), "model.json is missing"),
    "model.json cut short": Damage("model", lambda p: cut(p / "model.json", 60), "model.json"),
    "model.json of fewer layers": Damage("model", spec(layers=3), "is [4, 32"),
    "model.json of another vocabulary": Damage(
        "model", spec(vocab_size=120), "is [131, 32], model.json says [120, 32]"
    ),
    "model.json of tied embeddings": Damage(
        "model", spec(tie_embeddings=True), "'output_layer.weight' is not of the model"
    ),
    "model.json of a reward model": Damage(
        "model",
        lambda p: (rewrite(p / "model.json", head="scalar"), sum_again(p)),
        "output_layer.weight is [131, 32], model.json says [1, 32]",
    ),
    "config.json of another model": Damage(
        "model",
        lambda p: (rewrite(p / "huggingface" / "config.json", rope_theta=5e5, rope_parameters=None), sum_again(p)),
        "differs from model.json in rope_theta",
    ),
    "a Hugging Face directory": Damage("hf", lambda p: None, "model.json is missing"),
}


def refused(convert: Callable[..., object], source: Path, options: Options = QUIET) -> str:
    """The message of a conversion that must fail and leave nothing."""
    target = source.parent / "out"
    before = set(source.parent.iterdir())
    with pytest.raises(CheckpointError) as error:
        convert(source, target, options)
    assert set(source.parent.iterdir()) == before
    return str(error.value)


def check(damage: Damage, convert: Callable[..., object], whole: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(whole / damage.to, tmp_path / "source"))
    damage.spoil(source)
    message = refused(convert, source)
    assert str(source) in message, message
    assert re.search(".*".join(map(re.escape, damage.said.split(".*"))), message), message


@pytest.mark.parametrize("name", HF_DAMAGE)
def test_a_damaged_hugging_face_directory_is_refused_by_name(name: str, whole: Path, tmp_path: Path) -> None:
    check(HF_DAMAGE[name], to_megatron, whole, tmp_path)


@pytest.mark.parametrize("name", MODEL_DAMAGE)
def test_a_damaged_model_directory_is_refused_by_name(name: str, whole: Path, tmp_path: Path) -> None:
    check(MODEL_DAMAGE[name], to_hf, whole, tmp_path)


def test_the_way_out_of_bin_files(whole: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(whole / "single", tmp_path / "source"))
    (source / SINGLE).rename(source / "pytorch_model.bin")
    said = refused(to_megatron, source)
    assert "only safetensors are read; 'pytorch_model.bin' may run code when it is read." in said
    assert "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)." in said


DIRECTIONS = [pytest.param(to_megatron, "hf", id="to-megatron"), pytest.param(to_hf, "model", id="to-hf")]


@pytest.mark.parametrize(("convert", "kind"), DIRECTIONS)
def test_what_exists_is_left_alone(convert: Any, kind: str, whole: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name, said in (
        ("out", f"{target} exists; choose another"),
        ("out.partial", "or was killed; in that case remove"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
        with pytest.raises(CheckpointError, match=re.escape(said)):
            convert(whole / kind, target, QUIET)
        assert (tmp_path / name / "mine").exists()
        shutil.rmtree(tmp_path / name)
    with pytest.raises(CheckpointError, match="nowhere is not a directory; create it first"):
        convert(whole / kind, tmp_path / "nowhere" / "out", QUIET)
    with pytest.raises(CheckpointError, match="gone"):
        convert(tmp_path / "gone", target, QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 40 kB: the write fails half way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("convert", "kind"), DIRECTIONS)
def test_a_disk_that_fails_half_way(convert: Any, kind: str, whole: Path, tmp_path: Path, small_files: None) -> None:
    with pytest.raises(ConversionError, match=r"out\.partial could not be written \(File too large.*was removed"):
        convert(whole / kind, tmp_path / "out", QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("convert", "kind"), DIRECTIONS)
def test_too_little_space_is_seen_before_it_starts(
    convert: Any, kind: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 16 MiB are kept free, and these weights take 0.2 MB.
    monkeypatch.setattr(hf_convert.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 0))
    with pytest.raises(ConversionError, match=r"0\.02 GB are needed and 0\.00 GB are free"):
        convert(whole / kind, tmp_path / "out", QUIET)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("convert", "kind"), DIRECTIONS)
def test_a_result_that_fails_verification_is_not_kept(convert: Any, kind: str, whole: Path, tmp_path: Path) -> None:
    def differ(hugging_face: Path, model: Path) -> None:
        assert (hugging_face / "config.json").is_file()
        assert (model / "model.json").is_file()
        raise ConversionError("logits differ")

    with pytest.raises(ConversionError, match="logits differ"):
        convert(whole / kind, tmp_path / "out", Options(progress=False, verify=differ))
    assert list(tmp_path.iterdir()) == []


SLOW = """
import sys, time
from pathlib import Path
from megarlhf.checkpoint.dist_files import CheckpointReader
from megarlhf.checkpoint.hf_files import SafetensorsDirectory
from megarlhf.cli import main
for kind in (CheckpointReader, SafetensorsDirectory):
    def read(self, part, quick=kind.read):
        time.sleep(0.2)
        return quick(self, part)
    kind.read = read
sys.exit(main(sys.argv[1:]))
"""


def test_a_signal_in_the_middle_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    cases = [("megatron", "hf", signal.SIGTERM, 143), ("hf", "model", signal.SIGINT, 130)]
    running = []
    for direction, kind, number, code in cases:
        given = (f"model={whole / kind}", f"output={tmp_path / direction}", f"to={direction}")
        command = [sys.executable, "-c", SLOW, "convert", *given]
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        running.append((child, tmp_path / f"{direction}.partial", number, code))
    for child, partial, number, code in running:
        deadline = time.monotonic() + 90
        while not any(path.is_file() and path.stat().st_size for path in partial.rglob("*")):
            assert child.poll() is None, child.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(number)
        said = child.communicate(timeout=30)[1]
        assert child.returncode == code, said
        assert f"stopped by {number.name}; nothing was written." in said
        assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_exit_codes_of_the_command(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = str(whole / "hf"), str(tmp_path / "out")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert cli.main(["convert", f"model={source}", f"output={out}", "to=megatron"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    said = capsys.readouterr()
    assert re.search(r"out: 39 tensors, 0\.000 GB, .*MB/s\)\npeak memory: \d+ MB above the start; .* is 0 MB", said.out)
    assert not said.err
    back = (f"model={out}", f"output={tmp_path / 'back'}", "to=hf")
    assert cli.main(["convert", *back, "max_shard_size=60KB"]) == 0
    assert len(list((tmp_path / "back").glob("model-*-of-00004.safetensors"))) == 4
    assert cli.main(["convert", f"model={source}", f"output={out}", "to=megatron"]) == 2
    assert "exists; choose another" in capsys.readouterr().err
    assert cli.main(["convert", *back, f"output={tmp_path / 'x'}", "max_shard_size=many"]) == 2
    assert "max_shard_size=many: not a size" in capsys.readouterr().err
    monkeypatch.setattr(hf_convert, "SPARE_BYTES", 10**18)
    assert cli.main(["convert", f"model={source}", f"output={tmp_path / 'y'}", "to=megatron"]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "out"]
