"""What failed runs leave behind, and steps taken again from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.batch import Experience, Prompts, TokenBatch
from megarlhf.errors import DataError, TrainingError
from megarlhf.models.role import TrainableRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.pipeline import Loss
from megarlhf.trainers import sft
from megarlhf.trainers.capsule import read_batch, read_notes, tensors_of, texts_of, write_capsule
from megarlhf.trainers.replay import ReplayConfig, main
from megarlhf.trainers.sft import SftConfig
from tests.helpers.ranks import run_ranks
from tests.trainers.test_killed import config
from tests.trainers.test_splits import experience

LAYOUT = ParallelLayout(data=2)


def prompts() -> Prompts:
    return Prompts(torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 2]), torch.tensor([7, 9]), ("five", "é"))


def write_batches(run_dir: str) -> list[dict[str, Any]]:
    """Each kind of batch, written and read again by its rank."""
    mesh = start(ParallelLayout(), seed=1)
    differences = []
    for step, batch in enumerate((experience(3), prompts())):
        mesh.trail.step, mesh.trail.work = step, batch
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
    assert [one["kind"] for one in found] == [Experience.__name__, Prompts.__name__]
    for one in found:
        assert one["equal"]
        for ours, theirs in (one["names"], one["texts"]):
            assert ours == theirs
    assert found[1]["texts"][0] == {"answers": ["five", "é"]}
    assert "rollout.tokens" in found[0]["names"][0]


def explode(cfg: SftConfig) -> str:
    """A learning rate that no model survives."""
    with pytest.raises(TrainingError) as failed:
        sft.train(cfg, sft.prepare(cfg), ["sft"], mesh=start(cfg.layout, seed=1))
    return str(failed.value)


def replay(capsule: str) -> tuple[int, str]:
    """The exit code, and what is printed."""
    with redirect_stdout(StringIO()) as printed:
        code = main(ReplayConfig(capsule=Path(capsule)), [])
    return code, printed.getvalue()


def test_an_exploding_step_is_taken_again_on_one_rank(tmp_path: Path) -> None:
    changes = {"optim": {"lr": 1e30}, "max_skipped_steps": 0, "save_every": 0, "keep_best": ""}
    said = run_ranks(explode, 2, config(tmp_path, **changes))
    capsule = tmp_path / "capsules" / "step_00000001"
    assert f"megarlhf replay capsule={capsule} takes the step again" in said[0]
    notes = read_notes(capsule)
    assert [(note.rank, note.data_rank, note.kind) for note in notes] == [(0, 0, "TokenBatch"), (1, 1, "TokenBatch")]
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
            sft.train(cfg, sft.prepare(cfg), ["sft"], mesh=mesh)
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
    assert f"what the others did is in {capsule}" in said[0]
    assert read_notes(capsule)[0].rank == 0
    assert not list((tmp_path / "ranks").iterdir())


def fail(cfg: SftConfig) -> str:
    """Rank 1 raises in its third step; the other hears of it in a collective, or times out."""
    mesh = start(cfg.layout, seed=1, timeout_s=cfg.timeout_s)
    with spoilt_step(3, lambda: 1 / 0), pytest.raises((ArithmeticError, RuntimeError, TrainingError)) as failed:
        sft.train(cfg, sft.prepare(cfg), ["sft"], mesh=mesh)
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
