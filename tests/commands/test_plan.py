"""`megarlhf plan` from the command line: what it says of run files, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megarlhf import cli
from megarlhf.commands.plan import settings_of
from megarlhf.config import load_config
from megarlhf.errors import BAD_INPUT, DONE
from megarlhf.rollout.sampling import RolloutLayout
from megarlhf.trainers.ppo import PPOConfig
from tests.helpers.documents import blocks

GIB = 1 << 30
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("llama3_*.yaml"))
COMMANDS = [
    line
    for block in blocks((EXAMPLES.parent / "docs" / "plan.md").read_text(encoding="utf-8"))
    for line in block.splitlines()
    if line.startswith("megarlhf plan")
]
SIZES = {"8b": ("llama3-8b", "llama3-8b"), "70b": ("llama3.1-70b",) * 2, "405b": ("llama3.1-405b", "llama3.1-70b")}
"""Of actor and reward model, by the size in a file's name."""
NODE = ["actor.init=llama3-8b", "reward.init=llama3-8b", "micro_batch=4", "layout.data=8"]


def words_of(file: Path) -> list[str]:
    """The command that plans a run file."""
    trainer = re.findall(r"^# megarlhf (\w+) ", file.read_text(encoding="utf-8"))[0]
    actor, reward = SIZES[file.stem.split("_")[1]]
    judged = [f"shape.reward={reward}"] if trainer == "ppo" else []
    return ["plan", f"trainer={trainer}", "--config", str(file), f"shape.actor={actor}", *judged]


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_of_the_document_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(line, comments=True)[1:]) == DONE
    assert (tmp_path / "best.yaml").is_file() == ("out=best.yaml" in line)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main([*words, "form=json"]) == DONE
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["plan", *words]) == BAD_INPUT
    return capsys.readouterr().err


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_run_file_fits_in_its_own_layout(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *words_of(file))
    assert plan["own_layout"]
    assert plan["fits"]
    assert plan["shown"]["peak_bytes"] <= plan["usable_bytes"]
    # What a file says of itself is what the plan says of it.
    head = " ".join(file.read_text(encoding="utf-8").replace("\n#", " ").split())
    peak, host = plan["shown"]["peak_bytes"] / GIB, min(plan["gpus"], 8) * plan["host_and_disk_bytes"]["away"] / GIB
    assert {int(said) for said in re.findall(r"a GPU holds at most (\d+) GiB", head)} <= {round(peak)}
    assert {int(said) for said in re.findall(r"host holds (\d+) GiB", head)} == {round(host)}


def test_the_settings_of_the_fastest_layout_are_a_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = EXAMPLES / "llama3_8b_ppo.yaml", tmp_path / "best.yaml"
    plan = planned(capsys, *words_of(file), "gpus=16", "seed=7", f"out={out}")
    assert (plan["gpus"], plan["own_layout"]) == (16, False)
    before, best = (load_config(PPOConfig, path, []) for path in (file, out))
    fastest = plan["layouts"][0]
    assert dict(best.layout) == fastest["layout"]
    assert (best.micro_batch_tokens, best.compute.recompute, best.offload == "host") == (
        fastest["micro_batch_tokens"],
        fastest["recompute"],
        fastest["offload"],
    )
    # Nothing else has changed but what was typed.
    chosen = {"layout", "micro_batch_tokens", "compute", "offload"}
    assert {name for name, value in before if value != dict(best)[name]} - chosen == {"seed"}
    assert best.compute.cuda_graphs == before.compute.cuda_graphs
    # And the plan of that file is the same.
    again = planned(capsys, *[str(out) if word == str(file) else word for word in words_of(file)])
    assert again["own_layout"]
    assert again["shown"] == fastest


def test_a_packed_run_is_planned_and_stays_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = EXAMPLES / "llama3_8b_ppo.yaml", tmp_path / "best.yaml"
    words = [*words_of(file), "micro_batch_tokens=6144"]
    plan = planned(capsys, *words, f"out={out}")
    assert plan["shown"]["micro_batch_tokens"] == 6144
    assert all("micro_batch" not in each for each in plan["layouts"])
    assert any(said.startswith("micro_batch_tokens: ") for said in plan["assumptions"])
    best = load_config(PPOConfig, out, [])
    assert best.micro_batch_tokens == plan["layouts"][0]["micro_batch_tokens"]
    assert cli.main(words) == DONE
    assert "micro-batches: 4 of the longest rows take 6,140 of 6,144 tokens, 100%" in capsys.readouterr().out


