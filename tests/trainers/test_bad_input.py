"""Each bad input stops before a model is built: exit code 2, one message with the setting, the values, the remedy."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from megarlhf import cli
from megarlhf.checkpoint.sharded import ModelDescription
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.models import role
from megarlhf.models.spec import preset
from megarlhf.parallel import mesh

RANKED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS")

SFT = (
    "sft",
    "model=tiny-xs",
    "tokenizer=arithmetic",
    "data.template=plain",
    "data.arithmetic.rows=64",
    "global_batch=16",
)
REWARD = (
    *("reward", "model=tiny-xs", "tokenizer=arithmetic", "labelled.template=plain", "labelled.arithmetic.rows=64"),
    *("labelled_batch=16",),
)
PPO = (
    *("ppo", "actor.init=tiny-xs", "reward.init=tiny-xs", "tokenizer=arithmetic", "prompts.template=plain"),
    *(
        "prompts.arithmetic.rows=32",
        "rollout_batch=16",
        "global_batch=16",
        "sampling.max_new_tokens=16",
        "iterations=2",
    ),
)
GENERATE = (
    *("generate", "model=tiny-xs", "tokenizer=arithmetic", "prompts.template=plain", "prompts.arithmetic.rows=4"),
    "sampling.max_new_tokens=16",
)


class ModelWasBuiltError(Exception):
    """A model was about to be built, so no check had found fault."""


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; return the one line it printed."""

    def built(*_args: object, **_options: object) -> None:
        raise ModelWasBuiltError

    monkeypatch.setattr(role, "build_chunks", built)
    monkeypatch.chdir(tmp_path)
    for name in RANKED:
        monkeypatch.delenv(name, raising=False)

    def refused(command: tuple[str, ...], *overrides: str) -> str:
        run_dir = [] if command[0] == "generate" else ["run_dir=run"]
        capfd.readouterr()
        assert cli.main([*command, *run_dir, *overrides]) == 2
        said = capfd.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        assert not Path("run/metrics.jsonl").exists()
        return said.err

    return refused


@pytest.mark.parametrize("command", [SFT, REWARD, PPO, GENERATE], ids=lambda command: command[0])
def test_the_good_input_that_the_cases_spoil_gets_as_far_as_the_model(
    command: tuple[str, ...], refused: Callable[..., str]
) -> None:
    try:
        with pytest.raises(ModelWasBuiltError):
            refused(command)
    finally:
        mesh.stop()


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        (PPO, "kl_cof=0.1", "unknown setting kl_cof = 0.1 .*did you mean kl_coef?"),
        (PPO, "actor.optim.lrr=1", "unknown setting actor.optim.lrr = 1 .*did you mean actor.optim.lr?"),
        (PPO, "tensor=2", "unknown setting tensor = 2 .*did you mean layout.tensor?"),
        (SFT, "global_batch=many", "setting global_batch = 'many': .*; give int >= 1"),
        (SFT, "epochs=-1", "setting epochs = -1: .*greater than 0; give float > 0"),
    ],
)
def test_settings(command: tuple[str, ...], override: str, message: str, refused: Callable[..., str]) -> None:
    assert_matches(refused(command, override), message)


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (SFT, ["layout.tensor=8"], "model heads=4 is not divisible by layout.tensor=8; choose a layout.tensor that"),
        (SFT, ["layout.tensor=4"], "model query groups=2 is not divisible by layout.tensor=4; choose"),
        (SFT, ["layout.pipeline=3"], "model layers=4 is not divisible by layout.pipeline=3; choose"),
        (
            PPO,
            ["critic.init=odd", "layout.tensor=2"],
            "critic.init ffn_size=99 is not divisible by layout.tensor=2; choose",
        ),
        (PPO, ["layout.tensor=8"], "actor.init heads=4 is not divisible by layout.tensor=8; choose"),
        (
            SFT,
            ["layout.virtual_pipeline=2"],
            "layout.virtual_pipeline=2 needs .* layout.pipeline=1; set layout",
        ),
        (SFT, ["layout.sequence_parallel=true"], "layout.sequence_parallel=true .* layout.tensor=1; set layout.tensor"),
        (
            PPO,
            ["layout.virtual_pipeline=2", "layout.pipeline=2"],
            "layout.virtual_pipeline=2 cannot roll out: .*; set layout.virtual_pipeline=1",
        ),
        (GENERATE, ["layout.data=5"], "layout.data=5 is more than the 4 prompts; set it to at most 4"),
    ],
)
def test_layouts(
    command: tuple[str, ...], overrides: list[str], message: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    write_model(tmp_path / "odd", ffn_size=99)
    assert_matches(refused(command, *overrides), message)


@pytest.mark.parametrize("ranks", ["1", "3", "8"])
def test_rank_counts(ranks: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ranks}.items():
        monkeypatch.setenv(name, value)
    said = refused(PPO, "layout.tensor=2", "layout.data=2")
    assert_matches(said, f"layout needs 4 ranks (tensor 2 x pipeline 1 x data 2) but {ranks} were started; .*start 4")


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (SFT, ["layout.data=3"], "global_batch=16 does not divide over layout.data=3 ranks; use a multiple of 3"),
        (
            SFT,
            ["micro_batch=5"],
            "global_batch=16 is 16 rows a data rank, .* micro_batch=5; set micro_batch to a",
        ),
        (
            SFT,
            ["global_batch=128"],
            "global_batch=128 is more than the 64 rows of data; lower global_batch to",
        ),
        (
            SFT,
            ["optim.warmup_steps=4"],
            "optim.warmup_steps=4 is not less than the run's 4 optimiser steps; set .*4",
        ),
        (SFT, ["optim.min_lr=1"], "optim.min_lr=1.0 exceeds optim.lr=1e-05; lower optim.min_lr"),
        (REWARD, ["labelled_batch=15"], "labelled_batch=15 is odd; .*use an even number"),
        (
            REWARD,
            ["labelled_batch=128"],
            "labelled_batch=128 is more than the 64 rows of labelled; lower labelled",
        ),
        (REWARD, ["labelled=null"], "pairs and labelled are both unset; set pairs.source or labelled.source"),
        (PPO, ["group_size=3"], "rollout_batch=16 is not divisible by group_size=3; change"),
        (
            PPO,
            ["group_size=8", "layout.data=4"],
            "rollout_batch=16 / group_size=8 is 2 prompts, .*layout.data=4 ranks;",
        ),
        (PPO, ["global_batch=12"], "rollout_batch=16 is not divisible by global_batch=12; change"),
        (PPO, ["micro_batch=3"], "global_batch=16 is 16 rows a data rank, .* micro_batch=3; set"),
        (
            PPO,
            ["prompts.arithmetic.rows=15"],
            "15 prompts, 16 needed an iteration .*; add prompts, lower rollout",
        ),
        (
            PPO,
            ["sampling.temperature=0"],
            "sampling.temperature=0 always draws the same .*; set it above 0",
        ),
        (
            PPO,
            ["sampling.max_new_tokens=400"],
            "sampling.max_new_tokens=400 after prompts of up to .* tokens exceeds",
        ),
        (
            GENERATE,
            ["sampling.max_new_tokens=256"],
            "the context of model, 256 tokens; set sampling.max_new_tokens",
        ),
        (
            PPO,
            ["actor.optim.warmup_steps=8"],
            "actor.optim.warmup_steps=8 is not less than the run's 8 .*; set .*8",
        ),
        (PPO, ["critic.optim.warmup_steps=9"], "critic.optim.warmup_steps=9 is not less than the run's 8 .*; set"),
        (
            PPO,
            ["value_warmup_iterations=2"],
            "value_warmup_iterations=2 leaves none of the iterations=2 .*; set .*2",
        ),
    ],
)
def test_numbers(command: tuple[str, ...], overrides: list[str], message: str, refused: Callable[..., str]) -> None:
    assert_matches(refused(command, *overrides), message)


