"""Glossary, clock, writers and progress: what is logged is defined, adds up, and survives a kill."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from megarlhf.config import Config, load_config
from megarlhf.errors import CheckpointError, ConfigError
from megarlhf.observe.clock import Clock, peak_flops
from megarlhf.observe.metrics import GLOSSARY, UnknownMetricError, check
from megarlhf.observe.progress import Progress
from megarlhf.observe.provenance import write_provenance
from megarlhf.observe.work import Work
from megarlhf.observe.writers import RunWriter, check_trackers, read_metrics

CPU = torch.device("cpu")


class FakeTime:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def wait(self, seconds: float) -> None:
        self.seconds += seconds


def test_every_metric_is_named_and_defined() -> None:
    for name, metric in GLOSSARY.items():
        assert re.fullmatch(r"[a-z][a-z0-9]*/[a-z0-9_]+", name)
        assert all(metric), f"{name}: unit, formula and reduction are all needed"
        assert not name.endswith("_s") or metric.unit.endswith("s"), name


def test_unlisted_names_raise_with_the_nearest() -> None:
    check({"policy/loss": 1.0})
    with pytest.raises(KeyError, match=r"^metric policy/los: .*did you mean policy/loss\?$"):
        check({"policy/los": 1.0})
    with pytest.raises(UnknownMetricError, match="GLOSSARY"):
        check(["qqq"])


def test_clock_books_nested_phases_once_and_resets() -> None:
    now, work = FakeTime(), Work(ranks=2)
    clock = Clock(CPU, work=work, now=now)
    with clock("optimise"):
        now.wait(1.0)
        with clock("score"):
            now.wait(2.0)
            work.spend(tokens=300, flops=100)
        now.wait(4.0)
        work.spend(tokens=10, flops=7)
    now.wait(8.0)
    work.spend(tokens=1000, flops=1000)  # a check between two phases
    with clock("score"):
        now.wait(16.0)
        work.spend(tokens=60, flops=80)
    metrics = clock.metrics()
    assert (metrics["time/optimise_s"], metrics["time/score_s"], metrics["time/iteration_s"]) == (5.0, 18.0, 31.0)
    assert metrics["throughput/score_tokens_per_s"] == 20.0
    assert metrics["throughput/score_flops_per_s"] == 5.0
    assert (metrics["compute/score_flops"], metrics["compute/optimise_flops"], metrics["compute/flops"]) == (
        180,
        7,
        187,
    )
    check(metrics)
    now.wait(3.0)
    nothing = clock.metrics()
    assert nothing.keys() - metrics.keys() == set()
    assert not any(name.startswith("throughput/") for name in nothing)
    assert nothing["compute/flops"] == 187
    with pytest.raises(CheckpointError, match=r"work has 'dreaming', 'estimate'; .*resume from another state"):
        Work().load_state({"score": 1, "dreaming": 2, "estimate": 3})
    # A run that goes on counts on.
    resumed = Work()
    resumed.load_state(json.loads(json.dumps(work.state())))
    clock = Clock(CPU, work=resumed, now=now)
    with clock("score"):
        now.wait(1.0)
        resumed.spend(tokens=1, flops=13)
    metrics = clock.metrics()
    assert (metrics["compute/flops"], metrics["throughput/score_flops_per_s"]) == (200, 13)


def test_clock_books_a_phase_that_raises_and_refuses_unknown_ones() -> None:
    now = FakeTime()
    clock = Clock(CPU, now=now)
    with suppress(KeyboardInterrupt), clock("rollout"):
        now.wait(2.0)
        raise KeyboardInterrupt
    now.wait(5.0)
    assert clock.metrics()["time/rollout_s"] == 2.0
    with pytest.raises(ValueError, match="dreaming"), clock("dreaming"):
        pass


def test_cpu_has_no_known_peak_so_no_mfu_and_memory_is_resident_bytes() -> None:
    work = Work()
    clock = Clock(CPU, work=work)
    with clock("score"):
        work.spend(tokens=1, flops=10**9)
    metrics = clock.metrics()
    assert peak_flops(CPU) == 0.0
    assert not any(name.startswith("mfu/") for name in metrics)
    # Importing torch alone takes more than 50 MB, and no test machine has a TiB.
    assert 5e7 < metrics["memory/peak_bytes"] < 2**40


@pytest.mark.gpu
def test_gpu_clock_waits_for_the_device_and_sees_its_peak() -> None:
    device = torch.device("cuda")
    work = Work()
    clock = Clock(device, work=work)
    with clock("score"):
        a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
        for _ in range(50):
            b = a @ a
        work.spend(tokens=1, flops=50 * 2 * 8192**3)
    metrics = clock.metrics()
    assert metrics["memory/peak_bytes"] >= 2 * a.nbytes
    assert b.shape == a.shape
    # A clock that did not wait would see microseconds of launches and report more than the hardware can do.
    assert metrics["throughput/score_flops_per_s"] < 2.5e15


def test_metrics_are_one_json_object_a_line_step_first(tmp_path: Path) -> None:
    with RunWriter(tmp_path / "run") as writer:
        writer.log({"policy/loss": 0.5, "policy/grad_norm": math.inf}, step=3)
        # Before closing: a killed run keeps what it logged.
        line = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert line == '{"step": 3, "policy/loss": 0.5, "policy/grad_norm": null}\n'


def test_unlisted_metrics_are_not_written(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer, pytest.raises(UnknownMetricError):
        writer.log({"policy/lss": 0.5}, step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_reading_back_a_resumed_and_torn_file(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer:
        writer.log({"policy/loss": 1.0}, step=1)
        writer.log({"policy/loss": 2.0}, step=2)
    with RunWriter(tmp_path) as writer:
        writer.log({"policy/loss": 4.0, "value/loss": math.nan}, step=2)
        writer.log({"rollout/accuracy": 0.5}, step=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "policy/l')
    assert read_metrics(tmp_path).rows == [
        {"step": 1, "policy/loss": 1.0},
        {"step": 2, "policy/loss": 4.0, "rollout/accuracy": 0.5},
    ]
    assert read_metrics(tmp_path).unread == 0
    assert read_metrics(tmp_path / "absent") == ([], 0)


def test_samples_keep_their_text(tmp_path: Path) -> None:
    with RunWriter(tmp_path) as writer:
        writer.samples([{"prompt": "2 × 3?\n", "score": 0.5}, {"prompt": "b"}], step=7)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [{"step": 7, "prompt": "2 × 3?\n", "score": 0.5}, {"step": 7, "prompt": "b"}]


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunWriter(tmp_path, tensorboard=True) as writer:
        writer.log({"policy/loss": 0.25}, step=5)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("policy/loss")] == [(5, 0.25)]


def test_tensorboard_of_a_run_that_goes_on_has_no_step_twice(tmp_path: Path) -> None:
    """Steps 3 and 4 were logged, not saved, and are taken again: their first numbers must not come back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, loss in (((1, 2, 3, 4), 1.0), ((3, 4, 5), 0.5)):
        with RunWriter(tmp_path, tensorboard=True) as writer:
            for step in steps:
                writer.log({"policy/loss": loss}, step=step)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("policy/loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5), (5, 0.5)]


def test_wandb_without_its_key_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text("")
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match=r"^wandb=true: no key; set WANDB_API_KEY"):
        check_trackers(tensorboard=False, wandb=True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(tensorboard=True, wandb=True)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (None, "the package wandb is missing"),
        ("import a_package_that_is_not_there.inner", "the package a_package_that_is_not_there, which wandb needs, is"),
        ("raise ImportError('too old')", r"the package wandb cannot be imported \(too old\)"),
    ],
)
def test_a_tracker_that_cannot_be_imported_is_named_with_what_it_lacks(
    body: str | None, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # Python's mark of a module that is not there
    if body is not None:
        (tmp_path / "wandb.py").write_text(body)
        monkeypatch.delitem(sys.modules, "wandb")
        monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ConfigError, match=rf"^wandb=true: {problem}.*; pip install -e '\.\[wandb\]' in the checkout, or "
    ):
        check_trackers(tensorboard=True, wandb=True)


