"""Each bad file or directory stops a command before a model is built: exit code 2 and one message that names it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megarlhf.checkpoint.hf_convert import Options, to_megatron
from megarlhf.checkpoint.model_directory import ModelDescription
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.models.spec import preset
from tests.helpers.models import score_model
from tests.helpers.refusal import DPO, GENERATE, PPO, REWARD, SFT, assert_matches, write_model


def missing(path: Path) -> str:
    return f"{path.name!r} is neither a directory nor a preset; name a Hugging Face or megarlhf model directory"


def without_config(path: Path) -> str:
    path.mkdir()
    return f"model directory {path.name}: config.json is missing; name a complete one"


def without_weights(path: Path) -> str:
    write_model(path)
    (path / "model.safetensors").unlink()
    return f"{path.name}: neither model.safetensors nor model.safetensors.index.json is there, and only safetensors"


def without_a_shard(path: Path) -> str:
    write_model(path, shard="60KB")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    return f"{path.name}: {shard.name!r} is missing; the directory is partial, download the model again"


def without_a_tensor(path: Path) -> str:
    write_model(path, layers=3)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    return f"{path.name}: 9 tensors that config.json asks for are missing, first model.layers.3.*; the directory"


def truncated(path: Path) -> str:
    write_model(path)
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(weights[:200])
    return f"{path.name}/model.safetensors: cannot be read .*; download the model again"


def another_architecture(path: Path) -> str:
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "gpt2"}')
    return f"{path.name}/config.json: not a Llama 3 configuration .*'gpt2', expected 'llama'.*; name a Llama 3 model"


def half_saved(path: Path) -> str:
    (path / "weights").mkdir(parents=True)
    (path / "model.json").write_text(ModelDescription(spec=preset("tiny-xs"), head="language").model_dump_json())
    (path / "weights" / "metadata.json").touch()
    return f"model directory {path.name}: weights/ is missing or partial; save the model again"


@pytest.mark.parametrize(
    "spoil",
    [
        *(missing, without_config, without_weights, without_a_shard, without_a_tensor, truncated),
        *(another_architecture, half_saved),
    ],
)
@pytest.mark.parametrize(
    ("command", "setting"), [(SFT, "model"), (PPO, "reference.init"), (GENERATE, "model")], ids=lambda value: value[0]
)
def test_model_directories(
    spoil: Callable[[Path], str], command: tuple[str, ...], setting: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    message = spoil(tmp_path / "bad")
    assert_matches(refused(command, f"{setting}=bad"), message)


def test_heads(tmp_path: Path, refused: Callable[..., str]) -> None:
    score_model(tmp_path / "hf", vocab_size=160)
    to_megatron(tmp_path / "hf", tmp_path / "judge", Options(progress=False))
    write_model(tmp_path / "speaker")
    policies = ((PPO, "actor.init"), (PPO, "reference.init"), (DPO, "model"), (DPO, "reference"))
    for command, setting in ((SFT, "model"), *policies, (GENERATE, "model")):
        said = refused(command, f"{setting}=judge")
        assert_matches(said, f"{setting}=judge has a scalar head, .* a language model is needed; name another")
    assert_matches(
        refused(PPO, "reward.init=speaker"), "reward.init=speaker is a language model, .*; train a reward model"
    )
    assert_matches(refused(PPO, "reward.init=''"), "no judge: nothing would score .*; set reward.init")
    assert_matches(refused(REWARD, "model=''"), "model is empty; name a model directory")


def test_tokenizers(tmp_path: Path, refused: Callable[..., str]) -> None:
    tokenizer = build_tiny_tokenizer([*words(), *(f"w{index}" for index in range(100))])
    tokenizer.save(tmp_path / "large")
    too_large = f"the tokenizer large has {tokenizer.vocab_size} tokens but {{}} has 160 embedding rows; use"
    assert_matches(refused(SFT, "tokenizer=large"), too_large.format("model"))
    assert_matches(refused(PPO, "tokenizer=large"), too_large.format("actor"))
    # The reward model reads what the actor writes.
    write_model(tmp_path / "small", vocab_size=100)
    said = refused(PPO, "critic.init=small")
    assert_matches(said, "the tokenizer tiny .* tokens but critic has 100 embedding rows; use")
    said = refused(DPO, "reference=small")
    assert_matches(said, "the tokenizer tiny .* tokens but reference has 100 embedding rows; use")
    assert_matches(refused(SFT, "tokenizer=nowhere"), "tokenizer directory does not exist: nowhere; give a directory")
    assert_matches(
        refused(SFT, "tokenizer=''"), "tokenizer is empty and the preset tiny-xs has none .*; set tokenizer="
    )


GOOD_ROW = json.dumps({"prompt": "Tom has 5 apples.", "response": "The answer is 5."})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "data is empty: rows.jsonl; it needs at least one row"),
        ([GOOD_ROW, "{"], "bad row: rows.jsonl, row 2, character 2: not JSON .*; every line must be one object"),
        ([GOOD_ROW, '{"prompt": "Tom has 5 apples."}'], "bad row: rows.jsonl, row 2, column 'response': missing; "),
        (
            [GOOD_ROW, '{"prompt": 5, "response": "5"}'],
            "bad row: rows.jsonl, row 2, column 'prompt': 5 is not text;",
        ),
        (
            [GOOD_ROW] * 2 + ['{"prompt": " ", "response": "5"}'],
            "rows.jsonl, row 3, column 'prompt': empty; write",
        ),
        (
            [GOOD_ROW, '{"prompt": "Zed has 5", "response": "5"}'],
            "row 2, column 'prompt': words outside .* 'Zed'; use",
        ),
    ],
)
def test_data_files(lines: list[str], message: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert_matches(refused(SFT, "data.source=rows.jsonl", "global_batch=1", "micro_batch=1"), message)


@pytest.mark.parametrize(
    ("command", "setting"),
    [(SFT, "data"), (REWARD, "labelled"), (REWARD, "heldout"), (DPO, "pairs"), (DPO, "heldout"), (PPO, "prompts")],
)
def test_missing_data_files(command: tuple[str, ...], setting: str, refused: Callable[..., str]) -> None:
    said = refused(command, f"{setting}.source=no.jsonl")
    assert_matches(said, "data file does not exist: no.jsonl; check the path")


def test_long_prompts_are_listed_or_dropped_as_the_setting_says(tmp_path: Path, refused: Callable[..., str]) -> None:
    short, long = "Tom has 5 apples.", "Tom has 5 apples. Tom buys 5. Tom buys 5. Tom buys 5."
    rows = [short if index % 4 else long for index in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    limited = ("prompts.source=rows.jsonl", "prompts.max_tokens=8")
    # BOS and the words and marks: 6 tokens and 18; every fourth row of 20, counted from 1, is long.
    message = (
        "rows longer than max_tokens=8: 5 of 20 in rows.jsonl, row (tokens) 1 (18), 5 (18), 9 (18), 13 (18), 17 (18)"
    )
    assert_matches(refused(PPO, *limited), message)
    # Dropped, 15 are left: too few for a batch of 16.
    assert_matches(refused(PPO, *limited, "prompts.overlong=drop"), "15 prompts, 16 needed an iteration")
    none_left = refused(PPO, *limited[:1], "prompts.max_tokens=5", "prompts.overlong=drop")
    assert_matches(
        none_left, "no row is left: all 20 of rows.jsonl are longer than max_tokens=5, the shortest has 6; raise"
    )


def test_rows_beyond_the_context(tmp_path: Path, refused: Callable[..., str]) -> None:
    row = {"prompt": "Tom buys 5. " * 80, "response": "5"}  # BOS, 80 x 4 words and marks, 1 word, EOS
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    said = refused(SFT, "data.source=rows.jsonl", "global_batch=1", "micro_batch=1", "optim.schedule=constant")
    assert_matches(
        said, "longest row of data has 323 tokens, but the model's context is 256; set data.max_tokens=256 and"
    )
    pair = {"prompt": row["prompt"], "chosen": "5", "rejected": "4"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    said = refused(DPO, "pairs.source=pairs.jsonl", "global_batch=1", "micro_batch=1", "optim.schedule=constant")
    assert_matches(
        said, "longest row of pairs has 323 tokens, but the model's context is 256; set pairs.max_tokens=256 and"
    )
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    said = refused(GENERATE, "prompts.source=prompts.jsonl")
    assert_matches(
        said, "exceeds the context of model, 256 tokens; lower prompts.max_tokens and set prompts.overlong=drop"
    )


@pytest.mark.parametrize("command", [SFT, REWARD, DPO, PPO], ids=lambda command: command[0])
def test_run_directories(command: tuple[str, ...], tmp_path: Path, refused: Callable[..., str]) -> None:
    for trace in ("metrics.jsonl", "config.yaml", "model"):
        (tmp_path / trace / "used" / trace).mkdir(parents=True)
        used = f"run_dir={trace}/used"
        assert_matches(
            refused(command, used), f"{used} already holds a run ({trace} is there); choose another, or remove"
        )
    (tmp_path / "file").touch()
    assert_matches(
        refused(command, "run_dir=file/run"), "run_dir=file/run cannot be made: .*file is a file; choose another"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_run_directories_without_permission(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_matches(
        refused(SFT, "run_dir=locked/run"), "run_dir=locked/run cannot be made: .*locked cannot be written to; "
    )


def test_outputs(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "there.jsonl").write_text("work")
    assert_matches(
        refused(GENERATE, "output=there.jsonl"), "output=there.jsonl exists and .*; choose another file, or remove it"
    )
    assert_matches(
        refused(GENERATE, "output=no/x.jsonl"), "output=no/x.jsonl: there is no directory no; make it, or choose"
    )
