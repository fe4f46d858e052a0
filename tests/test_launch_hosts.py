"""examples/launch/torchrun_hosts.sh: two hosts, which are this machine, reached by what stands for ssh."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.slurm import wait_for

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "launch" / "torchrun_hosts.sh"
SFT = (
    *("sft", "run_dir=run", "model=tiny-xs", "tokenizer=arithmetic", "data.source=arithmetic", "data.template=plain"),
    *("data.arithmetic.rows=16", "global_batch=8", "micro_batch=4", "epochs=1", "layout.data=2"),
)


def script(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    ssh = folder / "ssh"
    ssh.write_text('#!/bin/bash\nshift\nexec bash -c "$*"\n')  # as ssh gives a remote shell its words
    ssh.chmod(0o755)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "PYTHON": sys.executable}
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "SLURM_"))}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return subprocess.Popen(
        [SCRIPT, *words],
        cwd=folder,
        env={**own, **paths, "SSH": str(ssh), "RANKS_PER_NODE": "1", "MASTER_PORT": port, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def started(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    process = script(folder, *words, **variables)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def logs(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("logs/*/node_*.log"))


def test_two_hosts_are_one_run(tmp_path: Path) -> None:
    done = started(tmp_path, *SFT, HOSTS="localhost 127.0.0.1")
    assert done.returncode == 0, done.stderr + logs(tmp_path)
    assert "2 hosts, rank 0 on localhost" in done.stdout
    assert (tmp_path / "run" / "model" / "model.json").is_file()


def test_what_fails_there_fails_here(tmp_path: Path) -> None:
    done = started(tmp_path, *SFT, "layout.data=3", HOSTS="localhost 127.0.0.1")
    assert done.returncode == 2
    (log, _) = sorted(tmp_path.glob("logs/*/node_*.log"))
    assert "layout needs 3 ranks" in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_where_the_script_ends_the_run_saves_on_every_host(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C is trapped as SIGTERM is; where tests run in the background, programs have it ignored."""
    process = script(tmp_path, *SFT, "epochs=500", "save_every=1000", HOSTS="localhost 127.0.0.1")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size, lambda: f"the first step:\n{logs(tmp_path)}", 180)
    process.send_signal(number)  # to the script alone: what it started is on hosts
    process.communicate(timeout=120)
    wait_for(lambda: "the same command goes on" in logs(tmp_path), lambda: f"a save:\n{logs(tmp_path)}", 60)
    assert logs(tmp_path).count("stopped by SIGTERM after step") == 1
    assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_without_hosts_it_says_how_it_is_used(tmp_path: Path) -> None:
    done = started(tmp_path, *SFT, HOSTS="")
    assert done.returncode == 2
    assert done.stderr.startswith('usage: HOSTS="node1 node2" torchrun_hosts.sh COMMAND')
