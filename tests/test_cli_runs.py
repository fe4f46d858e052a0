"""The demo's pipeline in miniature, through the command line and on real ranks: SFT, reward, PPO, generate, eval."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.config import load_config
from megarlhf.data.sft import load_sft
from megarlhf.data.tokenizer import load_tokenizer
from megarlhf.trainers.ppo import PPOConfig
from megarlhf.trainers.sft import SftConfig
from tests.helpers.started import heeding_ctrl_c

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
RANKED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_S = 200

SFT = ("data.arithmetic.rows=192", "heldout.arithmetic.rows=32", "epochs=1", "micro_batch=16", "optim.warmup_steps=1")
REWARD = (
    *("pairs.arithmetic.rows=64", "labelled.arithmetic.rows=128", "heldout.arithmetic.rows=32", "epochs=1"),
    *("heldout_pairs.arithmetic.rows=16", "optim.warmup_steps=0"),
)
DPO = (*("pairs.arithmetic.rows=96", "heldout.arithmetic.rows=32", "optim.warmup_steps=0", "layout.tensor=2"),)
PPO = (
    "layout.data=2",
    *("prompts.arithmetic.rows=64", "iterations=2", "rollout_batch=16", "global_batch=8", "micro_batch=4"),
    *("ppo_epochs=1", "sampling.max_new_tokens=12", "value_warmup_iterations=0"),
)
GENERATE = (
    *("generate", "model=runs/tiny/ppo/model", "prompts.template=plain", "prompts.split=heldout", "n=2"),
    *("prompts.source=arithmetic", "prompts.arithmetic.rows=3", "sampling.max_new_tokens=12", "output=responses.jsonl"),
)
EVAL = (
    *("eval", "model=runs/tiny/ppo/model", "prompts.template=plain", "prompts.source=arithmetic"),
    *("prompts.arithmetic.rows=20", "sampling.max_new_tokens=12", "output=judged.jsonl"),
)


def started(*arguments: str, directory: Path) -> subprocess.Popen[str]:
    """The command line, begun in `directory`."""
    environment = {name: value for name, value in os.environ.items() if name not in RANKED}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    with heeding_ctrl_c():
        return subprocess.Popen(
            [sys.executable, "-m", "megarlhf.cli", *arguments],
            cwd=directory,
            env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def megarlhf(*arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    with started(*arguments, directory=directory) as process:
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all six commands have run, those that train from their examples with smaller numbers."""
    directory = tmp_path_factory.mktemp("pipeline")
    for command, overrides in (("sft", SFT), ("reward", REWARD), ("dpo", DPO), ("ppo", PPO)):
        done = megarlhf(command, "--config", str(EXAMPLES / f"{command}_tiny.yaml"), *overrides, directory=directory)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout == ""
        assert "Warning" not in done.stderr
        assert done.stderr.count("what this run uses") == 1
        (directory / f"{command}.txt").write_text(done.stderr)
    for arguments in (GENERATE, EVAL):
        done = megarlhf(*arguments, directory=directory)
        assert done.returncode == 0, done.stderr
    return directory


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


SAID = {
    "sft": [
        "data: arithmetic (train), 192 rows, 0 dropped, ",
        "data, first row, response: ",
        "heldout: arithmetic (heldout), 32 rows",
        "steps: 3, each of 64 rows",
    ],
    "reward": [
        *(
            "pairs: arithmetic (train), ",
            "pairs, first row, rejected: <|begin_of_text|>",
            "labelled: arithmetic (train), ",
        ),
        *(
            "heldout: arithmetic (heldout), 32 rows",
            "heldout_pairs: arithmetic (heldout), ",
            "steps: 2, each of 32 rows of pairs and 64 rows of labelled",
        ),
    ],
    "dpo": [
        *("pairs: arithmetic (train), ", "pairs, first row, rejected: <|begin_of_text|>"),
        *("heldout: arithmetic (heldout), ", "steps: 3, each of 32 pairs; the reference is model=runs/tiny/sft/model"),
    ],
    "ppo": [
        *("prompts: arithmetic (train), 64 rows, 0 dropped, ", "prompts, first row, prompt: <|begin_of_text|>"),
        *("epochs 0.5", "a response ends at <|eot_id|> (4)", "verifier: arithmetic, of the 64 of 64 prompts"),
        "iterations: 2, each of 16 rollouts and 2 optimiser steps",
    ],
}


