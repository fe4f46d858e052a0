"""tools/bench_throughput.py: a run file's own iterations, the same work in every layout, and reports that compare."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.errors import ConfigError
from megarlhf.models.spec import PRESETS
from tools import compare_bench
from tools.bench_throughput import lines
from tools.throughput_bench.lengths import Lengths
from tools.throughput_bench.measure import phases
from tools.throughput_bench.published import anchors_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    *("ppo", "--config", "examples/ppo_tiny.yaml", "actor.init=tiny-xs", "reward.init=tiny-xs", "rollout_batch=16"),
    *("global_batch=8", "micro_batch=4", "sampling.max_new_tokens=24", "--iterations", "2", "--warmup", "1"),
)


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "tools/bench_throughput.py", *words]
    return subprocess.run(
        command, cwd=ROOT, env={**own, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of one rank and of two."""
    folder: Path = tmp_path_factory.mktemp("reports")
    made: dict[str, dict[str, Any]] = {}
    for name, layout in {"one": (), "two": ("layout.tensor=2",)}.items():
        file = folder / f"{name}.json"
        done = bench(*SMALL, *layout, "--prompts", "uniform:8:20", "--responses", "uniform:4:24", "--json", str(file))
        assert done.returncode == 0, done.stderr
        made[name] = json.loads(file.read_text()) | {"said": done.stdout, "file": file}
    return made


def test_every_phase_is_reported_with_its_rates(reports: dict[str, dict[str, Any]]) -> None:
    for report, ranks in zip(reports.values(), (1, 2), strict=True):
        assert report["ranks"] == ranks
        rows = {row["phase"]: row for row in report["phases"]}
        assert set(rows) == {"iteration", "rollout", "score", "estimate", "optimise"}
        parts = sum(row["seconds"] for name, row in rows.items() if name != "iteration")
        assert parts == pytest.approx(rows["iteration"]["seconds"], rel=0.5)
        assert all(len(row["all_seconds"]) == 2 for row in rows.values())
        for name in ("rollout", "score", "optimise"):
            assert rows[name]["tokens_per_s_per_gpu"] == rows[name]["tokens_per_s"] / ranks
            assert rows[name]["flops_per_s"] > 0
        assert [each["role"] for each in report["offload"]] == ["actor", "reference", "reward", "critic"]
        assert all(each["bytes"] > 0 and each["to_host_s"] > 0 for each in report["offload"])
        assert report["said"].splitlines()[0] == f"{ranks} ranks, medians of 2 iterations"


def test_the_plan_stands_beside_the_peak(reports: dict[str, dict[str, Any]]) -> None:
    """0.2 M parameters in fp32 are learnt with 16 bytes each; half of that on each of two tensor ranks."""
    one, two = (report["planned_peak"] for report in reports.values())
    assert (one["phase"], one["role"]) == ("optimise", "actor")
    kept = 16 * PRESETS["tiny-xs"].parameters
    assert kept < one["bytes"] < reports["one"]["peak_bytes"]  # a process has torch besides
    assert kept / 2 < two["bytes"] < one["bytes"]
    for plan, report in zip((one, two), reports.values(), strict=True):
        assert f"GiB in {plan['phase']} {plan['role']}\n" in report["said"]


def test_the_work_is_the_same_in_every_layout(reports: dict[str, dict[str, Any]]) -> None:
    """16 responses of 4 to 24 tokens an iteration, whoever draws them."""
    one, two = ({row["phase"]: row.get("tokens") for row in report["phases"]} for report in reports.values())
    assert one == two
    assert all(16 * 4 < tokens < 16 * 24 for tokens in one["rollout"])
    assert one["rollout"][0] != one["rollout"][1]


def test_a_learner_moves_weights_gradients_and_state(reports: dict[str, dict[str, Any]]) -> None:
    """tiny-xs has 0.2 M parameters in fp32: weights, gradients and two moments of a learner, weights of the others."""
    moved = {each["role"]: each["bytes"] for each in reports["one"]["offload"]}
    assert moved["actor"] == pytest.approx(4 * moved["reference"], rel=0.01)
    assert moved["critic"] == pytest.approx(4 * moved["reward"], rel=0.01)