def missing(path: Path) -> str:
    return f"{path.name!r} is neither a directory nor a preset; name a Hugging Face or megarlhf model directory"


def without_config(path: Path) -> str:
    path.mkdir()
    return f"model directory {path.name}: config.json is missing; name a complete one"


def without_weights(path: Path) -> str:
    write_model(path)
    (path / "model.safetensors").unlink()
    return f"{path.name}: neither model.safetensors nor model.safetensors.index.json is there; "


def without_a_shard(path: Path) -> str:
    write_model(path, shard="60KB")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    return f"{path.name}: {shard.name} missing; the directory is partial, download it again"


def without_a_tensor(path: Path) -> str:
    write_model(path, layers=3)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    return f"{path.name}: 9 tensors are missing, first model.layers.3.*; the directory is partial"


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
    (tmp_path / "judge" / "weights").mkdir(parents=True)
    for name in ("metadata.json", ".metadata", "__0_0.distcp"):
        (tmp_path / "judge" / "weights" / name).touch()
    judge = ModelDescription(spec=preset("tiny-xs"), head="scalar")
    (tmp_path / "judge" / "model.json").write_text(judge.model_dump_json())
    write_model(tmp_path / "speaker")
    for command, setting in ((SFT, "model"), (PPO, "actor.init"), (PPO, "reference.init"), (GENERATE, "model")):
        said = refused(command, f"{setting}=judge")
        assert_matches(said, f"{setting}=judge has a scalar head, .* a language model is needed; name another")
    assert_matches(
        refused(PPO, "reward.init=speaker"), "reward.init=speaker is a language model, .*; train a reward model"
    )
    assert_matches(refused(PPO, "reward.init=''"), "reward.init is empty; name a model directory")
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
    assert_matches(refused(SFT, "tokenizer=nowhere"), "tokenizer directory does not exist: nowhere; give a directory")
    assert_matches(
        refused(SFT, "tokenizer=''"), "tokenizer is empty and the preset tiny-xs has none .*; set tokenizer="
    )


GOOD_ROW = json.dumps({"prompt": "Tom has 5 apples.", "response": "The answer is 5."})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "data is empty: rows.jsonl, split train; it needs at least one row"),
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
    ("command", "setting"), [(SFT, "data"), (REWARD, "labelled"), (REWARD, "heldout"), (PPO, "prompts")]
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
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    said = refused(GENERATE, "prompts.source=prompts.jsonl")
    assert_matches(
        said, "exceeds the context of model, 256 tokens; lower prompts.max_tokens and set prompts.overlong=drop"
    )


@pytest.mark.parametrize("command", [SFT, REWARD, PPO], ids=lambda command: command[0])
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
    (tmp_path / "there.jsonl").touch()
    assert_matches(
        refused(GENERATE, "output=there.jsonl"), "output=there.jsonl exists; choose another file, or remove it"
    )
    assert_matches(
        refused(GENERATE, "output=no/x.jsonl"), "output=no/x.jsonl: there is no directory no; make it, or choose"
    )


def write_model(path: Path, *, layers: int = 2, ffn_size: int = 192, vocab_size: int = 160, shard: str = "1GB") -> None:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=ffn_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size=shard)
    build_tiny_tokenizer(words()).save(path)


def assert_matches(said: str, message: str) -> None:
    """`message` may skip words with `.*`; everything else in it is literal."""
    pattern = ".*".join(map(re.escape, message.split(".*")))
    assert re.search(pattern, said), said
