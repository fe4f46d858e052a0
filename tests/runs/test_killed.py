"""A run survives `kill -9` of any rank at any moment, and signals and time limits that let it save first."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from megarlhf.checkpoint import state_writer
from megarlhf.checkpoint.training_state import latest_state
from megarlhf.errors import OutputError, RunStopped, TrainingError
from megarlhf.models.readings import LabelLogprobs
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runs.stopping import StopRequest
from megarlhf.trainers import sft
from megarlhf.trainers.sft import SftConfig
from tests.helpers.models import frozen, whole_weights
from tests.helpers.ranks import forking, run_ranks
from tests.runs.test_resume import logged_lines

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
    sft.TRAINER.run(cfg, sft.prepare(cfg), [], start(cfg.layout, seed=cfg.seed, timeout_s=cfg.timeout_s))


def train_as(rank: int, port: int, cfg: SftConfig) -> None:
    """One rank of a run, leader of a session as the launcher makes it."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, which these tests may run under, has it ignored
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    train(cfg)


def started(cfg: SftConfig) -> list[BaseProcess]:
    """Both ranks, forked off a server that has imported everything: a start costs little."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks: list[BaseProcess] = [forking().Process(target=train_as, args=(rank, port, cfg)) for rank in range(2)]
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
            sft.TRAINER.run(cfg, sft.prepare(cfg), [], mesh)
    return str(stopped.value)


@pytest.mark.parametrize(
    ("number", "every"), [pytest.param(signal.SIGTERM, 1000, marks=pytest.mark.slow), (signal.SIGUSR1, 0)]
)
def test_a_signal_to_one_rank_saves_after_the_step(
    number: signal.Signals, every: int, whole: Path, tmp_path: Path
) -> None:
    """Also where no state is asked for: the steps until then are not lost."""
    cfg = config(tmp_path, save_every=every, keep_best="")
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


def stop_without_room(cfg: SftConfig, number: int) -> str:
    """As `stop_softly`, but by then the disk is full."""
    full = shutil.disk_usage("/")._replace(free=1000)
    with pytest.MonkeyPatch.context() as patch:

        def fill(*args: Any) -> Any:
            patch.setattr(shutil, "disk_usage", lambda _: full)
            return loss(*args)

        loss = sft.next_token_loss
        patch.setattr(sft, "next_token_loss", signalled(fill, number))
        with pytest.raises(TrainingError) as stopped:
            train(cfg)
    assert stopped.value.exit_code == 1
    return str(stopped.value)


def signalled(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    def wrapper(*args: Any) -> Any:
        os.kill(os.getpid(), number)
        return function(*args)

    return wrapper


def test_a_stop_that_cannot_save_says_so(tmp_path: Path) -> None:
    said = run_ranks(stop_without_room, 1, config(tmp_path, ParallelLayout(), save_every=50), signal.SIGUSR1)[0]
    assert said.startswith("stopped by SIGUSR1 after step 1, whose state cannot be saved: ")
    assert "3.5 MiB are needed and 1,000 bytes are free" in said


def stops_asked_for(clock_jumps_s: float) -> list[str]:
    """What a run is asked after a step that was short, while somebody set the clock."""
    mesh = start(ParallelLayout(), seed=1)
    stop = StopRequest(3600 + time.time() - psutil.Process().create_time(), mesh)
    wall = time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: wall() + clock_jumps_s)
        return [stop.step_ended() for _ in range(3)]


@pytest.mark.parametrize("clock_jumps_s", [7200.0, -7200.0])
def test_a_clock_that_is_set_stops_nothing(clock_jumps_s: float) -> None:
    """Two hours later the hour would be over, and the longest step would have taken two."""
    assert run_ranks(stops_asked_for, 1, clock_jumps_s) == [["", "", ""]]


def train_in_a_group(cfg: SftConfig, write_s: float) -> None:
    """The only rank of a run, leader of a process group, whose states take a while to be written."""
    os.setsid()
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    torch.set_num_threads(1)
    leave_checksums = state_writer.leave_checksums

    def slow_checksums(directory: Path, rank: int) -> None:
        time.sleep(write_s)
        leave_checksums(directory, rank)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_writer, "leave_checksums", slow_checksums)
        try:
            train(cfg)
        except RunStopped as stopped:
            sys.exit(stopped.exit_code)


def begun(cfg: SftConfig, write_s: float) -> BaseProcess:
    process: BaseProcess = forking().Process(target=train_in_a_group, args=(cfg, write_s))
    process.start()
    return process


def left_of(group: int) -> list[str]:
    """What is there of a process group 10 seconds later, if anything."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        members = [one for one in psutil.process_iter(["status"]) if is_member(one, group)]
        if not members:
            return []
        time.sleep(0.05)
    return [" ".join(one.cmdline()) for one in members]


def is_member(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE
    except ProcessLookupError:
        return False


def writing(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("step_*.partial"))


def saved(run_dir: Path) -> bool:
    return (run_dir / "checkpoints" / "latest").exists()


def signal_group(moment: str, number: int, run_dir: Path, process: BaseProcess) -> None:
    """To every process of the group, as `timeout`, systemd and Slurm do, at a moment of the run's saves."""
    before = lines(run_dir)
    reached = {
        "before": lambda: lines(run_dir) > before,
        "during": lambda: lines(run_dir) > before and writing(run_dir),
        "after": lambda: lines(run_dir) > before + 2 and saved(run_dir) and not writing(run_dir),
    }[moment]
    wait_until(reached, [process])
    assert process.pid is not None
    os.killpg(process.pid, number)
    process.join(120)
    assert process.exitcode == RunStopped.exit_code, moment
    assert left_of(process.pid) == []


def stopped_and_gone_on(moment: str, number: int, run_dir: Path, times: int) -> None:
    """No step is lost or taken twice, however often the same command is stopped and started."""
    every = {"before": 10_000, "during": 1, "after": 6}[moment]
    rows = {"template": "plain", "arithmetic": {"level": 1, "rows": 8 * 1000}}
    cfg = config(run_dir, ParallelLayout(), save_every=every, keep_best="", data=rows)
    for _ in range(times):
        signal_group(moment, number, run_dir, begun(cfg, write_s=0.05 if moment == "during" else 0))
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    state = latest_state(run_dir / "checkpoints")
    assert state is not None
    assert state.name == f"step_{len(steps):08}"


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "number"), [("before", signal.SIGTERM), ("during", signal.SIGUSR1)])
def test_a_signal_to_the_whole_group_saves(moment: str, number: int, tmp_path: Path) -> None:
    stopped_and_gone_on(moment, number, tmp_path, times=2)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_ten_signals_to_the_whole_group_save(moment: str, number: int, tmp_path: Path) -> None:
    stopped_and_gone_on(moment, number, tmp_path, times=10)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_dead_rank_leaves_nobody_writing(number: int, tmp_path: Path) -> None:
    process = begun(config(tmp_path, ParallelLayout()), write_s=600)
    wait_until(lambda: writing(tmp_path), [process])
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == -number
    assert left_of(process.pid) == []


def test_a_killed_writer_ends_the_run(tmp_path: Path) -> None:
    """Its state is not whole, and no other comes of waiting; the one before stands."""
    process = begun(config(tmp_path, ParallelLayout()), write_s=600)
    wait_until(lambda: writing(tmp_path) and bool(psutil.Process(process.pid).children()), [process])
    for writer in psutil.Process(process.pid).children():
        writer.kill()
    process.join(120)
    assert process.exitcode == OutputError.exit_code
    assert not saved(tmp_path)
