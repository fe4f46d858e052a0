"""An algorithm of one's own is one small module: it runs on ranks, goes on bit for bit, and every command knows it."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf import cli
from megarlhf.config import load_config
from megarlhf.errors import ConfigError, TrainingError
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import TrainableRole, Update
from megarlhf.observe.provenance import write_provenance
from megarlhf.observe.writers import read_metrics
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers.find import trainer_named, trainers
from tests.helpers.models import frozen, policy_and_judge, whole_weights
from tests.helpers.ranks import run_ranks
from tests.runs.test_resume import CLOCKED, stopped_after
from tests.trainers import toy_reinforce
from tests.trainers.toy_reinforce import TRAINER, ReinforceConfig

ROOT = Path(__file__).resolve().parents[2]
NAME = toy_reinforce.__name__
SMALL = (
    *("tokenizer=arithmetic", "prompts.source=arithmetic", "prompts.template=plain", "prompts.arithmetic.rows=20"),
    *("sampling.max_new_tokens=8", "iterations=2", "rollout_batch=8", "global_batch=4", "micro_batch=2"),
    *("save_every=1", "tensorboard=false", "actor.optim.lr=1e-3", "actor.optim.schedule=constant"),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("own")
    policy_and_judge(folder)
    return str(folder)


def told(folder: str, run_dir: Path, *more: str) -> list[str]:
    """Settings as on a command line."""
    return [f"actor.init={folder}/actor", f"reward.init={folder}/judge", f"run_dir={run_dir}", *SMALL, *more]


def run(folder: str, where: str, stop: int | None) -> dict[str, torch.Tensor]:
    """Both iterations on two data ranks, or up to a stop: the final weights."""
    cfg: ReinforceConfig = load_config(TRAINER.config, None, told(folder, Path(where), "layout.data=2"))
    mesh = start(cfg.layout, seed=1)
    if stop is not None:
        with stopped_after(stop):
            TRAINER.run(cfg, TRAINER.prepare(cfg), [], mesh)
        return {}
    TRAINER.run(cfg, TRAINER.prepare(cfg), [], mesh)
    return whole_weights(frozen(f"{where}/model", LabelLogprobs(1.0), mesh))


def test_it_is_small_and_the_package_does_not_know_it() -> None:
    assert len(Path(toy_reinforce.__file__).read_text(encoding="utf-8").splitlines()) < 40
    critic_free = {"cispo", "dapo", "dr_grpo", "grpo", "gspo", "reinforce", "rloo"}
    assert trainers().keys() == {"dpo", "ppo", "process_reward", "reward", "sft"} | critic_free
    assert trainer_named("ppo").config.__name__ == "PPOConfig"


def test_it_runs_on_two_ranks_and_goes_on_bit_for_bit(models: str, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = run_ranks(run, 2, models, str(whole), None)
    run_ranks(run, 2, models, str(stopped), 1)
    first = read_metrics(stopped).rows
    found = run_ranks(run, 2, models, str(stopped), None)
    start_weights = run_ranks(weights_of, 1, f"{models}/actor")[0]
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(ours[name], weight) for name, weight in theirs.items())
        assert any(not torch.equal(start_weights[name], weight) for name, weight in theirs.items())
    rows, again = (read_metrics(where).rows for where in (whole, stopped))
    assert (len(rows), len(first), again[0]) == (2, 1, first[0])  # to its clock: it was not taken again
    for row, other in zip(rows, again, strict=True):
        assert {k: v for k, v in row.items() if not k.startswith(CLOCKED)} == {
            k: v for k, v in other.items() if not k.startswith(CLOCKED)
        }
        assert row["policy/first_ratio_gap"] < 1e-6
        assert row["rollout/reward_mean"] == pytest.approx(row["rollout/score_mean"], abs=1e-6)
        assert row["policy/grad_norm"] > 0
        assert not any(name.startswith(("value/", "kl/")) for name in row)


def weights_of(directory: str) -> dict[str, torch.Tensor]:
    return whole_weights(frozen(directory, LabelLogprobs(1.0), start(ParallelLayout(), seed=1)))


def command(*words: str) -> tuple[int, str]:
    """The exit code of a command and what it said."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = cli.main([*words])
    return code, said.getvalue()


def test_the_doctor_examines_it(models: str, tmp_path: Path) -> None:
    words = ("doctor", f"trainer={NAME}", *told(models, tmp_path / "run"))
    ((code, said),) = run_ranks(command, 1, *words)
    assert code == 0, said
    assert "8 of 8 gates hold, 2 skipped" in said  # it measures no KL, and has no reference
    # Its settings are the trainer's: PPO's are none of them. A file may name it too.
    (file := tmp_path / "run.yaml").write_text(f"trainer: {NAME}\n")
    ((code, said),) = run_ranks(command, 1, "doctor", "--config", str(file), *words[2:], "kl_coef=0.1")
    assert (code, "unknown setting kl_coef" in said) == (2, True), said


