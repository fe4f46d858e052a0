"""Starting ranks, and what the user hears when one of them dies: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megarlhf.errors import LayoutError
from megarlhf.parallel import launch
from megarlhf.parallel.layout import ParallelLayout
from tests.helpers.started import heeding_ctrl_c

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
MARK = "MEGARLHF_TEST_MARK"
RANKED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def marked() -> Iterator[dict[str, str]]:
    """An environment that marks every process started with it; at the end of a test none of them is left."""
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if name not in RANKED}
    yield {**environment, MARK: mark, "OMP_NUM_THREADS": "1"}
    left = list(marked_processes(mark))
    for process in left:
        process.kill()
    assert not left, [process.cmdline() for process in left]


def marked_processes(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter(["environ", "status"]):
        ended = process.info["status"] == psutil.STATUS_ZOMBIE
        if not ended and (process.info["environ"] or {}).get(MARK) == mark:
            yield process


def started(behaviour: str, directory: Path, environment: dict[str, str], *launcher: str) -> subprocess.Popen[str]:
    command = launcher or ("-m", "tests.helpers.launched")
    with heeding_ctrl_c():
        return subprocess.Popen(
            [sys.executable, *command, behaviour, "2", str(directory)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def wait_for_ranks(directory: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not all((directory / f"rank_{rank}").exists() for rank in range(2)):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)


def test_ranks_start_and_only_the_first_one_speaks(tmp_path: Path, marked: dict[str, str]) -> None:
    # 1 + 2 = 3: both ranks were there, each with its own number.
    assert finished(started("works", tmp_path, marked)) == (0, "rank 0 sums to 3.0\n", "")


def test_bad_input_is_found_before_ranks_start(tmp_path: Path, marked: dict[str, str]) -> None:
    assert finished(started("bad_before", tmp_path, marked)) == (2, "", "found before ranks: 1 fault; mend it.\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_exception_takes_the_run_down_with_its_traceback_alone(tmp_path: Path, marked: dict[str, str]) -> None:
    process = started("raises", tmp_path, marked)
    wait_for_ranks(tmp_path)
    failed = time.monotonic()
    code, out, err = finished(process)
    assert time.monotonic() - failed < 30
    assert (code, out) == (1, "")
    assert err.startswith("rank 1 failed:\nTraceback (most recent call last):\n")
    assert err.rstrip().endswith("ArithmeticError: the cause")
    assert err.count("Traceback") == 1
    assert "rank 0" not in err


@pytest.mark.parametrize(
    ("behaviour", "code", "message"),
    [
        pytest.param("all_bad", 2, "found in ranks: 2 faults; mend them.\n", marks=pytest.mark.slow),
        pytest.param("stops", 1, "10 steps were skipped; lower the rate.\n", marks=pytest.mark.slow),
    ],
)
def test_errors_with_a_remedy_are_said_once_without_a_traceback(
    behaviour: str, code: int, message: str, tmp_path: Path, marked: dict[str, str]
) -> None:
    assert finished(started(behaviour, tmp_path, marked)) == (code, "", message)


@pytest.mark.slow
def test_a_killed_rank_is_named_and_what_it_started_ends_too(tmp_path: Path, marked: dict[str, str]) -> None:
    code, out, err = finished(started("killed", tmp_path, marked))
    assert (code, out) == (1, "")
    message = "rank 1 was killed by SIGKILL (often the system is out of memory); the other ranks were stopped.\n"
    assert err.endswith(message)
    assert "Traceback" not in err
    assert "rank 0" not in err


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        pytest.param("aborts", "rank 1 was killed by SIGABRT", marks=pytest.mark.slow),
        pytest.param("exits", "rank 1 ended with exit code 3", marks=pytest.mark.slow),
    ],
)
def test_a_crash_is_reported_with_the_last_words(
    behaviour: str, said: str, tmp_path: Path, marked: dict[str, str]
) -> None:
    code, _, err = finished(started(behaviour, tmp_path, marked))
    assert code == 1
    assert err.endswith(f"last words\n{said}; the other ranks were stopped.\n")
    assert "rank 0" not in err


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [("SIGINT", 130, "interrupted\n"), pytest.param("SIGTERM", 143, "stopped", marks=pytest.mark.slow)],
)
def test_a_stopped_run_ends_cleanly(number: str, code: int, said: str, tmp_path: Path, marked: dict[str, str]) -> None:
    # As on a cluster, whose ranks are on many machines: it must not matter here.
    process = started("hangs", tmp_path, {**marked, "GLOO_SOCKET_IFNAME": "eth0"})
    wait_for_ranks(tmp_path)
    time.sleep(0.5)  # let rank 0 enter the collective that rank 1 never joins
    assert_on_loopback(marked[MARK])
    process.send_signal(signal.Signals[number])
    status, out, err = finished(process)
    assert (status, out) == (code, "")
    assert err.startswith(said)
    assert err.count("\n") == 1


def assert_on_loopback(mark: str) -> None:
    """No other machine reaches a run of this one, whatever interface the user named for runs on many."""
    processes = list(marked_processes(mark))
    assert len(processes) == 3  # the launcher and two ranks
    sockets = [(p, s) for p in processes for s in p.net_connections("inet") if s.status == psutil.CONN_LISTEN]
    assert sockets, "the ranks talk to each other over something"
    assert {socket.laddr.ip for _, socket in sockets} == {"127.0.0.1"}
    # The process that started the ranks, and may have other rights, hears nobody.
    assert {process.environ().get("RANK") for process, _ in sockets} == {"0", "1"}


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path, marked: dict[str, str]) -> None:
    process = started("hangs", tmp_path, marked)
    wait_for_ranks(tmp_path)
    process.kill()
    assert finished(process)[0] == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while any(marked_processes(marked[MARK])) and time.monotonic() < deadline:
        time.sleep(0.1)
    # `marked` finds what is left


@pytest.mark.slow
def test_under_torchrun_the_cause_speaks_and_the_others_do_not(tmp_path: Path, marked: dict[str, str]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tests.helpers.launched")
    code, _, err = finished(started("raises", tmp_path, marked, *torchrun))
    assert code == 1
    assert err.count("ArithmeticError: the cause\nwhat follows is torchrun's own report\n") == 1
    assert "rank 0 failed" not in err


def test_ranks_of_one_machine_say_the_same_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those of another machine of the job say it once more: each has a screen of its own."""
    monkeypatch.setattr(launch, "COURTESY_S", 1.0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("SLURM_JOB_ID", uuid.uuid4().hex)
    for node in ("0", "1"):
        monkeypatch.setenv("SLURM_NODEID", node)
        ranks = [threading.Thread(target=launch._say_once, args=["one fault; mend it."]) for _ in range(2)]
        for rank in ranks:
            rank.start()
            time.sleep(0.2)  # their environment is this process's
        for rank in ranks:
            rank.join()
    assert capfd.readouterr().err == "one fault; mend it.\n" * 2


@pytest.mark.parametrize(("ranks", "layout"), [(3, ParallelLayout(data=2)), (2, ParallelLayout(tensor=2, data=2))])
def test_ranks_that_do_not_match_the_layout_are_refused_before_anything_is_read(
    ranks: int, layout: ParallelLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(LayoutError, match=rf"needs {layout.world_size} ranks .* but {ranks} were started; .* start"):
        launch.run(lambda: pytest.fail("prepared"), print, layout, ["ppo"])


@pytest.mark.parametrize(
    ("words", "argv", "command"),
    [
        (["/venv/bin/megarlhf", "ppo", "seed=2"], ["ppo", "seed=2"], ["-m", "megarlhf.cli", "ppo", "seed=2"]),
        (["my_ppo.py", "seed=2"], ["ppo", "seed=2"], ["-W", "error", "my_ppo.py", "seed=2"]),
        (["my_ppo.py"], ["my_ppo.py"], ["-W", "error", "my_ppo.py"]),
        (["pytest", "-q"], ["ppo", "seed=2"], ["-m", "megarlhf.cli", "ppo", "seed=2"]),
        (["pytest"], ["ppo", "seed=2"], ["-m", "megarlhf.cli", "ppo", "seed=2"]),
    ],
)
def test_ranks_run_the_program_that_the_user_ran(
    words: list[str], argv: list[str], command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-W", "error", *words])
    assert launch._program(argv) == command


def test_one_rank_is_heard_by_no_other_machine() -> None:
    """Whatever interface the user named for runs on many."""
    code = (
        "import psutil; from megarlhf.parallel.layout import ParallelLayout; from megarlhf.parallel.mesh import start\n"
        "start(ParallelLayout(), seed=1); connections = psutil.Process().net_connections('inet')\n"
        "print({each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN})"
    )
    environment = {name: value for name, value in os.environ.items() if name not in RANKED}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "GLOO_SOCKET_IFNAME": "eth0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "{'127.0.0.1'}\n", done.stderr


def test_one_rank_needs_no_process() -> None:
    seen = []
    assert launch.run(lambda: 5, seen.append, ParallelLayout(), ["ppo"]) == 0
    assert seen == [5]


SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "node[03-04]",
}


def test_a_task_of_srun_becomes_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    environment = adopted(monkeypatch)
    assert environment == {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node03",
        "MASTER_PORT": "23456",
    }


def test_a_batch_script_itself_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    # Slurm gives it the number of a task that does not exist: waiting for 15 others would never end.
    for name, value in {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert adopted(monkeypatch) == {}


def adopted(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in RANKED}
    monkeypatch.setattr(os, "environ", environment)
    launch._adopt_slurm()
    return {name: value for name, value in environment.items() if name in RANKED}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu-a", "gpu-a"),
        ("n1,n2", "n1"),
        ("node[003,7-9],x", "node003"),
        ("r[1-2]-ib,z", "r1-ib"),
        ("a-b-[10]", "a-b-10"),
    ],
)
def test_the_first_host_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert launch._first_host(nodes) == first
