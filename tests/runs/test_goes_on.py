"""A run that is done, or was stopped, goes on with more steps or, by force, with other settings, and notes it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.errors import ConfigError, RunFinished
from megarlhf.models.readings import LabelLogprobs
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers import ppo, sft
from megarlhf.trainers.sft import SftConfig
from tests.helpers.models import frozen, policy_and_judge, whole_weights
from tests.helpers.ranks import RankFailedError, run_ranks
from tests.runs.test_resume import logged_lines, ppo_settings, stopped_after

DATA2 = ParallelLayout(data=2)


def weights_of(model: str) -> dict[str, torch.Tensor]:
    return whole_weights(frozen(model, LabelLogprobs(1.0), start(ParallelLayout(), seed=1)))


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (run_ranks(weights_of, 1, str(model))[0] for model in (one, other))
    for name, weight in first.items():
        assert torch.equal(second[name], weight), name


def run_ppo(where: str, folder: str, stop: int | None, changes: dict[str, Any]) -> None:
    mesh = start(DATA2, seed=1)
    cfg = ppo_settings(Path(where), DATA2, folder, **{"save_every": 3, "keep_last": 9, **changes})
    with stopped_after(stop) if stop else nullcontext():
        ppo.TRAINER.run(cfg, ppo.TRAINER.prepare(cfg), ["ppo"], mesh)


def test_more_iterations_equal_one_long_run_bit_for_bit(tmp_path: Path) -> None:
    """From a finished run, whose last step lies between two saves, and from a stopped one."""
    folder = str(tmp_path / "models")
    policy_and_judge(Path(folder))
    pieces: dict[str, list[tuple[int | None, dict[str, Any]]]] = {
        "whole": [(None, {"iterations": 4})],
        "finished": [(None, {"iterations": 2, "value_warmup_iterations": 1}), (None, {"iterations": 4})],
        "stopped": [(3, {"iterations": 9}), (None, {"iterations": 4})],
    }
    for name, starts in pieces.items():
        for stop, changes in starts:
            run_ranks(run_ppo, 2, str(tmp_path / name), folder, stop, {"value_warmup_iterations": 1, **changes})
    for name in ("finished", "stopped"):
        assert logged_lines(tmp_path / name) == logged_lines(tmp_path / "whole")
        assert (tmp_path / name / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
        assert_same_weights(tmp_path / name / "model", tmp_path / "whole" / "model")
    starts = [json.loads(line) for line in (tmp_path / "finished" / "starts.jsonl").read_text().splitlines()]
    assert [start["after_step"] for start in starts] == [0, 2]
    assert [start["changes"] for start in starts] == [{}, {"iterations": [2, 4]}]
    # The model that was finished is still there, as it was.
    assert_same_weights(
        tmp_path / "finished" / "model_step_00000002", tmp_path / "finished" / "checkpoints" / "step_00000002" / "actor"
    )


def sft_settings(where: Path, **changes: Any) -> SftConfig:
    given = {
        "run_dir": where,
        "model": "tiny-xs",
        "tokenizer": "arithmetic",
        "data": {"template": "plain", "arithmetic": {"level": 1, "rows": 12}},
        "optim": {"schedule": "constant"},
        "global_batch": 4,
        "micro_batch": 2,
        "tensorboard": False,
    }
    return SftConfig.model_validate({**given, **changes})


def run_sft(where: str, changes: dict[str, Any]) -> None:
    cfg = sft_settings(Path(where), **changes)
    inputs = sft.prepare(cfg)
    sft.TRAINER.run(cfg, inputs, ["sft"], start(ParallelLayout(), seed=1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SFT run of three steps that is done, whose states nobody asked for."""
    where = tmp_path_factory.mktemp("finished") / "run"
    run_ranks(run_sft, 1, str(where), {})
    return where


def copy_of(run_dir: Path, where: Path) -> Path:
    """The same run in another place; its settings say so."""
    shutil.copytree(run_dir, where)
    settings = where / "config.yaml"
    settings.write_text(settings.read_text().replace(str(run_dir), str(where)))
    return where


def test_more_epochs_equal_one_long_run_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    again = copy_of(finished, tmp_path / "again")
    run_ranks(run_sft, 1, str(again), {"epochs": 2.0})
    run_ranks(run_sft, 1, str(tmp_path / "whole"), {"epochs": 2.0})
    assert [row["step"] for row in logged_lines(again)] == list(range(1, 7))
    assert logged_lines(again) == logged_lines(tmp_path / "whole")
    assert_same_weights(again / "model", tmp_path / "whole" / "model")
    assert_same_weights(again / "model_step_00000003", finished / "model")


