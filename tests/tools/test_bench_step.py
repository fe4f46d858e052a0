"""The step benchmark at a tiny size: what it writes is complete and adds up. No time is judged."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from statistics import median

import pytest

from tests.helpers.ranks import run_ranks
from tools.bench_step import main

TINY = (
    "--hidden 32 --layers 2 --heads 2 --kv-heads 1 --ffn 48 --vocab 160 --prompts 2 --group 4 "
    "--prompt-tokens 6 --new-tokens 10 --micro-batch 4 --repeats 3 --threads 1 --json"
)
RESPONSES = 8 * 10
POSITIONS = 8 * (6 + 10 - 1)


def _bench(path: Path) -> int:
    return main([*TINY.split(), str(path)])


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
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
