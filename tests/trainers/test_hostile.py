"""No door of the product runs what a model directory, a training state or a capsule would have it run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megarlhf.checkpoint.checksums import write_checksums
from megarlhf.checkpoint.hf_convert import Options, to_hf, to_megatron
from megarlhf.checkpoint.state_writer import Retention, StateWriter
from megarlhf.checkpoint.training_state import Position, load_state
from megarlhf.commands import replay
from megarlhf.errors import CheckpointError
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.hostile import poison, sum_again
from tests.helpers.models import learner, score_model, settings
from tests.helpers.ranks import run_ranks
from tests.helpers.refusal import DPO, GENERATE, PPO, REWARD, SFT, assert_matches, write_model

DOCTOR = ("doctor", *PPO[1:])
EVAL = ("eval", "model=tiny-xs", "tokenizer=arithmetic", "prompts.template=plain", "prompts.arithmetic.rows=4")
SCORE = ("score", "input=rows.jsonl", "output=scored.jsonl")
DOORS = [
    *(
        (SFT, "model"),
        (REWARD, "model"),
        (EVAL, "model"),
        (GENERATE, "model"),
        (SCORE, "model"),
        (DOCTOR, "actor.init"),
    ),
    *((DPO, "model"), (DPO, "reference")),
    *((PPO, "actor.init"), (PPO, "critic.init"), (PPO, "reference.init"), (PPO, "reward.init")),
]
SAYS = ".metadata names 'builtins.eval', which no metadata of tensors does and which may run code; "


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model and a judge."""
    folder: Path = tmp_path_factory.mktemp("models")
    write_model(folder / "language_hf")
    score_model(folder / "scalar_hf", vocab_size=160)
    for head in ("language", "scalar"):
        to_megatron(folder / f"{head}_hf", folder / head, Options(progress=False))
    return folder


@pytest.mark.parametrize(
    ("command", "setting"), DOORS, ids=lambda value: value[0] if isinstance(value, tuple) else value
)
def test_a_hostile_model_directory(
    command: tuple[str, ...], setting: str, models: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(models / ("scalar" if setting == "reward.init" else "language"), bad)
    poison(bad / "weights" / ".metadata", tmp_path / "ran")
    (tmp_path / "rows.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    # As it came: the sums of what they were made for do not fit, and nothing is read.
    assert_matches(refused(command, f"{setting}=bad"), "bad/weights/.metadata was changed after it was saved; ")
    sum_again(bad)
    assert_matches(refused(command, f"{setting}=bad"), SAYS)
    assert not (tmp_path / "ran").exists()


def test_a_hostile_model_directory_is_not_converted(models: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(models / "language", tmp_path / "bad"))
    poison(bad / "weights" / ".metadata", tmp_path / "ran")
    with pytest.raises(CheckpointError, match="was changed after it was saved"):
        to_hf(bad, tmp_path / "out", Options(progress=False))
    sum_again(bad)
    with pytest.raises(CheckpointError, match=r"names 'builtins\.eval'"):
        to_hf(bad, tmp_path / "out", Options(progress=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def states(init: str, where: str) -> dict[str, str]:
    """What each door says of a training state, or of a capsule's weights, whose pickles are hostile in turn."""
    mesh = start(ParallelLayout(), seed=1)
    role = learner(init, LabelLogprobs(1.0), settings(mesh, offload="none"), mesh, OptimConfig())
    folder, mark, said = Path(where), Path(where) / "ran", {}
    writer = StateWriter(folder / "checkpoints", {role.name: role}, {}, Retention(1, 0), mesh)
    writer.start(Position(step=1, parts={}, skipped_steps=0, bytes_written={}))
    writer.finish()
    state, capsule = folder / "checkpoints" / "step_00000001", folder / "capsules" / "step_00000001"
    capsule.mkdir(parents=True)
    shutil.copytree(state, folder / "whole")

    def attempt(name: str, load: Callable[[], Any]) -> None:
        try:
            load()
            said[name] = "loaded"
        except CheckpointError as error:
            said[name] = str(error)

    for file in (".metadata", "common.pt", "__0_0.distcp"):
        shutil.rmtree(state)
        shutil.copytree(folder / "whole", state)
        poison(state / role.name / "weights" / file, mark)
        attempt(f"{file}, replay, unsummed", lambda: replay._load(role, capsule))
        sum_again(state)
        attempt(f"{file}, resume", lambda: load_state(state, {role.name: role}))
        attempt(f"{file}, replay", lambda: replay._load(role, capsule))
        shutil.copytree(state / role.name / "weights", capsule / "weights")
        write_checksums(capsule / "weights")
        attempt(f"{file}, capsule", lambda: replay._load(role, capsule))
        shutil.rmtree(capsule / "weights")
    said["ran"] = str(mark.exists())
    return said


def test_hostile_training_states_and_capsules(models: Path, tmp_path: Path) -> None:
    (said,) = run_ranks(states, 1, str(models / "language"), str(tmp_path))
    assert said.pop("ran") == "False"
    assert len(said) == 3 * 4
    for name, message in said.items():
        file = name.partition(",")[0]
        if name.endswith("unsummed"):
            assert f"learner/weights/{file} was changed after it was saved; write the name of another state" in message
        elif file == ".metadata":
            assert SAYS in message
        else:
            assert "cannot be loaded (" in message, message
