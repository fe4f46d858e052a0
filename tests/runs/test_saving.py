"""Which states stay, what is refused on the way back, and what a full disk does: the state before always stands."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megarlhf.checkpoint.checksums import CHECKSUMS
from megarlhf.checkpoint.disk import ROOM
from megarlhf.checkpoint.state_writer import Retention, StateWriter, saved_bytes
from megarlhf.checkpoint.training_state import STATE, Best, Position, latest_state, load_state
from megarlhf.errors import CheckpointError, ConfigError, OutputError, TrainingError
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import TrainableRole
from megarlhf.parallel.collectives import all_reduce
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh, start
from megarlhf.runs.guard import StepGuard
from megarlhf.runs.loop import Run, better
from megarlhf.trainers import ppo, reward, sft
from megarlhf.trainers.ppo import PPOConfig
from megarlhf.trainers.reward import RewardConfig
from megarlhf.trainers.sft import SftConfig
from tests.helpers.disks import no_file_beyond
from tests.helpers.models import language_model, learner, name_of, settings
from tests.helpers.ranks import run_ranks
from tests.runs.test_resume import ppo_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    language_model(directory, seed=4)
    return str(directory)


def the_role(model: str, mesh: Mesh, **optim: Any) -> TrainableRole:
    return learner(model, LabelLogprobs(1.0), settings(mesh, 2), mesh, OptimConfig(**optim))


def writer_of(role: TrainableRole, where: Path, last: int = 1) -> StateWriter:
    return StateWriter(where, {"actor": role}, {}, Retention(last=last, every=0), role.mesh)


def at(step: int, best: Best | None = None) -> Position:
    return Position(step=step, parts={}, skipped_steps=0, bytes_written={}, best=best)


@pytest.mark.parametrize(
    ("last", "every", "best", "kept"),
    [(1, 0, None, {60}), (2, 0, 20, {20, 50, 60}), (1, 30, None, {30, 60}), (2, 20, 10, {10, 20, 40, 50, 60})],
)
def test_retention(last: int, every: int, best: int | None, kept: set[int]) -> None:
    assert Retention(last, every).keeps([10, 60, 20, 50, 30, 40], best) == kept


def test_the_best_step_by_a_metric() -> None:
    steps = [{"sft/loss": value} for value in (math.nan, 2.0, 1.0, math.nan, 1.0, 3.0)]
    best, lowest = None, None
    for index, metrics in enumerate(steps):
        best, lowest = better(best, "sft/loss", index, metrics), better(lowest, "-sft/loss", index, metrics)
    assert best == Best(step=5, value=3.0, metric="sft/loss")
    assert lowest == Best(step=2, value=1.0, metric="-sft/loss")  # the first of two that are equally good
    assert better(None, "", 1, steps[1]) is None
    assert better(best, "-policy/loss", 6, steps[1]) == best  # which a step without the actor does not log


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"save_every": 4, "keep_every": 6}, "keep_every=6 is not a multiple of save_every=4"),
        ({"save_every": 0, "keep_every": 6}, "keep_every=6 is not a multiple of save_every=0"),
        ({"save_every": 0, "save_before": 60.0}, "save_before=60 with save_every=0"),
    ],
)
def test_contradicting_settings_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ppo_settings(tmp_path / "run", ParallelLayout(), "unused", **changes).check_run_dir()


ROWS = {"template": "plain", "arithmetic": {"level": 1, "rows": 20}}
MODEL = {"model": "tiny-xs", "tokenizer": "arithmetic"}
BY = [
    (SftConfig, sft.prepare, {**MODEL, "data": ROWS, "global_batch": 8, "micro_batch": 4}, "-sft/loss", "reward/auc"),
    (RewardConfig, reward.prepare, {**MODEL, "pairs": ROWS, "pairs_batch": 8}, "reward/pair_accuracy", "reward/auc"),
    (RewardConfig, reward.prepare, {**MODEL, "pairs": ROWS, "pairs_batch": 8}, "-reward/loss", "reward/accuracy"),
    (PPOConfig, ppo.TRAINER.prepare, {"verifier": "none"}, "rollout/score_mean", "rollout/accuracy"),
    (PPOConfig, ppo.TRAINER.prepare, {"verifier": "arithmetic"}, "rollout/accuracy", "rollout/scores"),
    (PPOConfig, ppo.TRAINER.prepare, {"verifier": "arithmetic"}, "-kl/reference_mean", "sft/loss"),
]


@pytest.mark.parametrize(("kind", "prepare", "changes", "by", "never"), BY)
def test_a_metric_that_the_run_does_not_log_is_no_measure_of_the_best(
    kind: Any, prepare: Any, changes: dict[str, Any], by: str, never: str, tmp_path: Path
) -> None:
    """Said before anything is built: at the first save it would cost the steps until then."""

    def settings(keep_best: str) -> Any:
        if kind is PPOConfig:
            judge = {"reward": {"init": "tiny-xs"}, "actor": {"init": "tiny-xs"}}
            return ppo_settings(tmp_path / "run", ParallelLayout(), "unused", **judge, **changes, keep_best=keep_best)
        return kind.model_validate({"run_dir": tmp_path / "run", **changes, "keep_best": keep_best})

    prepare(settings(by))
    with pytest.raises(ConfigError, match=f"keep_best={never} is not logged by this run; choose one of .*{by[-5:]}"):
        prepare(settings(never))


def save_five(model: str, where: str) -> list[str]:
    """Returns the processes that are left of it."""
    role = the_role(model, start(ParallelLayout(data=2), seed=1))
    writer = StateWriter(Path(where), {"actor": role}, {}, Retention(last=1, every=2), role.mesh)
    for step in range(1, 6):
        writer.start(at(step, Best(step=min(step, 3), value=1.0, metric="sft/loss")))
    writer.finish()
    return [child.name() for child in psutil.Process().children(recursive=True)]


def test_last_milestones_and_best_stay(model: str, tmp_path: Path) -> None:
    # Megarlhf has no use for a process beside the rank: Megatron-Core's takes 268 MiB and outlives it.
    assert run_ranks(save_five, 2, model, str(tmp_path)) == [[], []]
    assert sorted(path.name[-1] for path in tmp_path.glob("step_*")) == ["2", "3", "4", "5"]
    assert (tmp_path / "latest").read_text() == "step_00000005\n"
    assert (tmp_path / "best").read_text() == "step_00000003\n"


def room_and_size(model: str, where: str, layout: ParallelLayout, distributed: bool) -> int:
    role = the_role(model, start(layout, seed=1), distributed=distributed)
    writer = writer_of(role, Path(where))
    save(writer, at(1))
    return int(all_reduce(torch.tensor(saved_bytes(role)), role.mesh, "world"))


@pytest.mark.parametrize("layout", [ParallelLayout(tensor=2), ParallelLayout(data=2)], ids=name_of)
@pytest.mark.parametrize("distributed", [True, False], ids=["sharded", "whole"])
def test_the_room_that_a_state_takes_is_known(layout: ParallelLayout, distributed: bool, tmp_path: Path) -> None:
    """fp32: weights, masters and two moments. Names and types come on top, little of a model of 1 M parameters."""
    language_model(tmp_path / "model", hidden_size=128, intermediate_size=256, vocab_size=2000)
    where = str(tmp_path / "states")
    counted = run_ranks(room_and_size, 2, str(tmp_path / "model"), where, layout, distributed)[0]
    size = sum(path.stat().st_size for path in (tmp_path / "states").rglob("*.distcp"))
    assert 0.9 * size <= counted
    assert size <= ROOM * counted


def load(model: str, where: str, layout: ParallelLayout) -> str:
    role = the_role(model, start(layout, seed=1))
    state = latest_state(Path(where))
    assert state is not None
    with pytest.raises(CheckpointError) as refused:
        load_state(state, {"actor": role})
    return str(refused.value)


def save_one(model: str, where: str) -> None:
    save(writer_of(the_role(model, start(ParallelLayout(data=2), seed=1)), Path(where)), at(1))


def test_a_changed_byte_in_any_file_is_found_by_every_rank(model: str, tmp_path: Path) -> None:
    run_ranks(save_one, 2, model, str(tmp_path / "whole"))
    files = sorted(path for path in (tmp_path / "whole").rglob("*") if path.is_file() and path.stat().st_size)
    assert len([path for path in files if path.suffix == ".distcp"]) >= 2
    for number, path in enumerate(files):
        if path.name in ("latest", CHECKSUMS):
            continue
        where = tmp_path / f"damaged_{number}"
        shutil.copytree(tmp_path / "whole", where)
        damaged = where / path.relative_to(tmp_path / "whole")
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 1
        damaged.write_bytes(content)
        for said in run_ranks(load, 2, model, str(where), ParallelLayout(data=2)):
            assert said.startswith(f"{damaged} was changed after it was saved; remove {where} to start afresh")
        if path.name == STATE:  # without it there is no state
            continue
        damaged.unlink()
        assert run_ranks(load, 2, model, str(where), ParallelLayout(data=2))[1].startswith(f"{damaged} is missing;")


def save_without_room(model: str, where: str, kind: str) -> str:
    """A whole state, then one that the disk has no room for."""
    role = the_role(model, start(ParallelLayout(data=2), seed=1))
    writer = writer_of(role, Path(where))
    save(writer, at(1))
    with no_room(where, kind), pytest.raises(OutputError) as refused:
        save(writer, at(2))
    return str(refused.value)


def save(writer: StateWriter, position: Position) -> None:
    writer.start(position)
    writer.finish()


@contextmanager
def no_room(where: str, kind: str) -> Iterator[None]:
    """A disk that says that it is full, or a quota that no file may grow beyond."""
    if kind == "known before":
        usage = shutil.disk_usage(where)._replace(free=1000)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: usage)
            yield
        return
    with no_file_beyond(20_000):
        yield


@pytest.mark.parametrize("kind", ["known before", "found while writing"])
def test_a_full_disk_leaves_the_state_before(kind: str, model: str, tmp_path: Path) -> None:
    said = run_ranks(save_without_room, 2, model, str(tmp_path), kind)
    expected = (
        "no room for a state (those before it stand): " if kind == "known before" else "see whether the disk is full"
    )
    assert expected in said[0]
    assert all("stand" in one for one in said)
    assert latest_state(tmp_path) == tmp_path / "step_00000001"
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000001"]


def leave_after_an_error(model: str, where: str) -> None:
    writer = writer_of(the_role(model, start(ParallelLayout(data=int(os.environ["WORLD_SIZE"])), seed=1)), Path(where))
    writer.start(at(1))
    writer.leave()


@pytest.mark.parametrize(("ranks", "left"), [(1, ["latest", "step_00000001"]), (2, [])])
def test_an_error_leaves_no_half_of_a_state(ranks: int, left: list[str], model: str, tmp_path: Path) -> None:
    """One rank alone can complete it; of several, others may be gone."""
    run_ranks(leave_after_an_error, ranks, model, str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == left


def save_weights_that_are_none(where: str, model: str) -> str:
    cfg = ppo_settings(Path(where), ParallelLayout(), "unused")
    role = the_role(model, start(ParallelLayout(), seed=1))
    run = Run(cfg, {"actor": role}, {}, {}, StepGuard(cfg.run_dir, 3, role.mesh), role.mesh)
    run.save(1, {})
    run.states.finish()
    next(iter(role.tensors("weights"))).view(-1)[0].fill_(math.nan)
    with pytest.raises(TrainingError) as refused:
        run.save(2, {})
    return str(refused.value)


def test_a_state_of_weights_that_are_not_finite_pushes_out_no_good_one(model: str, tmp_path: Path) -> None:
    said = run_ranks(save_weights_that_are_none, 1, str(tmp_path), model)[0]
    assert said.startswith("the learner after step 2 is not saved: 1 of its numbers are not finite; lower the learning")
    assert [path.name for path in (tmp_path / "checkpoints").glob("step_*")] == ["step_00000001"]


def save_where_a_file_is(model: str, where: str) -> str:
    writer = writer_of(the_role(model, start(ParallelLayout(data=2), seed=1)), Path(where))
    with pytest.raises(OutputError) as refused:
        writer.start(at(1))
    return str(refused.value)


def test_a_directory_that_cannot_be_made_is_said_on_every_rank(model: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    said = run_ranks(save_where_a_file_is, 2, model, str(tmp_path / "checkpoints"))
    assert "Not a directory" in said[0]
    assert said[1].endswith("(another rank says why); the states before it stand.")
