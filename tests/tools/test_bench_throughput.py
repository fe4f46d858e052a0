"""tools/bench_throughput.py: a run file's own iterations, the same work in every layout, and reports that compare."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.errors import ConfigError
from megarlhf.models.spec import PRESETS
from megarlhf.trainers.find import trainer_named
from tests.helpers.ranks import run_ranks
from tools import compare_bench
from tools.bench_throughput import lines, main
from tools.throughput_bench.lengths import Lengths
from tools.throughput_bench.measure import phases
from tools.throughput_bench.published import anchors_of
from tools.throughput_bench.rows import DEMONSTRATION, PAIR, STEPPED, Form, MadeUp
from tools.throughput_bench.workload import measured_settings

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = ("--iterations", "2", "--warmup", "1", "--prompts", "uniform:4:10", "--responses", "uniform:4:12")
PPO = (
    *("ppo", "--config", "examples/ppo_tiny.yaml", "actor.init=tiny-xs", "reward.init=tiny-xs", "rollout_batch=8"),
    *("global_batch=4", "micro_batch=4", "prompts.max_tokens=12", "sampling.max_new_tokens=12", *LENGTHS),
)
RUNS = {
    "ppo": PPO,
    "sft": ("sft", "model=tiny-xs", "data.max_tokens=20", "global_batch=4", "micro_batch=2", *LENGTHS),
    "dpo": ("dpo", "model=tiny-xs", "pairs.max_tokens=20", "global_batch=4", "micro_batch=2", *LENGTHS),
    "reward": (
        *("reward", "model=tiny-xs", "pairs.max_tokens=20", "labelled.max_tokens=16", "pairs_batch=2"),
        *("labelled_batch=4", "micro_batch=2", *LENGTHS),
    ),
    "process_reward": (
        *("process_reward", "model=tiny-xs", "steps.max_tokens=20", "steps_batch=4", "micro_batch=2", *LENGTHS),
    ),
}


def bench(words: Sequence[str], path: Path) -> str:
    """On this rank; what it prints."""
    said = io.StringIO()
    os.chdir(ROOT)
    with redirect_stdout(said), redirect_stderr(io.StringIO()):
        assert main([*words, "--json", str(path)]) == 0
    return said.getvalue()


class Reports:
    """Made once each, when one is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, dict[str, dict[str, Any]]()

    def of(self, run: str, layout: str = "layout.tensor=1", ranks: int = 1) -> dict[str, Any]:
        name = f"{run}_{layout}"
        if name not in self.made:
            file = self.folder / f"{name}.json"
            said = run_ranks(bench, ranks, (*RUNS[run], layout), file)[0]
            self.made[name] = json.loads(file.read_text()) | {"said": said, "file": file}
        return self.made[name]

    def of_two(self) -> dict[str, Any]:
        """PPO's on two tensor ranks."""
        return self.of("ppo", "layout.tensor=2", 2)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return Reports(tmp_path_factory.mktemp("reports"))


def test_every_phase_is_reported_with_its_rates(reports: Reports) -> None:
    for report, ranks in ((reports.of("ppo"), 1), (reports.of_two(), 2)):
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


def test_the_plan_stands_beside_the_peak(reports: Reports) -> None:
    """0.2 M parameters in fp32 are learnt with 16 bytes each; half of that on each of two tensor ranks."""
    both = reports.of("ppo"), reports.of_two()
    one, two = (report["planned_peak"] for report in both)
    assert (one["phase"], one["role"]) == ("optimise", "actor")
    kept = 16 * PRESETS["tiny-xs"].parameters
    assert kept < one["bytes"] < both[0]["peak_bytes"]  # a process has torch besides
    assert kept / 2 < two["bytes"] < one["bytes"]
    for plan, report in zip((one, two), both, strict=True):
        assert f"GiB in {plan['phase']} {plan['role']}\n" in report["said"]


def test_the_work_is_the_same_in_every_layout(reports: Reports) -> None:
    """8 responses of 4 to 12 tokens an iteration, whoever draws them."""
    both = reports.of("ppo"), reports.of_two()
    one, two = ({row["phase"]: row.get("tokens") for row in report["phases"]} for report in both)
    assert one == two
    assert all(8 * 4 < tokens < 8 * 12 for tokens in one["rollout"])
    assert one["rollout"][0] != one["rollout"][1]


def test_a_learner_moves_weights_gradients_and_state(reports: Reports) -> None:
    """tiny-xs has 0.2 M parameters in fp32: weights, gradients and two moments of a learner, weights of the others."""
    moved = {each["role"]: each["bytes"] for each in reports.of("ppo")["offload"]}
    assert moved["actor"] == pytest.approx(4 * moved["reference"], rel=0.01)
    assert moved["critic"] == pytest.approx(4 * moved["reward"], rel=0.01)


