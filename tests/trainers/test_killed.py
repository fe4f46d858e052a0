"""A run survives `kill -9` of any rank at any moment, and signals and time limits that let it save first."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.checkpoint.training_state import latest_state
from megarlhf.errors import RunStopped
from megarlhf.models.role import LabelLogprobs
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers import sft
from megarlhf.trainers.sft import SftConfig
from tests.helpers.ranks import run_ranks
from tests.models.worlds import frozen, whole_weights
from tests.trainers.test_resume import logged_lines

KILLS = 20
STEPS = 60
LAYOUT = ParallelLayout(data=2)


def config(run_dir: Path, layout: ParallelLayout = LAYOUT, **changes: Any) -> SftConfig:
    """Small steps, of which almost each is saved, so that most moments are in the middle of something."""
    settings: dict[str, Any] = {
        "run_dir": run_dir,
        "model": "tiny-xs",
        "tokenizer": "arithmetic",
        "layout": layout,
        "data": {"template": "plain", "arithmetic": {"level": 1, "rows": 8 * STEPS}},
        "global_batch": 8,
        "micro_batch": 4,
        "optim": {"lr": 1e-3},
        "save_every": 2,
        "keep_best": "-sft/loss",
        "tensorboard": False,
        "timeout_s": 60,
        **changes,
    }
    return SftConfig.model_validate(settings)


def train(cfg: SftConfig) -> None:
    sft.train(cfg, sft.prepare(cfg), [], mesh=start(cfg.layout, seed=cfg.seed, timeout_s=cfg.timeout_s))


def train_as(rank: int, port: int, cfg: SftConfig) -> None:
    """One rank of a run, leader of a session as the launcher makes it."""
    os.setsid()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    train(cfg)


def started(cfg: SftConfig) -> list[BaseProcess]:
    """Both ranks, forked off a server that has imported everything: a start costs little."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megarlhf.trainers.sft", "tests.trainers.test_killed"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: list[BaseProcess] = [context.Process(target=train_as, args=(rank, port, cfg)) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def end(ranks: list[BaseProcess]) -> None:
    """What the launcher does when a rank is gone: end the others, and all that they have started."""
    for process in ranks:
        assert process.pid is not None
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()  # not yet the leader of a session, or gone
        process.join()


def wait_until(condition: Callable[[], bool], ranks: list[BaseProcess]) -> None:
    """Until something is there, or a rank has left."""
    deadline = time.monotonic() + 120
    while not condition() and all(process.is_alive() for process in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.002)


def lines(run_dir: Path) -> int:
    log = run_dir / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def weights(directory: str) -> dict[str, torch.Tensor]:
    return whole_weights(frozen(directory, LabelLogprobs(1.0), start(ParallelLayout(), seed=1)))


def assert_same_end(one: Path, other: Path) -> None:
    assert logged_lines(one) == logged_lines(other)
    ours, theirs = (run_ranks(weights, 1, str(run_dir / "model"))[0] for run_dir in (one, other))
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has stopped."""
    run_dir = tmp_path_factory.mktemp("whole")
    run_ranks(train, 2, config(run_dir, save_every=0, keep_best=""))
    return run_dir


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_change_nothing(whole: Path, tmp_path: Path) -> None:
    """Some while a state is being written, some between steps, some before the first step after a resume."""
    chance = random.Random(7)
    states, writing = tmp_path / "checkpoints", 0
    for kill in range(KILLS):
        ranks = started(config(tmp_path))
        if kill % 2:  # in the middle of a save
            wait_until(lambda: any(states.glob("step_*.partial")), ranks)
        else:
            until = lines(tmp_path) + chance.randrange(1, 3)
            wait_until(lambda until=until: lines(tmp_path) >= until, ranks)
        time.sleep(chance.random() * 0.03)
        writing += any(states.glob("step_*.partial"))
        victim = ranks[chance.randrange(2)]
        assert victim.is_alive(), "the run ended before it was killed; lengthen it"
        victim.kill()
        end(ranks)
    assert writing >= 5
    assert not (tmp_path / "model").exists()
    ranks = started(config(tmp_path))
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    assert_same_end(tmp_path, whole)


def stop_softly(cfg: SftConfig, number: int, after: int) -> str:
    """Train; this rank signals itself in the step after `after`, if it is rank 1."""
    mesh = start(cfg.layout, seed=cfg.seed)
    next_token_loss = sft.next_token_loss
    calls = 0

    def loss_with_a_signal(role: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after + 1 and mesh.rank == 1:
            os.kill(os.getpid(), number)
        return next_token_loss(role)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft, "next_token_loss", loss_with_a_signal)
        with pytest.raises(RunStopped) as stopped:
            sft.train(cfg, sft.prepare(cfg), [], mesh=mesh)
    return str(stopped.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_after_the_step(number: signal.Signals, whole: Path, tmp_path: Path) -> None:
    cfg = config(tmp_path, save_every=1000, keep_best="")
    said = run_ranks(stop_softly, 2, cfg, number, 4)
    assert said[0] == said[1]
    assert said[0].startswith(f"stopped by {number.name} after step 5; its state is in ")
    state = latest_state(tmp_path / "checkpoints")
    assert state is not None
    assert state.name == "step_00000005"
    run_ranks(train, 2, cfg)
    assert_same_end(tmp_path, whole)


def stop_in_time(cfg: SftConfig) -> str:
    with pytest.raises(RunStopped) as stopped:
        train(cfg)
    return str(stopped.value)


def test_the_time_limit_saves_before_it_is_over(tmp_path: Path) -> None:
    """The rank processes of the tests have been up for longer than a second: the first step is the last."""
    said = run_ranks(stop_in_time, 2, config(tmp_path, save_before=1.0, save_every=1000, keep_best=""))
    assert said[0].startswith("stopped by save_before after step 1;")
    assert latest_state(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_00000001"
