"""A lock of this machine's: who holds it is named, and nobody dead holds one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megarlhf.errors import ConfigError
from megarlhf.observe.lock import check_free, held

HOLDER = """
import sys, time
from pathlib import Path
from megarlhf.observe.lock import held
with held(Path(sys.argv[1]), "run_dir=x", "run_dir"):
    print("held", flush=True)
    time.sleep(600)
"""


def take(lock: Path) -> None:
    with held(lock, "run_dir=x", "run_dir"):
        pass


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_holder_is_named_and_leaves_nothing_when_it_is_killed(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    lock = tmp_path / "lock"
    said = (
        rf"^run_dir=x is in use: process {holder.pid} on {re.escape(socket.gethostname())} writes there since "
        rf"20[\d-]+T[\d:]+Z \({lock}\); wait for it or stop it, or choose another run_dir\.$"
    )
    for refused in (take, lambda path: check_free(path, "run_dir=x", "run_dir")):
        with pytest.raises(ConfigError, match=said):
            refused(lock)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock.read_text().split()[1] == str(holder.pid)  # a stale file stops nobody
    take(lock)
    assert not lock.exists()


def test_a_holder_on_another_host_is_named_with_what_to_do(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    lock = tmp_path / "lock"
    lock.write_text("node03 4711 2026-11-28T09:50:12Z\n")
    with pytest.raises(ConfigError, match=rf"process 4711 on node03 .*If node03 is down, remove {lock}\.$"):
        take(lock)
    lock.write_text("no \x1b[31m words")
    with pytest.raises(ConfigError, match=r"^run_dir=x is in use by another process \("):
        take(lock)
    lock.unlink()  # the remedy
    take(lock)
    holder.kill()
    holder.wait()


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Writers of states are forked, and may outlive a rank that is killed."""
    lock, (begin, end) = tmp_path / "lock", os.pipe()
    with held(lock, "run_dir=x", "run_dir"):
        child = os.fork()
        if not child:
            os.read(begin, 1)
            os._exit(0)
        with pytest.raises(ConfigError, match="is in use"):
            take(lock)
    take(lock)
    os.write(end, b".")
    os.waitpid(child, 0)
    os.close(begin)
    os.close(end)
