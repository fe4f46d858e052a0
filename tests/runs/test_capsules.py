"""What failed runs leave behind, and steps taken again from it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.batch.rollouts import PolicyRows, Prompts
from megarlhf.batch.supervised import TokenBatch
from megarlhf.checkpoint.training_state import latest_state
from megarlhf.commands.replay import ReplayConfig, main
from megarlhf.errors import DataError, TrainingError
from megarlhf.models.role import TrainableRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import Loss, LossSums, States
from megarlhf.runs.capsule import leave_capsule, read_batch, read_notes, tensors_of, texts_of, write_capsule
from megarlhf.trainers import ppo, sft
from megarlhf.trainers.ppo import PPOConfig
from megarlhf.trainers.sft import SftConfig
from tests.helpers.models import policy_and_judge
from tests.helpers.ranks import run_ranks
from tests.runs.test_killed import config
from tests.runs.test_resume import ppo_settings
from tests.trainers.test_splits import lessons

LAYOUT = ParallelLayout(data=2)


def prompts() -> Prompts:
    return Prompts(torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 2]), torch.tensor([7, 9]), ("five", "é"))


def write_batches(run_dir: str) -> list[dict[str, Any]]:
    """Each kind of batch, written and read again by its rank."""
    mesh = start(ParallelLayout(), seed=1)
    differences = []
    for step, batch in enumerate((lessons(3)[0], prompts())):
        mesh.trail.step, mesh.trail.work, mesh.trail.trainer = step, batch, "megarlhf.trainers.ppo"
        directory = write_capsule(Path(run_dir), "a reason", mesh)
        (note,) = read_notes(directory)
        again = read_batch(directory, note, type(batch))
        ours, theirs = dict(tensors_of(batch)), dict(tensors_of(again))
        differences.append(
            {
                "names": (list(ours), list(theirs)),
                "equal": all(torch.equal(ours[name], theirs[name]) for name in ours),
                "texts": (dict(texts_of(batch)), dict(texts_of(again))),
                "kind": note.kind,
            }
        )
    return differences


def test_batches_come_back_as_they_were(tmp_path: Path) -> None:
    (found,) = run_ranks(write_batches, 1, str(tmp_path))
    assert [one["kind"] for one in found] == [PolicyRows.__name__, Prompts.__name__]
    for one in found:
        assert one["equal"]
        for ours, theirs in (one["names"], one["texts"]):
            assert ours == theirs
    assert found[1]["texts"][0] == {"answers": ["five", "é"]}
    assert "rollout.tokens" in found[0]["names"][0]


def explode(cfg: SftConfig) -> str:
    """A learning rate that no model survives."""
    with pytest.raises(TrainingError) as failed:
        sft.TRAINER.run(cfg, sft.prepare(cfg), ["sft"], start(cfg.layout, seed=1))
    return str(failed.value)


def replay(capsule: str) -> tuple[int, str]:
    """The exit code, and what is printed."""
    with redirect_stdout(StringIO()) as printed:
        code = main(ReplayConfig(capsule=Path(capsule)), [])
    assert not torch.distributed.is_initialized()  # another run may start in this process
    return code, printed.getvalue()


def test_an_exploding_step_is_taken_again_on_one_rank(tmp_path: Path) -> None:
    changes = {"optim": {"lr": 1e12}, "max_skipped_steps": 0, "save_every": 0, "keep_best": ""}
    said = run_ranks(explode, 2, config(tmp_path, **changes))
    capsule = tmp_path / "capsules" / "step_00000001"
    assert f"megarlhf replay capsule={capsule} takes the step again" in said[0]
    notes = read_notes(capsule)
    assert [(note.rank, note.part, note.kind) for note in notes] == [(0, 0, "TokenBatch"), (1, 1, "TokenBatch")]
    assert notes[1].where == "step 1, phase train, role model"
    assert all(isinstance(read_batch(capsule, note, TokenBatch).rows(slice(0, 4)), TokenBatch) for note in notes)
    ((code, printed),) = run_ranks(replay, 1, str(capsule))
    assert code == 1
    assert "8 rows, weights of the failed step: the step is not finite here either" in printed
    assert "first output that is not finite: " in printed
    assert not (tmp_path / "model").exists()


@contextmanager
def spoilt_step(number: int, spoil: Callable[[], object]) -> Iterator[None]:
    """Inside, rank 1 does something else when it comes to optimiser step `number`."""
    next_token_loss = sft.next_token_loss
    calls = 0

    def loss(role: TrainableRole) -> Loss:
        nonlocal calls
        calls += 1
        if calls == number and role.mesh.rank == 1:
            spoil()
        return next_token_loss(role)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "next_token_loss", loss)
        yield


def hang(cfg: SftConfig) -> str:
    """Rank 1 sleeps through its third step: what the other says of it."""
    mesh = start(cfg.layout, seed=1, timeout_s=cfg.timeout_s)
    with spoilt_step(3, lambda: time.sleep(3 * cfg.timeout_s)):
        try:
            sft.TRAINER.run(cfg, sft.prepare(cfg), ["sft"], mesh)
        except TrainingError as error:
            return str(error)
        except RuntimeError as error:
            return f"other: {error}"
    return "nothing"


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    said = run_ranks(hang, 2, config(tmp_path, save_every=0, keep_best="", timeout_s=4.0))
    assert said[0].startswith("no answer for timeout_s=4 in ")
    assert (
        "step 2, phase train, role model: rank 1 (last seen in step 2, phase train, role model) did not arrive"
        in said[0]
    )
    capsule = tmp_path / "capsules" / "step_00000002"
    assert f"the batch is in {capsule}" in said[0]
    assert read_notes(capsule)[0].rank == 0
    assert not list((tmp_path / "ranks").iterdir())


def fail(cfg: SftConfig) -> str:
    """Rank 1 raises in its third step; the other hears of it in a collective, or times out."""
    mesh = start(cfg.layout, seed=1, timeout_s=cfg.timeout_s)
    with spoilt_step(3, lambda: 1 / 0), pytest.raises((ArithmeticError, RuntimeError, TrainingError)) as failed:
        sft.TRAINER.run(cfg, sft.prepare(cfg), ["sft"], mesh)
    return type(failed.value).__name__


def test_a_rank_that_fails_leaves_its_own_words(tmp_path: Path) -> None:
    raised = run_ranks(fail, 2, config(tmp_path, save_every=0, keep_best="", timeout_s=4.0))
    assert raised[1] == "ZeroDivisionError"
    note = next(note for note in read_notes(tmp_path / "capsules" / "step_00000002") if note.rank == 1)
    assert note.reason == "ZeroDivisionError: division by zero"
    assert note.command == "megarlhf sft\n"
    assert "global_batch: 8" in note.config


def test_what_is_no_optimiser_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no rank_\*\.json; name a directory under RUN/capsules"):
        main(ReplayConfig(capsule=tmp_path), [])
    run_ranks(write_batches, 1, str(tmp_path))
    with pytest.raises(DataError, match=r"step 1 was no optimiser step \(batch: Prompts\)"):
        main(ReplayConfig(capsule=tmp_path / "capsules" / "step_00000001"), [])


def spoil_ppo(cfg: PPOConfig) -> str:
    """The critic's loss is no number in the third iteration, while the state after the second is being written."""
    value_loss = ppo.value_loss
    calls = 0

    def spoilt(critic: TrainableRole, cfg: PPOConfig) -> Loss:
        nonlocal calls
        calls += 1
        whole, factor = value_loss(critic, cfg), float("nan") if calls == 3 else 1.0

        def loss(states: States, rows: Any) -> LossSums:
            sums = whole(states, rows)
            return replace(sums, total=sums.total * factor)

        return loss

    mesh, inputs = start(cfg.layout, seed=1), ppo.TRAINER.prepare(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "value_loss", spoilt)
        with pytest.raises(TrainingError) as failed:
            ppo.TRAINER.run(cfg, inputs, ["ppo"], mesh)
    return str(failed.value)