def spoilt(folder: str, where: str) -> str:
    """What ends a run whose actor's second step is not taken."""
    update, calls = TrainableRole.update, 0

    def skipped(self: TrainableRole, *args: Any) -> Update:
        nonlocal calls
        calls += 1
        done = update(self, *args)
        return replace(done, stepped=False) if calls == 2 else done

    cfg: ReinforceConfig = load_config(TRAINER.config, None, told(folder, Path(where), "max_skipped_steps=0"))
    inputs, mesh = TRAINER.prepare(cfg), start(cfg.layout, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainableRole, "update", skipped)
        with pytest.raises(TrainingError) as ended:
            TRAINER.run(cfg, inputs, [], mesh)
    return str(ended.value)


def test_its_capsule_is_taken_again(models: str, tmp_path: Path) -> None:
    (said,) = run_ranks(spoilt, 1, models, str(tmp_path / "run"))
    capsule = tmp_path / "run" / "capsules" / "step_00000000"
    assert f"megarlhf replay capsule={capsule}" in said
    ((code, said),) = run_ranks(command, 1, "replay", f"capsule={capsule}")
    assert code == 2
    assert f"its step is of trainer={NAME}, none of megarlhf's own; where you know that code, name it too" in said
    ((code, said),) = run_ranks(command, 1, "replay", f"capsule={capsule}", "trainer=ppo")
    assert (code, f"the step in {capsule} is of {NAME}; name that" in said) == (2, True), said
    ((code, said),) = run_ranks(command, 1, "replay", f"capsule={capsule}", f"trainer={NAME}")
    assert code == 0, said
    assert "4 rows, weights of the failed step: the step is finite here." in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("xyzzy", "trainer xyzzy is none of cispo, .*, sft; choose one of them, or name a module of your own"),
        ("no.such.module", "trainer no.such.module: Python finds no such module; put the directory that holds"),
        ("megarlhf.cli", "trainer megarlhf.cli: the module does not define TRAINER"),
        (".relative", "Python finds no such module"),
    ],
)
def test_what_is_no_trainer_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trainer_named(name)


def test_what_draws_no_rollouts_is_not_examined(tmp_path: Path) -> None:
    code, said = command("doctor", "trainer=sft", f"run_dir={tmp_path}")
    assert (code, "trainer=sft draws no rollouts" in said) == (2, True), said


def test_it_is_a_command(models: str, tmp_path: Path) -> None:
    ((code, said),) = run_ranks(command, 1, NAME, *told(models, tmp_path / "run", "iterations=1"))
    assert code == 0, said
    assert f"the model is in {tmp_path / 'run' / 'model'}" in said
    ((code, said),) = run_ranks(command, 1, NAME, "--help")
    assert (code, "clip_range" in said, "ppo_epochs" in said) == (0, True, False)


def test_settings_that_nothing_would_act_on_are_refused(models: str, tmp_path: Path) -> None:
    cfg: ReinforceConfig = load_config(TRAINER.config, None, told(models, tmp_path / "run", "kl_bound=3"))
    with pytest.raises(ConfigError, match="kl_bound=3: nothing logs kl/reference_mean here; set kl_bound=null"):
        TRAINER.prepare(cfg)
    load_config(TRAINER.config, None, told(models, tmp_path / "run", "kl_bound=null")).check_sizes()


def test_a_run_of_another_trainer_is_refused(models: str, tmp_path: Path) -> None:
    """Even where every setting is the same: the file says whose they are."""
    cfg: ReinforceConfig = load_config(TRAINER.config, None, told(models, tmp_path / "run"))
    write_provenance(cfg.run_dir, cfg, [])
    TRAINER.prepare(cfg)
    file = cfg.run_dir / "trainer.txt"
    file.write_text(file.read_text().replace("toy_reinforce", "toy_rloo"))
    with pytest.raises(ConfigError, match=r"run_dir=.* holds a run of the trainer tests.trainers.toy_rloo, this is"):
        TRAINER.prepare(cfg)
    file.unlink()  # of a run before there was such a file
    TRAINER.prepare(cfg)


def test_a_trainer_has_settings_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its runs and capsules would be taken for those of whose settings they are."""
    monkeypatch.setitem(vars(toy_reinforce), "TRAINER", trainer_named("ppo"))
    with pytest.raises(ConfigError, match=r"are PPOConfig of megarlhf.trainers.ppo, .*; derive a class from it"):
        trainer_named(NAME)
