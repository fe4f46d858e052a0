"""torchrun as the launch scripts use it: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import run

from megarlhf.parallel import torchrun

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import os, signal, sys, time
from pathlib import Path
rank = os.environ["RANK"]
def save(number, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's own, once the first rank has ended
    time.sleep(2 * int(rank))  # one saves for longer than the other
    Path(f"saved_{rank}").touch()
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
Path(f"rank_{rank}").touch()
if sys.argv[1] == "fails" and rank == "1":
    sys.exit(3)
if sys.argv[1] == "dies" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0 if sys.argv[1] == "ends" else 60)
"""


def started(folder: Path, behaviour: str) -> subprocess.Popen[bytes]:
    (folder / "rank.py").write_text(RANK)
    words = ["-m", "megarlhf.parallel.torchrun", "--standalone", "--nproc-per-node=2", "rank.py", behaviour]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_ranks_hear_the_signal_and_have_the_time_to_save(number: signal.Signals, tmp_path: Path) -> None:
    process = started(tmp_path, "waits")
    deadline = time.monotonic() + 100
    while len(list(tmp_path.glob("rank_*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(100) == 75
    assert {path.name for path in tmp_path.glob("saved_*")} == {"saved_0", "saved_1"}


@pytest.mark.parametrize(("behaviour", "code"), [("ends", 0), ("fails", 3), ("dies", 128 + signal.SIGKILL)])
def test_the_code_is_that_of_the_first_rank_that_ended(behaviour: str, code: int, tmp_path: Path) -> None:
    assert started(tmp_path, behaviour).wait(100) == code


def test_a_task_of_slurm_knows_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(run, "main", asked.append)
    monkeypatch.setattr(torchrun, "HANDED_ON", ())
    monkeypatch.setenv("SLURM_NODEID", "3")
    assert torchrun.main(["--nnodes=4", "x.py"]) == 0
    assert torchrun.main(["--node_rank=1", "x.py"]) == 0
    monkeypatch.delenv("SLURM_NODEID")
    assert torchrun.main(["x.py"]) == 0
    own = f"--signals_to_handle={torchrun.OWN}"
    assert asked == [[own, "--node-rank=3", "--nnodes=4", "x.py"], [own, "--node_rank=1", "x.py"], [own, "x.py"]]
