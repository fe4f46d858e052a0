"""examples/launch/torchrun_hosts.sh: two hosts, which are this machine, reached by what stands for ssh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "launch" / "torchrun_hosts.sh"
SFT = (
    *("sft", "run_dir=run", "model=tiny-xs", "tokenizer=arithmetic", "data.source=arithmetic", "data.template=plain"),
    *("data.arithmetic.rows=16", "global_batch=8", "micro_batch=4", "epochs=1", "layout.data=2"),
)


def started(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    ssh = folder / "ssh"
    ssh.write_text('#!/bin/bash\nshift\nexec bash -c "$*"\n')  # as ssh gives a remote shell its words
    ssh.chmod(0o755)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "PYTHON": sys.executable}
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "SLURM_"))}
    return subprocess.run(
        [SCRIPT, *words],
        cwd=folder,
        env={**own, **paths, "SSH": str(ssh), "RANKS_PER_NODE": "1", **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_two_hosts_are_one_run(tmp_path: Path) -> None:
    done = started(tmp_path, *SFT, HOSTS="localhost 127.0.0.1")
    logs = "".join(path.read_text() for path in tmp_path.glob("logs/*/node_*.log"))
    assert done.returncode == 0, done.stderr + logs
    assert "2 hosts, rank 0 on localhost" in done.stdout
    assert (tmp_path / "run" / "model" / "model.json").is_file()


def test_what_fails_there_fails_here(tmp_path: Path) -> None:
    done = started(tmp_path, *SFT, "layout.data=3", HOSTS="localhost 127.0.0.1")
    assert done.returncode == 2
    (log, _) = sorted(tmp_path.glob("logs/*/node_*.log"))
    assert "layout needs 3 ranks" in log.read_text()


def test_without_hosts_it_says_how_it_is_used(tmp_path: Path) -> None:
    done = started(tmp_path, *SFT, HOSTS="")
    assert done.returncode == 2
    assert done.stderr.startswith('usage: HOSTS="node1 node2" torchrun_hosts.sh COMMAND')
