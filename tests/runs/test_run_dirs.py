"""What lies in a run's directory: its past is whole, or the start is refused by name; never a silent start at 0."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megarlhf.checkpoint.model_directory import Card, save_model
from megarlhf.checkpoint.training_state import Position, latest_state, read_position
from megarlhf.config import load_config
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import CheckpointError, ConfigError, MegarlhfError, RunFinished, TrainingError
from megarlhf.models.readings import LabelLogprobs
from megarlhf.observe.lock import held
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runs.opening import sole_run
from megarlhf.runs.run_logs import check_logs, cut_logs, lengths, sums
from megarlhf.trainers.sft import SftConfig
from tests.helpers.models import frozen, language_model
from tests.helpers.ranks import run_ranks

LINES = "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3))


def state(directory: Path, step: int, /, **changes: object) -> Path:
    """A state without weights."""
    where = directory / f"step_{step:08d}"
    where.mkdir(parents=True)
    position = Position(step=step, parts={}, skipped_steps=0, bytes_written={"metrics.jsonl": 0}).model_dump()
    (where / "state.json").write_text(json.dumps({**position, **changes}))
    return where


def run(tmp_path: Path, **settings: object) -> SftConfig:
    """A run that has saved two states and a line after them."""
    values = [f"run_dir={tmp_path / 'run'}", "tensorboard=false", *(f"{k}={v}" for k, v in settings.items())]
    cfg = load_config(SftConfig, None, values)
    if not cfg.run_dir.exists():
        for step in (2, 3):
            state(cfg.states_dir, step, bytes_written={"metrics.jsonl": len(LINES)})
        (cfg.states_dir / "latest").write_text("step_00000003\n")
        (cfg.run_dir / "metrics.jsonl").write_text(LINES + '{"step": 4}\n')
        (cfg.run_dir / "config.yaml").write_text(cfg.to_yaml())
    return cfg


def test_without_its_pointer_the_newest_whole_state_is_taken(tmp_path: Path) -> None:
    """Killed after the first state and before `latest`, or `latest` lost: the same thing on the disk."""
    assert latest_state(tmp_path) is None
    state(tmp_path, 2)
    (tmp_path / "step_00000009").mkdir()  # no state.json in it
    (tmp_path / "step_00000009.partial").symlink_to(state(tmp_path, 4))
    assert latest_state(tmp_path) == tmp_path / "step_00000004"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "latest cannot be read (UnicodeDecodeError); write there which to go on from: step_00000002"),
        (b"", "latest names '', which is no state; write there which to go on from: step_00000002"),
        (b"../elsewhere/step_00000002", "latest names '../elsewhere/step_00000002', which is no state"),
        (b"step_00000003", "latest names step_00000003, which is missing; write there which to go on from"),
        (b"step_00000007", "latest names step_00000007, which is missing"),  # a link that leads out
    ],
)
def test_a_pointer_to_nothing_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    states = tmp_path / "checkpoints"
    state(states, 2)
    (states / "step_00000007").symlink_to(state(tmp_path / "elsewhere", 7))
    (states / "latest").write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        latest_state(states)
    assert said in str(refused.value)


def test_a_pointer_that_is_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    with pytest.raises(CheckpointError, match=rf"cannot be read \(IsADirectoryError\); remove {tmp_path} to start afr"):
        latest_state(tmp_path)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"step": "3"}, "(step: Input should be a valid integer)"),
        ({"step": 4}, "says that it is of step 4"),
        ({"skipped_steps": -1}, "(skipped_steps: Input should be greater than or equal to 0)"),
        ({"bytes_written": {"metrics.jsonl": 1e8}}, "(bytes_written.metrics.jsonl: Input should be a valid integer)"),
        ({"parts": {"data": {"position": 10**31}}}, "(parts.data.position: Input should be less than"),
        ({"parts": []}, "(parts: Input should be an object)"),
        ({"best": {"step": 3, "value": "nan", "metric": "x"}}, "(best.value: Input should be a valid number)"),
        ({"more": 1}, "(more: Extra inputs are not permitted)"),
    ],
)
def test_a_state_that_says_what_no_run_says_is_refused(changes: dict, cause: str, tmp_path: Path) -> None:
    state(tmp_path, 2)
    where = state(tmp_path, 3, **changes)
    with pytest.raises(CheckpointError) as refused:
        read_position(where)
    assert cause in str(refused.value)
    assert f"write the name of another state to {tmp_path / 'latest'} (step_00000002)" in str(refused.value)


def noted(run_dir: Path) -> Position:
    (run_dir / "metrics.jsonl").write_text(LINES)
    position = Position(step=3, parts={}, skipped_steps=0, bytes_written=lengths(run_dir), sums=sums(run_dir))
    assert position.sums["metrics.jsonl"] == hashlib.sha256(LINES.encode()).hexdigest()
    return position


@pytest.mark.parametrize("damaged", [LINES[:-1], LINES.replace("2", "7"), "\0" * 40])
def test_a_log_that_lost_or_changed_its_past_is_refused(damaged: str, tmp_path: Path) -> None:
    position = noted(tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_text(damaged)
    with pytest.raises(CheckpointError, match=rf"^{log} is not what it was when the state after step 3 was saved"):
        check_logs(tmp_path, position)
    log.unlink()  # the remedy
    check_logs(tmp_path, position)
    assert cut_logs(tmp_path, position) == ["metrics.jsonl has lost what it said until then"]
    assert not log.exists()


def test_a_log_is_cut_and_never_grows(tmp_path: Path) -> None:
    position = noted(tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_text(LINES + '{"step": 4}\n{"st')
    assert cut_logs(tmp_path, position) == []
    assert log.read_text() == LINES
    log.write_text("")
    assert cut_logs(tmp_path, position) == ["metrics.jsonl has lost what it said until then"]
    assert log.read_text() == ""
    log.write_text(LINES)
    assert cut_logs(tmp_path, None) == [f"the {len(LINES)} bytes of metrics.jsonl are removed"]
    assert log.read_text() == ""


def test_the_same_command_on_a_finished_run_is_done(tmp_path: Path) -> None:
    cfg = run(tmp_path)
    cfg.check_run_dir()
    (cfg.run_dir / "model").mkdir()
    with pytest.raises(ConfigError, match=r"model is there, but not whole \(model\.json is missing\); remove it to go"):
        cfg.check_run_dir()
    (cfg.run_dir / "model" / "model.json").touch()
    with pytest.raises(RunFinished, match=rf"^run_dir={cfg.run_dir}: this run is done; its model is in .*/model\.$"):
        cfg.check_run_dir()
    assert RunFinished.exit_code == 0
    with pytest.raises(ConfigError, match=r"other settings \(global_batch 64 -> 32\)"):
        run(tmp_path, global_batch=32).check_run_dir()


def test_what_a_stop_asks_for_may_change(tmp_path: Path) -> None:
    run(tmp_path)
    other = run(tmp_path, max_skipped_steps=9, **{"optim.lr": 1e-6})
    other.check_run_dir()
    assert other.changes() == {"max_skipped_steps": (3, 9), "optim.lr": (1e-5, 1e-6)}
    with pytest.raises(ConfigError, match=r"other settings \(optim\.beta1 0\.9 -> 0\.8\)"):
        run(tmp_path, **{"optim.beta1": 0.8, "optim.lr": 1e-6}).check_run_dir()


def cut_settings(run_dir: Path) -> str:
    text = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(text[: text.index("schedule: ") + len("schedule: c")])
    return f"{run_dir / 'config.yaml'}, which has the settings of the run there, is damaged (setting optim.schedule"


def no_settings(run_dir: Path) -> str:
    (run_dir / "config.yaml").unlink()
    return "already holds a run (metrics.jsonl is there); choose another, or remove it"


def only_states(run_dir: Path) -> str:
    for name in ("config.yaml", "metrics.jsonl"):
        (run_dir / name).unlink()
    return "already holds a run (checkpoints is there)"


def short_log(run_dir: Path) -> str:
    os.truncate(run_dir / "metrics.jsonl", len(LINES) - 1)
    return f"{run_dir / 'metrics.jsonl'} is not what it was when the state after step 3 was saved"


def other_pointer(run_dir: Path) -> str:
    (run_dir / "checkpoints" / "latest").write_text("../../x")
    return "latest names '../../x', which is no state; write there which to go on from: step_00000002, step_00000003"


@pytest.mark.parametrize("damage", [cut_settings, no_settings, only_states, short_log, other_pointer])
def test_damage_is_said_before_a_model_is_built(damage: Callable[[Path], str], tmp_path: Path) -> None:
    cfg = run(tmp_path)
    said = damage(cfg.run_dir)
    with pytest.raises(MegarlhfError) as refused:
        cfg.check_run_dir()
    assert said in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "checkpoints", "tensorboard", "config.yaml"])
def test_a_link_out_of_a_run_is_not_followed(name: str, tmp_path: Path) -> None:
    """A run directory that somebody sent: its logs would be cut, and its states removed, wherever they lie."""
    cfg = run(tmp_path)
    away = tmp_path / "away"
    shutil.move(cfg.run_dir / name, away) if (cfg.run_dir / name).exists() else away.mkdir()
    (cfg.run_dir / name).symlink_to(away)
    with pytest.raises(ConfigError, match=rf"{name} is a link out of it, to {away}, which a run would write or remove"):
        cfg.check_run_dir()


def test_a_run_that_has_not_stepped_takes_other_settings(tmp_path: Path) -> None:
    """A gate or the first rollout asks for another setting, and nothing depends on the old ones yet."""
    cfg = run(tmp_path)
    shutil.rmtree(cfg.states_dir)
    with pytest.raises(ConfigError, match=r"other settings \(global_batch 64 -> 32\)"):
        run(tmp_path, global_batch=32).check_run_dir()
    for nothing in ("", '{"step": 0, "sft/heldout_loss": 5.0}\n'):  # what was measured before the first step
        (cfg.run_dir / "metrics.jsonl").write_text(nothing)
        run(tmp_path, global_batch=32).check_run_dir()


def test_another_spelling_of_a_path_is_the_same_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    run(tmp_path, **{"data.source": "rows.jsonl"})
    for same in ("./rows.jsonl", str(tmp_path / "rows.jsonl")):
        run(tmp_path, **{"data.source": same}).check_run_dir()
    (tmp_path / "others.jsonl").touch()
    with pytest.raises(ConfigError, match=r"data\.source '.*/rows\.jsonl' -> '.*/others\.jsonl'"):
        run(tmp_path, **{"data.source": "others.jsonl"}).check_run_dir()


def enter(cfg: SftConfig) -> str:
    mesh = start(ParallelLayout(data=2), seed=1)
    with pytest.raises(ConfigError) as refused, sole_run(cfg, mesh):
        pass
    return str(refused.value)


def test_a_second_run_is_refused_on_every_rank(tmp_path: Path) -> None:
    cfg = run(tmp_path)
    with held(cfg.run_dir / "lock", "run_dir=x", "run_dir"):
        for said in run_ranks(enter, 2, cfg):
            assert said.startswith(f"run_dir={cfg.run_dir} is in use: process {os.getpid()} on ")
        with pytest.raises(ConfigError, match=f"is in use: process {os.getpid()} on "):
            cfg.check_run_dir()
    assert not (cfg.run_dir / "lock").exists()


def save_unsound(model: str, where: str) -> list[str]:
    """A sound model is saved, one with a weight that is no number is not, nor one whose numbers overflow."""
    mesh = start(ParallelLayout(), seed=1)
    role = frozen(model, LabelLogprobs(1.0), mesh)
    tokenizer = build_tiny_tokenizer(words())
    save_model(role, Path(where, "sound"), Card(tokenizer))
    said = []
    for number, spoil in enumerate((lambda w: w.view(-1)[0].fill_(float("nan")), lambda w: w.mul_(1e15))):
        spoilt = frozen(model, LabelLogprobs(1.0), mesh)
        for weight in spoilt.tensors("weights"):
            spoil(weight)
        with pytest.raises(TrainingError) as refused:
            save_model(spoilt, Path(where, str(number)), Card(tokenizer))
        said.append(str(refused.value))
    return said


def test_a_model_that_is_not_finite_is_no_result(tmp_path: Path) -> None:
    language_model(tmp_path / "model", seed=4)
    ((weights, readings),) = run_ranks(save_unsound, 1, str(tmp_path / "model"), str(tmp_path / "out"))
    assert re.search(r"is not saved to \S+/0: \d+ of its numbers are not finite; go on from a state before", weights)
    assert "/1: it gives numbers that are not finite; " in readings
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sound"]
