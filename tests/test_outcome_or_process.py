"""examples/outcome_or_process.py: its commands are ones, and its tables are of what the files say."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from io import StringIO
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from megarlhf import cli
from megarlhf.commands.table import named_at, program
from megarlhf.config import load_config
from megarlhf.data.arithmetic import is_correct
from megarlhf.data.reasoning_gym import ReasoningGymConfig, task_rows
from tests.helpers.by_hand import load_by_hand

ROOT = Path(__file__).resolve().parents[1]
NAMED = ("| level 2 (taught) |", "| level 3 |", "| chain_sum |")
"""How rows of the tables begin."""
without_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning-gym: pip install megarlhf[tasks]"
)


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_by_hand("outcome_or_process")


def test_each_command_is_one_and_makes_what_it_is_known_by(example: Any) -> None:
    """In the order of what they read: nothing is named before a command has made it."""
    there = {"tokenizer", "demonstrations.jsonl", "arithmetic", "tiny-xs", "right", "taught"}
    there |= {
        f"{task}{end}" for task in example.TASKS for end in ("", "_heldout.jsonl", "_pooled.jsonl", "_steps.jsonl")
    }
    makes = ("run_dir", "output")
    for made, command in example.commands(1, 2):
        name, words = named_at(shlex.split(command))
        settings, _ = program(cli.commands()[name], None, words)
        load_config(settings, None, words)
        given = dict(word.split("=", 1) for word in words)
        read = [
            v for k, v in given.items() if k.split(".")[-1] in ("model", "init", "source", "gold", "by", "tokenizer")
        ]
        assert set(read) <= there, command
        there |= {given[key] for key in makes if key in given}
        if any(key in given for key in makes):
            assert made.removesuffix("/model") in given.values()


def test_demonstrations_are_judged_by_what_is_asked(example: Any) -> None:
    """A right one ends in the answer; of a wrong one some step is an error."""
    rng, right = Random(1), 0
    for _, problem in example.problems_of("level_3", "heldout", 60, 1):
        said = example.demonstrated(problem, rng)
        labels = example.judged_steps(problem, said)["labels"]
        assert labels == sorted(labels, reverse=True)  # after an error nothing is right
        assert (labels[-1] == 1) == is_correct(said, str(problem.answer)) or labels[-1] == 0
        right += said == problem.solution()
    assert 10 < right < 32  # 0.35 of 60, within 3 standard errors


@without_gym
def test_sums_of_the_package_have_its_answers(example: Any) -> None:
    config = ReasoningGymConfig(rows=80, seed=1, parameters=example.TERMS, instruction="")
    answers = {row["prompt"]: row["answer"] for row in task_rows("reasoning_gym:chain_sum", config, "heldout")}
    found = example.problems_of("chain_sum", "heldout", 40, 1)
    assert len(found) == 40
    for prompt, problem in found:
        assert answers[prompt] == str(problem.answer)
        assert is_correct(problem.solution(), answers[prompt])


def written(directory: Path, example: Any, found: float) -> Path:
    """The files of a seed whose numbers are all of `found`, accuracy but for one right response in four."""
    directory.mkdir()
    of = {"auc": {"mean": found}, "accuracy": {"mean": found}}
    for task in example.TASKS:
        for model in ("outcome", "process"):
            numbers = {"labelled": {"min": of, "last": of}, "steps": {"f1": {"mean": found}}}
            (directory / f"{task}_{model}.json").write_text(json.dumps(numbers))
        points = [{"way": way, "n": n, "mean": found} for way in example.WAYS for n in (1, 2, 4, 8, 16, 64)]
        (directory / f"{task}_best.json").write_text(json.dumps({"points": points}))
        for policy in example.POLICIES:
            rows = [{"decoding": "sampled", "correct": at == 0} for at in range(4)]
            rows += [{"decoding": "greedy", "correct": True}]
            (directory / f"{policy}_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def test_tables_have_means_and_intervals_over_seeds(example: Any, tmp_path: Path) -> None:
    """By hand: 0.5 and 0.7 are 0.6, and their interval t(0.975, 1) sqrt(0.02) / sqrt(2) = 12.706 * 0.1 either way."""
    found = {at: example.measured(written(tmp_path / str(at), example, value)) for at, value in ((3, 0.5), (5, 0.7))}
    assert set(found[3]["level_2"]["best of n"]["outcome"]) == set(example.SIZES)
    assert found[3]["level_3"]["accuracy"] == dict.fromkeys(example.POLICIES, 0.25)
    console = Console(width=200, file=StringIO())
    with console.capture() as said:
        for part in example.parts(found):
            console.print(example.table(part))
    cells = said.get()
    assert cells.count("60.0 ±127.1") == 3 * 2 * 3 + 3 * 5 * len(example.SIZES)
    assert cells.count("25.0 ±0.0") == 3 * 4
    assert cells.count("+0.0 [0.0, 0.0]") == 3 * 2


def test_the_documents_have_what_was_measured(example: Any) -> None:
    """Every row of the page, and those of them that README has; the sizes are those of the script."""
    measured = json.loads((ROOT / "benchmarks" / "outcome_or_process_cpu.json").read_text())
    rows = {f"| {' | '.join(row)} |" for part in example.parts(measured["seeds"]) for row in part.rows}
    page, readme = (
        {line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line.startswith(tuple(NAMED))}
        for name in ("docs/process_rewards.md", "README.md")
    )
    assert page == rows
    assert readme
    assert readme <= rows


@without_gym
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_chain_runs_and_goes_on(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With few rows; what is there is not made again."""
    small = {
        "DEMONSTRATIONS": dict.fromkeys(example.TASKS, 640),
        "TAUGHT": 64,
        "HELDOUT": 16,
        "POOLED": 16,
        "SAMPLES": 64,
    }
    for name, value in {
        **small,
        "PPO": example.PPO.replace(
            "iterations=20 rollout_batch=256 global_batch=128", "iterations=3 rollout_batch=64 global_batch=64"
        ),
    }.items():
        monkeypatch.setattr(example, name, value)
    results = tmp_path / "results.json"
    monkeypatch.setattr(
        sys, "argv", ["x", "--seeds", "1", "--ranks", "1", "--directory", str(tmp_path), "--json", str(results)]
    )
    assert example.main() == 0
    assert "chain_sum" in capsys.readouterr().out
    (found,) = json.loads(results.read_text())["seeds"].values()
    assert found["level_2"]["best of n"]["pass@n"]["64"] >= found["level_2"]["best of n"]["pass@n"]["1"]
    assert example.main() == 0
    assert "megarlhf" not in capsys.readouterr().out