def test_a_step_of_ppo_is_taken_again_with_offloading_though_a_state_was_being_written(tmp_path: Path) -> None:
    policy_and_judge(tmp_path)
    run_dir = tmp_path / "run"
    drawn_in = {"layout": {"tensor": 2}}  # one rank that takes a step again is not enough for it
    cfg = ppo_settings(run_dir, ParallelLayout(data=2), str(tmp_path), max_skipped_steps=0, rollout=drawn_in)
    assert cfg.offload == "host"
    said, _ = run_ranks(spoil_ppo, 2, cfg)
    capsule = run_dir / "capsules" / "step_00000002"
    assert "1 optimiser steps in a row were skipped" in said
    assert f"megarlhf replay capsule={capsule} takes the step again" in said
    assert latest_state(run_dir / "checkpoints") == run_dir / "checkpoints" / "step_00000002"  # it was not lost
    for expected in ("weights of the failed step", "weights of step_00000002, the newest saved state"):
        ((code, printed),) = run_ranks(replay, 1, str(capsule))
        assert f"4 rows, {expected}: the step is finite here." in printed
        assert code == 0
        shutil.rmtree(capsule / "weights", ignore_errors=True)


def note_of(**changes: Any) -> dict[str, Any]:
    texts = ("reason", "where", "role", "collective", "attempt", "kind", "command", "config")
    note: dict[str, Any] = {**dict.fromkeys(texts, ""), "step": 1, "rank": 0, "part": 0, "world_size": 1}
    return {**note, "texts": {}, "trainer": "megarlhf.trainers.sft", **changes}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": "../0"}, r"rank_0\.json cannot be read \(rank: Input should be a valid integer\)"),
        ({"texts": ["x"]}, r"cannot be read \(texts: Input should be an object\)"),
        (
            {"trainer": "os"},
            r"its step is of trainer=os, none of megarlhf's own; where you know",
        ),
        (
            {"trainer": "megarlhf.trainers.find"},
            r"its step is of trainer=megarlhf.trainers.find, none of",
        ),
        ({"trainer": ""}, r"its step is of trainer=unknown, none"),
        ({"kind": 5}, r"cannot be read \(kind: Input should be a valid string\)"),
        ({"kind": "TokenBatch", "role": "model"}, r"rank_0\.safetensors: no TokenBatch of a failed step"),
    ],
)
def test_what_no_run_has_written_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "rank_0.json").write_text(json.dumps(note_of(**changes)))
    with pytest.raises(DataError, match=said):
        main(ReplayConfig(capsule=tmp_path), [])


def test_a_reason_is_text_and_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gloo says which source file closed a connection, in brackets that begin with a slash."""
    reason = "RuntimeError: [/pytorch/gloo/pair.cc:598] Connection closed"
    (tmp_path / "rank_0.json").write_text(json.dumps(note_of(reason=reason)))
    with pytest.raises(DataError, match="was no optimiser step"):
        main(ReplayConfig(capsule=tmp_path), [])
    assert "[/pytorch/gloo" in capsys.readouterr().out


def test_a_full_disk_does_not_hide_why_there_should_be_a_capsule(tmp_path: Path) -> None:
    (tmp_path / "capsules").write_text("a file stands for a disk that refuses")
    (said,) = run_ranks(say, 1, str(tmp_path))
    assert said.startswith(f"no capsule was left, since {tmp_path}/capsules/step_00000000 cannot be written (")


def say(run_dir: str) -> str:
    return leave_capsule(Path(run_dir), "a reason", start(ParallelLayout(), seed=1))