@pytest.mark.parametrize("stage", SAID)
def test_a_start_says_what_it_reads_and_how_long_it_takes(stage: str, runs: Path) -> None:
    said = (runs / f"{stage}.txt").read_text()
    for line in (*SAID[stage], "template plain"):
        assert line in said, said


@pytest.mark.parametrize(("stage", "steps"), [("sft", 3), ("reward", 2), ("dpo", 3), ("ppo", 2)])
def test_a_run_leaves_its_metrics_and_its_provenance(stage: str, steps: int, runs: Path) -> None:
    run = runs / "runs" / "tiny" / stage
    # 192 rows in batches of 64; 128 judged responses in batches of 64; 83 pairs in batches of 32; 2 iterations.
    assert max(row["step"] for row in metrics(run)) == steps
    assert all(row["train/skipped_steps"] == 0 for row in metrics(run) if "train/skipped_steps" in row)
    assert (run / "command.txt").read_text().startswith(f"megarlhf {stage} --config ")
    assert json.loads((run / "versions.json").read_text()).keys() >= {"torch", "megatron-core", "python", "commit"}
    assert list((run / "tensorboard").iterdir())


NEXT = {
    "sft": "generate model=MODEL prompt='...', or megarlhf reward model=MODEL pairs.source=FILE",
    "reward": "ppo actor.init=runs/tiny/sft/model reward.init=MODEL prompts.source=FILE",
    "dpo": "generate model=MODEL prompt='...', or megarlhf eval model=MODEL prompts.source=FILE verifier=maths",
    "ppo": "eval model=MODEL prompts.source=arithmetic prompts.arithmetic.level=1 sampling.max_new_tokens=12, "
    "or megarlhf convert model=MODEL output=OUT to=hf verify=true",
}


@pytest.mark.parametrize(
    ("stage", "number"),
    [("sft", "sft/loss"), ("reward", "reward/auc"), ("dpo", "dpo/heldout_accuracy"), ("ppo", "rollout/score_mean")],
)
def test_a_run_ends_with_its_page_and_says_where_the_model_is_and_what_is_next(
    stage: str, number: str, runs: Path
) -> None:
    run = f"runs/tiny/{stage}"
    *_, model, last, following = (runs / f"{stage}.txt").read_text().splitlines()
    value = next(row[number] for row in reversed(metrics(runs / run)) if number in row)
    assert re.match(r"\d+ steps are done, this start took 0:\d\d; the model is in ", model)
    assert model.endswith(f"; the model is in {run}/model; the page is {run}/report.html")
    assert last.startswith("last: ")
    assert f"{number} {value:.4g}" in last
    assert following == f"next: megarlhf {NEXT[stage].replace('MODEL', f'{run}/model')}"
    page = (runs / run / "report.html").read_text(encoding="utf-8")
    assert (page.count("<article class='sample card'>") > 0) == (stage == "ppo")
    for shown in PAGE[stage]:
        assert re.sub(r"<wbr>", "", page).count(shown) == 1, shown