def test_a_run_that_draws_elsewhere_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = EXAMPLES / "llama3_8b_grpo.yaml", tmp_path / "best.yaml"
    words = [*words_of(file), "layout.pipeline=2", "layout.data=2", "rollout.layout.tensor=2"]
    plan = planned(capsys, *words, "rollout.layout.data=4", "rollout.rows=100", f"out={out}")
    assert [phase["phase"] for phase in plan["shown"]["phases"]][:2] == ["refit", "rollout"]
    assert plan["shown"]["rollout_layout"]["data"] == 4
    best: Any = load_config(settings_of("grpo"), out, [f"run_dir={tmp_path}"])
    drawn = plan["layouts"][0]["rollout_layout"]
    assert best.rollout.layout == (drawn and RolloutLayout(tensor=drawn["tensor"], data=drawn["data"]))
    assert best.rollout.rows == 100
    assert cli.main([*words, "rollout.layout.data=4"]) == DONE
    assert "drawn in tensor 2 x data 4" in capsys.readouterr().out


def test_tables_say_peak_verdict_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words_of(EXAMPLES / "llama3_8b_grpo.yaml")) == DONE
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if not line.startswith(("*", "#", "grpo"))) <= 105
    for said in ("optimise actor", "save actor", "tok/s", "nothing overlaps", "fits: peak", "out=FILE writes it"):
        assert said in out
    assert "critic" not in out  # which GRPO has none of


def test_what_does_not_fit_ends_with_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *NODE, "gpu=a100-40gb")
    # Llama 3 8B in 2 + 4 bytes a weight and an eighth of 12 is 56 GiB, more than there is.
    assert "8 x a100-40gb: " in message
    assert "GiB of the 31.4 GiB there are; it fits with " in message
    fitting = message.split("it fits with ")[1].rstrip(".\n").split()
    assert cli.main(["plan", *NODE, "gpu=a100-40gb", *fitting]) == DONE


def test_more_gpus_where_no_layout_fits(capsys: pytest.CaptureFixture[str]) -> None:
    big = ["actor.init=llama3.1-70b", "reward.init=llama3.1-70b", "micro_batch=1", "gpus=8"]
    message = refused(capsys, *big)
    gpus = int(message.split("it fits with gpus=")[1].split()[0])
    assert gpus in (16, 32)
    assert cli.main(["plan", *big[:-1], f"gpus={gpus}"]) == DONE


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu=v100"], "gpu=v100 is unknown; choose one of a100-40gb, a100-80gb, h100-80gb, h200-141gb, b200-180gb."),
        (["gpus=7"], "gpus=7: no layout divides 32 layers, 8 query groups and global_batch=512; set gpus=4 or gpus=8"),
        (["layout.tensor=16", "layout.data=1"], "Nearest over as many GPUs: layout.tensor=8 layout.data=2 "),
        (["micro_batch=5"], "not divisible by micro_batch=5"),
        (["actor.init=models/none"], "actor.init=models/none is not here"),
        (["actor.init=models/none", "shape.actor=llama9"], "shape.actor=llama9 is neither a directory nor a preset"),
        (["shape.judge=llama3-8b"], "shape.judge: the run's roles are actor, reward, reference, critic; name one of"),
        (["reward.init=''"], "critic.init is empty"),
        (["trainer=none"], "trainer none is none of"),
        (["micro_batch_tokens=1024"], "and is not cut in two, but micro_batch_tokens=1024; set it to"),
        (["rollout.layout.tensor=2"], "rollout.layout is of 2 ranks (tensor 2 x data 1) but layout is of 8"),
        (["spare=79"], "GiB of the 0.1 GiB there are"),
    ],
)
def test_bad_input(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *NODE, *words)


@pytest.mark.parametrize("trainer", ["sft", "dpo", "reward", "process_reward"])
def test_trainers_that_draw_nothing(trainer: str, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = ["pairs.source=pairs.jsonl"] if trainer in ("dpo", "reward") else []
    plan = planned(capsys, "plan", f"trainer={trainer}", "model=llama3-8b", "layout.data=8", "micro_batch=1", *pairs)
    phases = {(phase["phase"], phase["role"]) for phase in plan["shown"]["phases"]}
    role = {"sft": "model", "dpo": "policy"}.get(trainer, "reward")
    frozen = {("score", "reference")} if trainer == "dpo" else set()
    assert phases == {("train", role), ("save", role), *frozen}
    assert plan["shown"]["seconds"]["rollout"] == 0


def test_sizes_are_read_of_a_directory_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    named = planned(capsys, "plan", *NODE, "layout.data=4", "layout.tensor=2")
    read = planned(capsys, "plan", *NODE, "layout.data=4", "layout.tensor=2", f"actor.init={tmp_path}")
    assert read["shown"] == named["shown"]
