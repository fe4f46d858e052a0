"""The demo in miniature, through the command line on two ranks: what it leaves, and how it goes on after a stop."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megarlhf import cli

pytestmark = pytest.mark.slow

SMALL = (
    *("model=tiny-xs", "demonstrations=2048", "sft_epochs=1", "judged=1280", "iterations=3", "rollouts=32"),
    *("problems=64", "samples=2"),
)


def demo(run_dir: Path, *settings: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    output = run_dir.parent / "output.txt"
    with output.open("w") as file:  # a pipe would be held open by the writer processes of checkpoints
        command = [sys.executable, "-m", "megarlhf.cli", "demo", f"run_dir={run_dir}", *settings]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=timeout_s, check=False)
    return subprocess.CompletedProcess(command, done.returncode, output.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("demo") / "run"
    done = demo(run_dir, *SMALL)
    assert done.returncode == 0, done.stdout
    return run_dir, done.stdout


def test_summary_has_the_promised_numbers(finished: tuple[Path, str]):
    summary = json.loads((finished[0] / "summary.json").read_text())
    low, high = summary["gain_ci95"]
    assert low <= summary["gain"] <= high
    assert summary["gain"] == pytest.approx(summary["ppo_accuracy"] - summary["sft_accuracy"])
    assert summary["problems"] == 64
    assert summary["seed"] == 1
    stages = [json.loads((finished[0] / stage / "seconds.json").read_text()) for stage in ("sft", "reward", "ppo")]
    assert summary["wall_s"] > sum(stages)


def test_table_says_what_the_summary_says(finished: tuple[Path, str]):
    summary = json.loads((finished[0] / "summary.json").read_text())
    row = next(line for line in finished[1].splitlines() if "accuracy, sampled" in line)
    before, after, difference = re.findall(r"([+-]?\d\.\d{3}) \[", row)
    assert float(before) == pytest.approx(summary["sft_accuracy"], abs=5e-4)
    assert float(after) == pytest.approx(summary["ppo_accuracy"], abs=5e-4)
    assert float(difference) == pytest.approx(summary["gain"], abs=5e-4)


def test_report_needs_nothing_but_itself(finished: tuple[Path, str]):
    page = (finished[0] / "report.html").read_text()
    assert page.count("<svg") >= 6
    assert "How many" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_the_report_is_made_again_from_the_demos_directory(finished: tuple[Path, str]):
    before = (finished[0] / "report.html").read_bytes()
    (finished[0] / "report.html").unlink()
    assert cli.main(["report", f"run_dir={finished[0]}"]) == 0
    assert (finished[0] / "report.html").read_bytes() == before


def test_metrics_of_ppo_keep_their_promises(finished: tuple[Path, str]):
    rows = [json.loads(line) for line in (finished[0] / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    # Iteration 3 is the actor's first: the others only warm the critic up.
    assert rows[0]["kl/reference_mean"] == rows[1]["kl/reference_mean"] == 0.0
    assert rows[2]["policy/first_ratio_gap"] < 1e-5
    assert rows[2]["policy/first_clip_fraction"] == 0.0
    assert max(row["rollout/sampler_gap_max"] for row in rows) < 1e-5
    assert {row["rollout/verified"] for row in rows} == {32}
    assert not any(row["warning/over_optimised"] or row["warning/kl_over_bound"] for row in rows)


def test_the_whole_demo_helps_and_warns_of_nothing(tmp_path: Path):
    done = demo(tmp_path / "run", timeout_s=3000)
    assert done.returncode == 0, done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["gain_ci95"][0] > 0.3  # README: at least 42 points for each of three seeds
    assert summary["ppo_accuracy_greedy"] > summary["sft_accuracy_greedy"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert not any(row["warning/over_optimised"] or row["warning/kl_over_bound"] for row in rows)
    assert "warning, iteration" not in done.stdout


def test_a_second_call_runs_no_finished_stage_again(finished: tuple[Path, str]):
    before = {path: path.stat().st_mtime_ns for path in finished[0].glob("*/metrics.jsonl")}
    done = demo(finished[0], *SMALL)
    assert done.returncode == 0, done.stdout
    assert {path: path.stat().st_mtime_ns for path in finished[0].glob("*/metrics.jsonl")} == before


def test_a_stage_that_was_stopped_goes_on_from_its_state(finished: tuple[Path, str], tmp_path: Path):
    """As its last words say. What it took before counts."""
    run_dir, log = tmp_path / "run", tmp_path / "run" / "sft" / "metrics.jsonl"
    command = [sys.executable, "-m", "megarlhf.cli", "demo", f"run_dir={run_dir}", *SMALL]
    with (tmp_path / "first.txt").open("w") as said:
        first = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        while not (log.exists() and log.read_text().count("\n") > 2):
            assert first.poll() is None, (tmp_path / "first.txt").read_text()
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        assert first.wait(200) == 75
    assert "and the same command goes on from there" in (tmp_path / "first.txt").read_text()
    before = json.loads((run_dir / "sft" / "seconds.json").read_text())
    done = demo(run_dir, *SMALL)
    assert done.returncode == 0, done.stdout
    assert f"{run_dir}/sft: goes on after step " in done.stdout
    assert json.loads((run_dir / "sft" / "seconds.json").read_text()) > before > 0
    logs = (where / "sft" / "metrics.jsonl" for where in (run_dir, finished[0]))
    steps = [[json.loads(line)["step"] for line in log.read_text().splitlines()] for log in logs]
    assert steps[0] == steps[1]


def test_other_settings_do_not_mix_with_finished_stages(finished: tuple[Path, str]):
    done = demo(finished[0], *SMALL, "seed=2")
    assert done.returncode == 2
    assert f"{finished[0]}/sft was made with other settings" in done.stdout
