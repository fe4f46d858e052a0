"""The step benchmark at a tiny size: what it writes is complete and adds up. No time is judged."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr
from pathlib import Path
from statistics import median

import pytest

from tests.helpers.ranks import run_ranks
from tools.bench_step import anywhere, main

TINY = (
    "--hidden 32 --layers 2 --heads 2 --kv-heads 1 --ffn 48 --vocab 160 --prompts 2 --group 4 "
    "--prompt-tokens 6 --new-tokens 10 --micro-batch 4 --repeats 3 --threads 1 --json"
)
ROOT = Path(__file__).resolve().parents[2]
AGAINST_TRL = ("--algorithm", "grpo", "--vs", "trl")
RESPONSES = 8 * 10
POSITIONS = 8 * (6 + 10 - 1)


def _bench(path: Path, *more: str) -> int:
    return main([*TINY.split(), str(path), *more])


def test_settings_are_written_down_without_where_they_were() -> None:
    given = {"run_dir": "/tmp/x/run", "judges": {"words": {"function": f"{ROOT}/tools/step_bench/workload.py:score"}}}
    written = anywhere(given, Path("/tmp/x"))
    assert written == {"run_dir": "DIR/run", "judges": {"words": {"function": "tools/step_bench/workload.py:score"}}}


def test_json_is_complete_and_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    assert run_ranks(_bench, 1, path) == [0]
    report = json.loads(path.read_text())
    assert report["command"].startswith("python tools/bench_step.py --hidden 32")
    assert {"python", "commit", "torch", "transformers"} <= report["versions"].keys()
    assert report["machine"]["threads"] == 1
    assert report["workload"]["new_tokens"] == 10

    phases = {row["phase"]: row for row in report["phases"]}
    scores = {f"score_{role}" for role in ("actor", "reference", "critic", "reward")}
    assert phases.keys() == {"rollout", "rollout_ragged", *scores, "update_actor", "update_critic", "iteration"}
    assert phases["iteration"]["counterpart"] == {"generate": 1, "forward": 4, "train": 2}
    for name, row in phases.items():
        theirs = {peer: median(report["transformers"][peer]["all_seconds"]) for peer in row["counterpart"]}
        assert len(row["all_seconds"]) == 3
        assert row["seconds"] == median(row["all_seconds"]) > 0
        expected = sum(times * theirs[peer] for peer, times in row["counterpart"].items())
        assert row["transformers_seconds"] == pytest.approx(expected)
        assert row["ratio"] == pytest.approx(row["seconds"] / expected)
        tokens = row["tokens_per_s"] * row["seconds"]
        if name == "rollout_ragged":
            assert 8 * 4 <= tokens < RESPONSES  # 8 rows of 4 to 10 tokens
        else:
            assert tokens == pytest.approx(RESPONSES if name in ("rollout", "iteration") else POSITIONS)
    # A backward pass is two forward passes; the actor's forward is the critic's and a vocabulary projection.
    flops = {name: row["flops_per_s"] * row["seconds"] for name, row in phases.items()}
    assert flops["update_critic"] == pytest.approx(3 * flops["score_critic"])
    assert flops["score_actor"] - flops["score_critic"] == pytest.approx(2 * RESPONSES * 160 * 32)


def test_grpo_has_its_own_phases(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    assert run_ranks(_bench, 1, path, "--algorithm", "grpo") == [0]
    report = json.loads(path.read_text())
    phases = {row["phase"]: row for row in report["phases"]}
    names = {"rollout", "rollout_ragged", "score_actor", "score_reference", "update_actor", "iteration"}
    assert phases.keys() == names
    assert phases["iteration"]["counterpart"] == {"generate": 1, "forward": 1, "train": 1}
    # Every forward is the same model's: rolling out, the reference, and a step, which counts as three.
    flops = {name: row["flops_per_s"] * row["seconds"] for name, row in phases.items()}
    assert flops["iteration"] == pytest.approx(5 * flops["score_reference"])


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed; it is in the set `bench`")
def test_beside_trl_both_do_the_same(tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    # In a process of its own: where there are ranks TRL is wrapped for several.
    command = [sys.executable, "tools/bench_step.py", *TINY.split(), str(path), *AGAINST_TRL]
    subprocess.run([*command, "--peer-micro-batch", "2"], cwd=ROOT, check=True, timeout=240)
    report = json.loads(path.read_text())
    equal, ragged = report["phases"]
    assert [equal["phase"], ragged["phase"]] == ["iteration", "iteration_ragged"]
    for row, kind in ((equal, "equal"), (ragged, "ragged")):
        (step,) = row["counterpart"]
        theirs = report["trl"][step]["all_seconds"]
        assert len(theirs) == len(row["all_seconds"]) == 3
        assert row["trl_seconds"] == median(theirs) > 0
        assert row["ratio"] == pytest.approx(row["seconds"] / row["trl_seconds"])
        parts = report["parts"][kind]
        for each in range(3):
            ours = sum(parts[name][each] for name in ("rollout", "score", "estimate", "optimise"))
            assert 0 < ours <= row["all_seconds"][each]
            assert 0 < parts["generate"][each] < theirs[each]
    # 4 rounds, one of them to warm up, of two iterations.
    short = ragged["tokens_per_s"] * ragged["seconds"]
    for side in ("our", "trl"):
        assert report["counts"][f"{side}_rollouts"] == 4 * 2 * 8
        assert report["counts"][f"{side}_tokens"] == pytest.approx(4 * (RESPONSES + short))
        assert report["counts"][f"{side}_steps"] == 4 * 2
    assert 8 * 4 <= short < RESPONSES
    # The same weights, prompts and steps, other responses: the KLs are of one size.
    assert 1 / 3 < report["kl"]["ours"] / report["kl"]["trl"] < 3
    said = report["settings"]
    assert said["trl"]["per_device_train_batch_size"] * said["trl"]["gradient_accumulation_steps"] == 8
    assert said["trl"]["learning_rate"] == said["ours"]["actor"]["optim"]["lr"]
    assert said["trl"]["beta"] == said["ours"]["kl_coef"] == 0.04
    assert report["versions"]["trl"].startswith("1.16.")


def test_without_trl_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*AGAINST_TRL]) == 2
    said = "--vs trl: TRL is not installed; it is in the extra `bench`: pip install -e '.[bench]'\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--vs trl", "--vs trl with --algorithm ppo: TRL has GRPO; add --algorithm grpo"),
        ("--algorithm grpo --vs trl --peer-micro-batch 3", "must be a multiple of --peer-micro-batch"),
        ("--prompts 0", "argument --prompts: 0 is no count; give a whole number of at least 1"),
        ("--repeats x", "argument --repeats: x is no count; give a whole number of at least 1"),
        ("--heads 3", "--hidden must be a multiple of 2 x --heads, --heads of --kv-heads"),
        ("--hidden 34", "--hidden must be a multiple of 2 x --heads"),
        ("--heads 4 --kv-heads 3", "--heads of --kv-heads"),
        ("--new-tokens 3", "--new-tokens at least 4"),
    ],
)
def test_sizes_that_no_model_has_are_refused(change: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*TINY.split()[:-1], *change.split()])
    assert message in capsys.readouterr().err


def test_a_workload_that_does_not_divide_is_one_message() -> None:
    assert run_ranks(_refused, 1, ()) == [(2, "global_batch=4 is 4 rows a data rank, not divisible by micro_batch=64")]


def _refused(_: object) -> tuple[int, str]:
    with redirect_stderr(io.StringIO()) as said:
        code = main([*TINY.replace("--micro-batch 4", "").split()[:-1], "--group", "2"])
    return code, said.getvalue().splitlines()[-1].partition(";")[0]
