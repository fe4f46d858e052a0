"""Saved states of a run, trained on two tensor ranks, are models at every door."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.checkpoint.hf_convert import Options, to_hf
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.checkpoint.nearby import model_of
from megarlhf.config import load_config
from megarlhf.errors import CheckpointError, ConfigError
from megarlhf.models.readings import LabelLogprobs
from megarlhf.observe.writers import read_metrics
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runtime.models_named import check_same_models, taken, with_models
from megarlhf.trainers import dpo, ppo, sft
from tests.helpers.models import frozen, policy_and_judge, whole_weights
from tests.helpers.ranks import run_ranks

DATA: dict[str, Any] = {"source": "arithmetic", "template": "plain", "arithmetic": {"level": 1, "rows": 16}}
TENSOR = ParallelLayout(tensor=2)


def train(folder: str) -> None:
    optim = {"lr": 1e-2, "schedule": "constant"}
    cfg = ppo.PPOConfig.model_validate(
        {
            "run_dir": f"{folder}/run",
            "layout": TENSOR,
            "actor": {"init": f"{folder}/actor", "optim": optim},
            "critic": {"optim": optim},
            "reward": {"init": f"{folder}/judge"},
            "tokenizer": "arithmetic",
            "prompts": DATA,
            "sampling": {"max_new_tokens": 6},
            "iterations": 3,
            "rollout_batch": 8,
            "global_batch": 8,
            "ppo_epochs": 1,
            "save_every": 1,
            "keep_last": 3,
            "keep_best": "-rollout/tokens",
            "tensorboard": False,
        }
    )
    ppo.TRAINER.run(cfg, ppo.TRAINER.prepare(cfg), [], start(cfg.layout, seed=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("states")
    policy_and_judge(found)
    run_ranks(train, 2, str(found))
    return found


def weights(*directories: str) -> list[dict[str, Tensor]]:
    """Of each model, loaded on one rank."""
    mesh = start(ParallelLayout(), seed=1)
    return [whole_weights(frozen(directory, LabelLogprobs(1.0), mesh)) for directory in directories]


def test_each_state_has_the_weights_of_its_step(folder: Path) -> None:
    run = folder / "run"
    places = [*(f"{run}/checkpoints/{name}" for name in ("step_1", "step_2", "latest", "best")), str(run)]
    first, second, last, best, model = run_ranks(weights, 1, *map(model_of, places))[0]
    assert all(torch.equal(last[name], weight) for name, weight in model.items())
    assert not any(torch.equal(first[name], second[name]) for name in model)
    tokens = [row["rollout/tokens"] for row in read_metrics(run).rows]
    of_best = (first, second, last)[tokens.index(min(tokens))]
    assert all(torch.equal(best[name], weight) for name, weight in of_best.items())


def test_a_state_says_what_the_finished_model_says(folder: Path) -> None:
    state, finished = folder / "run" / "checkpoints" / "step_00000003", folder / "run" / "model"
    assert describe_model(str(state / "actor")) == describe_model(str(finished))
    assert describe_model(str(state / "critic")).head == "scalar"
    assert (state / "actor" / "tokenizer" / "tokenizer.json").is_file()


def test_it_is_converted_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for name, source in (("state", "checkpoints/step_3"), ("run", ""), ("model", "model")):
        to_hf(folder / "run" / source, tmp_path / name, Options(progress=False))
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert "model.safetensors" in files
    for name in ("state", "run"):
        assert {path.name for path in (tmp_path / name).iterdir()} == files
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "model" / file).read_bytes(), file


def test_settings_that_name_one_are_given_its_model_and_say_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"{folder}/run/checkpoints/step_2"
    state = f"{folder}/run/checkpoints/step_00000002/actor"
    cfg = sft.SftConfig.model_validate(
        {
            "model": asked,
            "run_dir": tmp_path / "run",
            "data": DATA,
            "global_batch": 8,
            "optim": {"lr": 1e-20, "schedule": "constant"},
            "tensorboard": False,
        }
    )
    assert sft.TRAINER.main(cfg, []) == 0
    assert f"model={asked}: {state} is taken" in capsys.readouterr().err.replace("\n", "")
    assert load_config(sft.SftConfig, tmp_path / "run" / "config.yaml", []).model == state
    same, moved = run_ranks(weights, 1, state, str(tmp_path / "run" / "model"))[0]
    assert all(torch.allclose(same[name], weight) for name, weight in moved.items())


def test_models_are_found_inside_groups_and_mappings(folder: Path) -> None:
    run = str(folder / "run")
    judges = {"taste": {"kind": "model", "init": f"{run}/checkpoints/step_1/critic"}}
    asked = ppo.PPOConfig.model_validate(
        {"run_dir": "r", "actor": {"init": run}, "critic": {"init": "tiny-s"}, "judges": judges}
    )
    found = with_models(asked)
    assert (found.actor.init, found.critic.init) == (f"{run}/model", "tiny-s")
    assert found.inits["taste"] == f"{run}/checkpoints/step_1/critic"
    assert taken(asked, found) == [f"actor.init={run}: {run}/model is taken"]
    near = dpo.DPOConfig.model_validate({"run_dir": "r", "model": "tiny-s", "reference": f"{run}/checkpoints/latest"})
    assert with_models(near).reference == f"{run}/checkpoints/step_00000003/actor"
    with pytest.raises(
        CheckpointError, match=r"step_00000009 is not there; name one of .*step_00000001, step_00000002"
    ):
        with_models(
            asked.model_copy(
                update={"judges": {}, "actor": asked.actor.model_copy(update={"init": f"{run}/checkpoints/step_9"})}
            )
        )


def _differ(folder: str) -> str:
    mesh = start(ParallelLayout(data=2), seed=1)
    cfg = sft.SftConfig.model_validate({"model": f"{folder}/of_{mesh.rank}", "run_dir": "r"})
    check_same_models(cfg.model_copy(update={"model": folder}), mesh)
    with pytest.raises(ConfigError) as refused:
        check_same_models(cfg, mesh)
    return str(refused.value)


def test_ranks_that_found_different_states_are_stopped(tmp_path: Path) -> None:
    expected = "a model that the settings name was saved anew while the ranks started; start again."
    assert run_ranks(_differ, 2, str(tmp_path)) == [expected] * 2


def test_the_doctor_examines_the_model_of_a_run(folder: Path) -> None:
    chosen = [
        "actor.init=" + f"{folder}/run/checkpoints/step_2",
        "judges.right.kind=rule",
        "judges.right.rule=arithmetic",
    ]
    sizes = ["rollout_batch=8", "group_size=4", "global_batch=8", "sampling.max_new_tokens=4", f"run_dir={folder}/none"]
    done = subprocess.run(
        [sys.executable, "-m", "megarlhf.cli", "doctor", "trainer=grpo", *chosen, *sizes, "prompts.source=arithmetic"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    where = f"{folder}/run/checkpoints/step_00000002/actor"
    assert f"actor.init={folder}/run/checkpoints/step_2: {where} is taken" in done.stdout
    assert "gates hold" in done.stdout