def refused(kind: type[Exception], where: Path, **changes: Any) -> str:
    with pytest.raises(kind) as raised:
        sft.prepare(sft_settings(where, **changes))
    return str(raised.value)


def test_what_is_done_is_not_done_again(finished: Path, tmp_path: Path) -> None:
    assert "this run is done; its model is in" in refused(RunFinished, finished)
    assert "this run is done" in refused(RunFinished, finished, epochs=1.1)  # as many steps
    assert "this run is done" in refused(RunFinished, finished, resume="force")
    fewer = refused(ConfigError, finished, epochs=0.5)
    assert f"run_dir={finished}: 3 steps are done, and epochs=0.5 asks for 2; ask for more, or choose ano" in fewer
    bare = copy_of(finished, tmp_path / "bare")
    shutil.rmtree(bare / "checkpoints")
    assert "this run is done, and has no saved state to go on from (save_every=0 saves none); start another from" in (
        refused(ConfigError, bare, epochs=2.0)
    )


def test_every_finished_model_is_kept(finished: Path, tmp_path: Path) -> None:
    """Also where one of as many steps is kept already, as after an extension that was killed."""
    where = copy_of(finished, tmp_path / "run")
    shutil.copytree(where / "model", where / "model_step_00000003")
    run_ranks(run_sft, 1, str(where), {"epochs": 2.0})
    assert {path.name for path in where.glob("model*")} == {"model", "model_step_00000003", "model_step_00000003_2"}
    assert_same_weights(where / "model_step_00000003_2", finished / "model")


def test_a_rate_that_decays_to_another_end_is_said(tmp_path: Path) -> None:
    decays = {"optim": {"schedule": "cosine"}}
    run_ranks(run_sft, 1, str(tmp_path / "run"), decays)
    file = tmp_path / "run.yaml"
    file.write_text(sft_settings(tmp_path / "run", **decays, epochs=2.0).to_yaml())
    assert "optim.schedule=cosine decays to another end now, so that its learning rate jumps here" in started(file)


def started(file: Path) -> str:
    """What `megarlhf sft` says of the settings in a file."""
    command = [sys.executable, "-m", "megarlhf.cli", "sft", "--config", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_force_goes_on_with_what_is_refused_and_notes_it(finished: Path, tmp_path: Path) -> None:
    """Another optimiser and other data: the weights and the steps go on, the data begin at their first row."""
    where = copy_of(finished, tmp_path / "run")
    changes = {"optim": {"schedule": "constant", "beta1": 0.8}, "epochs": 1.0}
    changes["data"] = {"template": "plain", "arithmetic": {"level": 1, "rows": 16}}
    said = refused(ConfigError, where, **changes)
    assert "other settings (data.arithmetic.rows 12 -> 16, optim.beta1 0.9 -> 0.8); put them back to go on" in said
    assert said.endswith("or set resume=force, which goes on with them and notes it.")
    file = tmp_path / "run.yaml"
    file.write_text(sft_settings(where, **changes, resume="force").to_yaml())
    spoken = started(file)
    assert "goes on with other settings (data.arithmetic.rows 12 -> 16, optim.beta1 0.9 -> 0.8)" in spoken
    assert "resume=force: data begins afresh, for data.arithmetic.rows changed" in spoken
    assert f"its model so far is kept in {where / 'model_step_00000003'}" in spoken
    *_, start = [json.loads(line) for line in (where / "starts.jsonl").read_text().splitlines()]
    assert start["after_step"] == 3
    assert start["changes"] == {"data.arithmetic.rows": [12, 16], "optim.beta1": [0.9, 0.8]}
    rows = logged_lines(where)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[3]["train/epoch"] == 0
    assert rows[:3] == logged_lines(finished)


def test_force_takes_no_state_of_another_model(finished: Path, tmp_path: Path) -> None:
    """And leaves the run as it was."""
    where = copy_of(finished, tmp_path / "run")
    changes = {"model": "tiny-s", "epochs": 2.0, "resume": "force"}
    with pytest.raises(RankFailedError, match=r"step_00000003/model is of a model of another architecture \(hidden_"):
        run_ranks(run_sft, 1, str(where), changes)
    assert "this run is done; its model is in" in refused(RunFinished, where)
    assert logged_lines(where) == logged_lines(finished)


def test_other_data_of_as_many_rows_begin_afresh_too(finished: Path, tmp_path: Path) -> None:
    where = copy_of(finished, tmp_path / "run")
    data = {"template": "plain", "arithmetic": {"level": 1, "rows": 12, "seed": 5}}
    run_ranks(run_sft, 1, str(where), {"data": data, "epochs": 2.0, "resume": "force"})
    position = json.loads((where / "checkpoints" / "step_00000006" / "state.json").read_text())
    assert position["parts"]["data"]["position"] == 12  # three steps of four rows