def test_two_reports_are_compared_and_what_differs_is_said(
    reports: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (str(reports[name]["file"]) for name in ("one", "two"))
    assert compare_bench.main([one, two]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "settings.layout.tensor: 1 in A, 2 in B" in said
    assert "ranks: 1 in A, 2 in B" in said
    assert not [line for line in said if line.startswith(("phases", "command"))]
    slower = json.loads(reports["one"]["file"].read_text())
    for row in slower["phases"]:
        row["all_seconds"] = [10 * seconds for seconds in row["all_seconds"]]
    (tmp_path / "slower.json").write_text(json.dumps(slower))
    assert compare_bench.main([one, str(tmp_path / "slower.json")]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 5
    assert all(row.split()[3] == "10.00" and row.endswith(">") for row in rows)


def test_what_is_no_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert compare_bench.main([str(tmp_path / "x.json")] * 2) == 2
    assert "no report of a benchmark's phases" in capsys.readouterr().err


def test_models_that_are_not_there_are_named_with_what_to_do() -> None:
    done = bench("ppo", "--config", "examples/llama3_8b_ppo.yaml", "layout.data=1", "layout.tensor=1")
    assert done.returncode == 2
    assert "models/llama3-8b-sft" in done.stderr
    assert "actor.init=llama3-8b reward.init=llama3-8b" in done.stderr


def test_medians_and_rates_of_an_iteration() -> None:
    """Of three iterations: 100, 200 and 300 tokens drawn in 1 s of 2, 4 and 3 s are 50, 50 and 100 a second."""
    rows = [
        {
            "time/iteration_s": whole,
            "time/rollout_s": 1.0,
            "throughput/rollout_tokens_per_s": tokens,
            "throughput/rollout_flops_per_s": 1e12,
            "mfu/rollout": 0.25,
        }
        for whole, tokens in ((2.0, 100.0), (4.0, 200.0), (3.0, 300.0))
    ]
    iteration, rollout = phases(rows, 4)
    assert (iteration["seconds"], iteration["tokens_per_s"], iteration["tokens_per_s_per_gpu"]) == (3.0, 50.0, 12.5)
    assert (rollout["tokens_per_s"], rollout["tokens_per_s_per_gpu"], rollout["mfu"]) == (200.0, 50.0, 0.25)


@pytest.mark.parametrize(
    ("text", "least", "mean", "most"),
    [("fixed:7", 7, 7, 7), ("uniform:4:9", 4, 6.5, 9), ("lognormal:8:0.5", 1, 9.07, 64)],
)
def test_lengths_are_of_their_distribution(text: str, least: int, mean: float, most: int) -> None:
    """The mean of a log-normal is its median times exp(sigma^2 / 2)."""
    lengths = Lengths(text, 64).of((torch.arange(20_000) + 0.5) / 20_000)
    assert lengths.min() >= least
    assert lengths.max() <= most
    assert float(lengths.double().mean()) == pytest.approx(mean, rel=0.01)


@pytest.mark.parametrize("text", ["7", "fixed:7:8", "uniform:9:4", "uniform:4", "fixed:65", "fixed:0", "normal:3:4"])
def test_lengths_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="lengths"):
        Lengths(text, 64)


def test_anchors_are_of_models_of_that_size_and_say_whose_they_are() -> None:
    assert {each.parameters for each in anchors_of(8_030_261_248)} == {"8B"}
    assert not anchors_of(1_000_000)
    report = {"ranks": 1, "iterations": 1, "phases": [], "offload": [], "peak_bytes": 0, "convention": "causal"}
    about = {"planned_peak": {"phase": "score", "role": "actor", "bytes": 1}, "machine": {"device": "none"}}
    said = lines(report | about | {"published": [each._asdict() for each in anchors_of(70_553_706_496)]})
    assert all(line.startswith("published, not measured here: 70B") for line in said[-3:])