PAGE = {
    "sft": [
        *("Finished after 3 of 3 steps.", "<tr><td>model<td>tiny-xs<td>0.218 M parameters, language</tr>"),
        *("<td>arithmetic (train)<td>192<td>0<td>", "<tr><td>optim.lr<td>0.003<td>1e-05</tr>"),
    ],
    "reward": [
        *("Finished after 2 of 2 steps.", "<td>arithmetic (heldout)<td>32<td>0<td>"),
        *("<tr><td>heldout.split<td>heldout<td>&quot;&quot;</tr>", "<figcaption>Gradient norm<"),
    ],
    "dpo": [
        *(
            "Finished after 3 of 3 steps.",
            "<tr><td>reference<td>runs/tiny/sft/model<td>0.218 M parameters, language</tr>",
        ),
        *("<tr><td>layout.tensor<td>2<td>1</tr>", "<dd>2 ranks, "),
    ],
    "ppo": [
        *(
            "Finished after 2 of 2 iterations.",
            "<tr><td>critic<td>runs/tiny/reward/model<td>0.218 M parameters, scalar</tr>",
        ),
        *("<tr><td>actor.optim.lr<td>0.0002<td>3e-06</tr>", "<figcaption>Learning rate<", "<figcaption>Peak memory<"),
    ],
}
"""What is there once on a run's page."""


def test_an_evaluation_leaves_its_page(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "judged.jsonl").read_text().splitlines()]
    page = (runs / "judged.jsonl.html").read_text(encoding="utf-8").replace("<wbr>", "")
    right = {way: sum(row["correct"] for row in rows if row["decoding"] == way) for way in ("sampled", "greedy")}
    for way, count in right.items():
        assert f"Accuracy, {way}</div><div class=value>{5 * count:.1f} %</div>" in page
        assert f"{20 - count} wrong, the first 8 of them" in page
    assert "<tr><td>model<td>runs/tiny/ppo/model<td>0.218 M parameters, language</tr>" in page
    assert "<tr><td>prompts.arithmetic.rows<td>20<td>4000</tr>" in page
    done = megarlhf(*EVAL[:-1], "output=judged.jsonl", directory=runs)
    assert done.returncode == 2
    (runs / "again.jsonl.html").write_text("mine")
    done = megarlhf(*EVAL[:-1], "output=again.jsonl", directory=runs)
    assert done.returncode == 2
    assert done.stderr == "output=again.jsonl.html exists; choose another file, or remove it.\n"


def test_a_run_that_fails_leaves_its_page(tmp_path: Path) -> None:
    diverging = ("optim.lr=1e10", "optim.warmup_steps=0", "max_skipped_steps=0", "save_every=0", "micro_batch=64")
    settings = ("--config", str(EXAMPLES / "sft_tiny.yaml"), "run_dir=run", "data.arithmetic.rows=256", *diverging)
    done = megarlhf("sft", *settings, directory=tmp_path)
    assert done.returncode == 1, done.stderr
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    (capsule,) = (tmp_path / "run" / "capsules").iterdir()
    after = int(capsule.name.removeprefix("step_"))
    failed = f"Failed in the step after {after} of 16 steps; what the ranks left is in capsules/{capsule.name}."
    (warning,) = re.findall(r"<p class=warning>(.*?)</p>", page)
    assert warning.startswith(f"<b>{failed}</b> not finite: loss nan")


def test_throughput_counts_every_token_that_goes_through_the_model(runs: Path) -> None:
    """One epoch reads every row once: its tokens but the last, supervised or not."""
    run = runs / "runs" / "tiny" / "sft"
    cfg = load_config(SftConfig, run / "config.yaml", [])
    every = load_sft(cfg.data, load_tokenizer(run / "model" / "tokenizer")).batch(torch.arange(192))
    steps = [row for row in metrics(run) if row["step"]]  # at step 0 something is measured, which is no training
    counted = sum(row["throughput/train_tokens_per_s"] * row["time/train_s"] for row in steps)
    assert counted == pytest.approx(int(every.lengths.sum()) - 192)
    assert counted > 1.5 * sum(row["sft/tokens"] for row in steps)