class Small(Config):
    lr: float = 1e-5
    """Learning rate."""


def test_provenance_says_how_to_run_it_again(tmp_path: Path) -> None:
    write_provenance(tmp_path, Small(lr=3e-6), ["ppo", "--config", "my file.yaml", "lr=3e-6"])
    assert load_config(Small, tmp_path / "config.yaml", []) == Small(lr=3e-6)
    assert (tmp_path / "command.txt").read_text() == "megarlhf ppo --config 'my file.yaml' lr=3e-6\n"
    found = json.loads((tmp_path / "versions.json").read_text())
    assert found["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{40}\+?|not a git checkout|unknown .*", found["commit"])


def test_without_a_terminal_a_line_every_ten_seconds_with_time_left() -> None:
    now, out = FakeTime(), io.StringIO()
    with Progress(4, "PPO", stream=out, now=now) as bar:
        for score in range(4):
            now.wait(9.0)
            bar.advance(note=f"score {score}")
    # 9 s: too early; 18 s: half done, so 18 s are left; 27 s: only 9 s later; 36 s: the end, said once.
    assert out.getvalue().splitlines() == [
        "PPO: 2/4 in 0:18, about 0:18 left, score 1",
        "PPO: 4/4 in 0:36, score 3",
    ]


def test_quick_work_and_other_ranks_say_nothing() -> None:
    out = io.StringIO()
    now = FakeTime()
    with Progress(3, "quick", stream=out, now=now) as bar:
        bar.advance()
    with Progress(1, "rank 1", enabled=False, stream=out, now=now) as bar:
        now.wait(100.0)
        bar.advance()
    assert out.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_with_its_note() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress(2, "PPO", stream=out) as bar:
        bar.advance(2, note="score 0.81")
    assert "2/2" in out.getvalue()
    assert "score 0.81" in out.getvalue()
