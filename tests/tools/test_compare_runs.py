"""tools/compare_runs.py on runs that RunWriter wrote: what differs, where first, by how much; and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megarlhf.observe.provenance import write_provenance
from megarlhf.observe.writers import RunWriter
from megarlhf.trainers.sft import SftConfig
from tests.helpers.refusal import assert_matches
from tools.compare_runs import main, ranges

NAN = float("nan")
BASE: dict[int, dict[str, float]] = {
    1: {"policy/loss": 0.5, "kl/reference_mean": 0.0, "time/rollout_s": 1.0},
    2: {"policy/loss": 0.25, "kl/reference_mean": 4.0, "time/rollout_s": 1.0},
    3: {"policy/loss": NAN, "kl/reference_mean": 2.0, "time/rollout_s": 1.0},
}


def run(run_dir: Path, steps: dict[int, dict[str, float]], **settings: Any) -> str:
    with RunWriter(run_dir) as writer:
        for step, metrics in steps.items():
            writer.log(metrics, step)
    given = {"run_dir": "runs/x", "model": "tiny-xs", "tokenizer": "arithmetic", **settings}
    write_provenance(run_dir, SftConfig.model_validate(given), ["sft"])
    return str(run_dir)


def changed(step: int, **values: float) -> dict[int, dict[str, float]]:
    """BASE with other values of the metrics `loss` and `kl` and of the clock at one step."""
    names = {"loss": "policy/loss", "kl": "kl/reference_mean", "time": "time/rollout_s"}
    return {**BASE, step: {**BASE[step], **{names[name]: value for name, value in values.items()}}}


@pytest.fixture
def base(tmp_path: Path) -> str:
    return run(tmp_path / "a", BASE)


def test_equal_runs_differ_in_time_alone(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run(tmp_path / "b", changed(2, time=9.0))
    assert main([base, other]) == 0
    assert capsys.readouterr().out == "all metrics are equal at the 3 steps of both runs\n"
    assert main([base, other, "--all", "--json", str(tmp_path / "out.json")]) == 1
    assert "first difference: step 2, time/rollout_s: A 1.0, B 9.0; absolute 8, relative 0.889" in (
        capsys.readouterr().out
    )
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["metrics"].keys() == {"time/rollout_s"}


def test_first_and_largest_difference_of_every_metric(
    base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = {1: {**BASE[1], "policy/loss": 0.75}, 2: {**BASE[2], "kl/reference_mean": 5.0, "policy/loss": 1.25}}
    other = run(tmp_path / "b", {**steps, 3: {**BASE[3], "kl/reference_mean": -2.0}}, epochs=2.0)
    assert main([base, other, "--json", str(tmp_path / "out.json")]) == 1
    said = capsys.readouterr().out
    assert said.startswith("first difference: step 1, policy/loss: A 0.5, B 0.75; absolute 0.25, relative 0.333\n")
    rows = [line.replace("│", " ").split() for line in said.splitlines()]
    # steps, first, A, B, absolute, relative; the largest absolute, its step, and the largest relative.
    assert ["policy/loss", "2", "1", "0.5", "0.75", "0.25", "0.333", "1", "2", "0.8"] in rows
    assert ["kl/reference_mean", "2", "2", "4.0", "5.0", "1", "0.2", "4", "3", "2"] in rows
    assert "setting epochs: A 1.0, B 2.0\n" in said
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["equal"], report["steps_in_both"]) == (False, 3)
    expected = {"step": 1, "metric": "policy/loss", "a": 0.5, "b": 0.75, "absolute": 0.25, "relative": 1 / 3}
    assert report["first"] == pytest.approx(expected)
    assert report["metrics"]["kl/reference_mean"]["max_absolute"]["absolute"] == 4.0
    assert report["metrics"]["kl/reference_mean"]["max_relative"]["step"] == 3
    assert report["settings"] == {"epochs": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("tolerance", "code"),
    [
        ([], 1),
        (["--rtol", "0.19"], 1),
        (["--rtol", "0.21"], 0),  # |4 - 5| / 5 = 0.2
        (["--atol", "0.9"], 1),
        (["--atol", "1"], 0),
    ],
)
def test_tolerances(tolerance: list[str], code: int, base: str, tmp_path: Path) -> None:
    assert main([base, run(tmp_path / "b", changed(2, kl=5.0)), *tolerance]) == code


def test_the_last_bit_counts(base: str, tmp_path: Path) -> None:
    assert main([base, run(tmp_path / "b", changed(2, loss=0.25 + 2**-54))]) == 1


def test_null_equals_null_alone(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run(tmp_path / "b", changed(3, loss=1.0))
    assert main([base, other, "--rtol", "0.9", "--atol", "1e9", "--json", str(tmp_path / "out.json")]) == 1
    said = "first difference: step 3, policy/loss: A null, B 1.0; absolute -, relative -"
    assert said in capsys.readouterr().out
    first = json.loads((tmp_path / "out.json").read_text())["first"]
    assert first == {"step": 3, "metric": "policy/loss", "a": None, "b": 1.0, "absolute": None, "relative": None}


def test_a_metric_that_one_run_lacks(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run(tmp_path / "b", {**BASE, 2: {"policy/loss": 0.25}})
    assert main([base, other]) == 1
    assert "first difference: step 2, kl/reference_mean: A 4.0, B absent; " in capsys.readouterr().out
    # Not logged is not null either.
    other = run(tmp_path / "c", {**BASE, 3: {"kl/reference_mean": 2.0}})
    assert main([other, base]) == 1
    assert "first difference: step 3, policy/loss: A absent, B null; " in capsys.readouterr().out


def test_steps_of_one_run_alone(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = dict.fromkeys((5, 6, 9), BASE[1])
    assert main([base, run(tmp_path / "b", {1: BASE[1], 3: BASE[3], **later})]) == 1
    said = capsys.readouterr().out
    assert said == (
        "all metrics are equal at the 2 steps of both runs\nsteps only in A: 2 (1)\nsteps only in B: 5-6, 9 (3)\n"
    )
    assert main([base, run(tmp_path / "c", {**BASE, 4: BASE[1]})]) == 1
    assert main([str(tmp_path / "c"), base]) == 1
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"


def test_resumed_and_cut_files_count_as_they_were_logged_last(base: str, tmp_path: Path) -> None:
    other = run(tmp_path / "b", {1: BASE[1], 2: {**BASE[2], "policy/loss": 7.0}})
    with RunWriter(tmp_path / "b") as writer:
        for step in (2, 3):
            writer.log(BASE[step], step)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "policy/lo')
    assert main([base, other]) == 0


def test_a_run_without_settings_is_compared(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run(tmp_path / "b", BASE, epochs=3.0)
    (tmp_path / "b" / "config.yaml").unlink()
    assert main([base, other]) == 0
    assert f"no config.yaml in {other}: settings were not compared" in capsys.readouterr().out


def test_bad_input_is_named(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main([base, *arguments]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err

    assert_matches(refused(str(tmp_path / "no")), "run directory does not exist: .*no; check the path.")
    bare = tmp_path / "bare"
    bare.mkdir()
    assert_matches(refused(str(bare)), "run directory .*bare: metrics.jsonl is missing; name the run_dir of a run.")
    (bare / "metrics.jsonl").touch()
    assert_matches(refused(str(bare)), "bare/metrics.jsonl: no step was logged; let the run take one.")
    for line in ("{", "[1]", '{"policy/loss": 1.0}', '{"step": 1, "policy/loss": "low"}'):
        (bare / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
        assert_matches(refused(str(bare)), "bare/metrics.jsonl, line 2: not metrics of a step (.*); restore the file.")
    (bare / "metrics.jsonl").write_text('{"step": 1}\n')
    (bare / "config.yaml").write_text("a: [\n")
    assert_matches(refused(str(bare)), "bare/config.yaml: not settings (.*); restore the file.")
    assert_matches(
        refused(base, "--json", str(tmp_path / "no" / "x.json")), "--json=.*: there is no directory .*; make"
    )
    for tolerance in ("-1", "nan", "inf", "much"):
        with pytest.raises(SystemExit, match="2"):
            main([base, base, "--rtol", tolerance])