def test_ppo_starts_on_policy_and_samples_what_it_trains(runs: Path) -> None:
    for row in metrics(runs / "runs" / "tiny" / "ppo"):
        # The first optimiser step of an iteration sees the policy that made the rollouts.
        assert row["policy/first_ratio_gap"] <= 1e-6
        assert row["policy/first_clip_fraction"] == 0
        assert row["rollout/sampler_gap_max"] <= 1e-5
        assert row["rollout/tokens"] <= 16 * 12
    # Before the first step the policy is the reference.
    assert metrics(runs / "runs" / "tiny" / "ppo")[0]["kl/reference_mean"] == 0


def test_the_resolved_settings_make_the_same_run(runs: Path) -> None:
    cfg = load_config(PPOConfig, runs / "runs" / "tiny" / "ppo" / "config.yaml", [])
    assert cfg == load_config(PPOConfig, EXAMPLES / "ppo_tiny.yaml", PPO)
    assert cfg.layout.world_size == 2


@pytest.mark.parametrize(
    ("stage", "head"), [("sft", "language"), ("reward", "scalar"), ("dpo", "language"), ("ppo", "language")]
)
def test_models_are_whole(stage: str, head: str, runs: Path) -> None:
    model = runs / "runs" / "tiny" / stage / "model"
    assert describe_model(str(model)).head == head
    tokenizer = load_tokenizer(model / "tokenizer")
    assert tokenizer.decode(tokenizer.encode_response("The answer is 5.")) == "The answer is 5."
    assert not list(model.parent.glob("model.*")), "a partial or an old model was left"


def test_generated_rows(runs: Path) -> None:
    rows = [json.loads(line) for line in (runs / "responses.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 2
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first["prompt"] == second["prompt"]
        assert "How many" in first["prompt"]
    for row in rows:
        assert row["logprob"] < 0
        assert 1 <= row["tokens"] <= 12
        assert row["terminated"] or row["tokens"] == 12
        assert "<|" not in row["response"]


@pytest.mark.slow
def test_generate_says_the_same_on_two_ranks(runs: Path) -> None:
    done = megarlhf(*GENERATE[:-1], "layout.tensor=2", directory=runs)
    assert done.returncode == 0, done.stderr
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    written = [json.loads(line) for line in (runs / "responses.jsonl").read_text().splitlines()]
    for one, other in zip(written, printed, strict=True):
        assert one["response"] == other["response"]
        assert abs(one["logprob"] - other["logprob"]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_ends_a_run_with_one_line(ranks: int, tmp_path: Path) -> None:
    """While a state is being written too: nobody who presses it waits for that."""
    process = started(
        *("sft", "run_dir=run", "model=tiny-xs", "tokenizer=arithmetic", "data.template=plain", "save_every=1"),
        *("data.arithmetic.level=1", "data.arithmetic.rows=16000", "global_batch=8", "micro_batch=4"),
        f"layout.data={ranks}",
        directory=tmp_path,
    )
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + TIMEOUT_S
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, said
    assert time.monotonic() - pressed < 30
    after = said.partition("steps: 2,000, each of 8 rows")[2].strip().splitlines()
    assert [line for line in after if not line.startswith("SFT: ")] == ["interrupted"]


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_on_every_rank_and_the_command_goes_on(tmp_path: Path) -> None:
    command = [
        *("sft", "run_dir=run", "model=tiny-xs", "tokenizer=arithmetic", "data.template=plain", "layout.data=2"),
        *("data.arithmetic.level=1", "data.arithmetic.rows=1600", "global_batch=8", "micro_batch=4"),
    ]
    process = started(*command, directory=tmp_path)
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + TIMEOUT_S
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 75, said
    assert said.count("stopped by SIGTERM after step ") == 1
    step = int((tmp_path / "run" / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert f"stopped by SIGTERM after step {step}; its state is in run/checkpoints" in said
    assert log.read_text().count("\n") == step < 200
    done = megarlhf(*command, directory=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 201))