@pytest.mark.parametrize(
    ("run", "sequences", "phases", "role"),
    [
        ("sft", 4, {"train"}, "model"),
        ("dpo", 2 * 4, {"train", "score"}, "policy"),
        ("reward", 2 * 2 + 4, {"train"}, "reward"),
        ("process_reward", 4, {"train"}, "reward"),
    ],
)
def test_a_step_without_rollouts_is_an_iteration(
    reports: Reports, run: str, sequences: int, phases: set[str], role: str
) -> None:
    """Sequences of 4 to 10 tokens with responses of 4 to 12, EOS among them, and no longer than a row may be."""
    report = reports.of(run)
    rows = {row["phase"]: row for row in report["phases"]}
    assert set(rows) == {"iteration", *phases}
    assert all(row["seconds"] == pytest.approx(sum(row["all_seconds"]) / 2) for row in rows.values())
    for name in phases:
        assert all(sequences * 8 <= tokens <= sequences * 20 for tokens in rows[name]["tokens"])
        assert rows[name]["flops_per_s"] > 0
    assert len(set(rows["train"]["tokens"])) == 2  # other rows in each
    whole = [
        tokens / seconds
        for tokens, seconds in zip(rows["train"]["tokens"], rows["iteration"]["all_seconds"], strict=True)
    ]
    assert rows["iteration"]["tokens_per_s"] == pytest.approx(sum(whole) / 2, rel=0.01)
    plan = report["planned_peak"]
    assert plan["role"] == role
    assert 16 * PRESETS["tiny-xs"].parameters < plan["bytes"] < report["peak_bytes"]
    # One model stays where it is; of two one waits while the other works.
    assert [each["role"] for each in report["offload"]] == (["policy", "reference"] if run == "dpo" else [])


def test_two_reports_are_compared_and_what_differs_is_said(
    reports: Reports, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, one, two = reports.of("ppo"), str(reports.of("ppo")["file"]), str(reports.of_two()["file"])
    assert compare_bench.main([one, two]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "settings.layout.tensor: 1 in A, 2 in B" in said
    assert "ranks: 1 in A, 2 in B" in said
    assert not [line for line in said if line.startswith(("phases", "command"))]
    slower = json.loads(report["file"].read_text())
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


@pytest.mark.parametrize(
    ("words", "found", "remedy"),
    [
        (
            ("ppo", "--config", str(ROOT / "examples/llama3_8b_ppo.yaml"), "layout.data=1", "layout.tensor=1"),
            "models/llama3-8b-sft",
            "actor.init=llama3-8b reward.init=llama3-8b.\n",
        ),
        (("dpo", "model=tiny-xs", "reference=nowhere"), "nowhere", "model=llama3-8b reference=llama3-8b.\n"),
        (("reward", "model=tiny-xs"), "without data", "set pairs={} or labelled={}, whose rows are then made up.\n"),
        (("sft", "model=tiny-xs", "--responses", "fixed:1024"), "go beyond the 1023 tokens", "lower them.\n"),
        (
            (*PPO[:-1], "fixed:13"),
            "beyond the",
            "lower them.\n",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_with_what_to_do(
    words: tuple[str, ...], found: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert found in said
    assert said.endswith(remedy)


@pytest.mark.parametrize("file", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_run_file_can_be_measured(file: Path, tmp_path: Path) -> None:
    """Its rows are made up whatever they come from, a mix among them, and nothing is saved or measured besides."""
    trainer = trainer_named(file.read_text().split()[2])
    _, kind = measured_settings(trainer, file, [], tmp_path, 3)
    more = [f"{name}.mix.part.source=x" for name in kind.sets]
    cfg, kind = measured_settings(trainer, file, [*more, "keep_best=x", "save_every=6", "keep_every=6"], tmp_path, 3)
    cfg.check_run_dir()
    given = cfg.model_dump()
    assert {given[name]["source"] for name in kind.sets} == {f"{tmp_path}/{name}.jsonl" for name in kind.sets}
    assert not any(given[name]["mix"] for name in kind.sets)
    assert not any(given.get(name) for name in ("heldout", "heldout_pairs", "heldout_steps", "keep_best", "save_every"))


def made_up(form: Form, rows: int, most: int, responses: str, folder: Path) -> list[dict[str, Any]]:
    words = ["<eos>", "<pad>", "w2", "w3", "w4"]
    MadeUp(form, rows, most).write(folder / "rows.jsonl", words, rows, "uniform:1:3", responses)
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_rows_are_as_long_as_told_and_no_longer_than_they_may_be(tmp_path: Path) -> None:
    """Tokens are words and the EOS of a response; one of a single word has a word more than none."""
    whole = made_up(DEMONSTRATION, 50, 9, "fixed:8", tmp_path)
    assert {len(row["prompt"].split()) + len(row["response"].split()) + 1 for row in whole} == {9}
    assert {len(row["prompt"].split()) for row in whole} == {1, 2, 3}
    short = made_up(DEMONSTRATION, 50, 9, "uniform:2:4", tmp_path)
    assert {len(row["response"].split()) + 1 for row in short} == {2, 3, 4}


def test_the_sides_of_a_pair_differ(tmp_path: Path) -> None:
    """Of three words every third pair of responses of one word would be alike."""
    pairs = made_up(PAIR, 60, 9, "fixed:2", tmp_path)
    assert all(row["chosen"] != row["rejected"] for row in pairs)
    assert {row["chosen"] for row in pairs} == {"w2", "w3", "w4"}


def test_steps_are_the_words_of_a_response_and_one_label_each(tmp_path: Path) -> None:
    """19 words are 8 steps of 2 or 3; of every second response the last step is right."""
    rows = made_up(STEPPED, 4, 23, "fixed:20", tmp_path)
    for number, row in enumerate(rows):
        sizes = [len(step.split()) for step in row["steps"]]
        assert sum(sizes) == 19
        assert set(sizes) == {2, 3}
        assert row["labels"] == [1] * 7 + [number % 2]
    assert [len(row["steps"]) for row in made_up(STEPPED, 4, 23, "fixed:4", tmp_path)] == [3] * 4


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
