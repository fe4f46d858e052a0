"""A real Slurm on this machine: a controller and two node daemons on loopback, in a directory that is removed after."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

NODES = ("megarlhf-node1", "megarlhf-node2")
HOSTS = Path("/etc/hosts")
"""Has the names of the nodes while a cluster lives, for one calls the other by its name."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
SETTINGS = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/controller.pid
SlurmdPidFile={directory}/%n.pid
SlurmctldLogFile={directory}/controller.log
SlurmdLogFile={directory}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
KillWait=60
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000 Gres=gpu:8
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000 Gres=gpu:8
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """What keeps a Slurm from being started here; empty for nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=path()) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (make test-slurm installs slurm-wlm and munge where it may)"
    return "" if os.access(HOSTS, os.W_OK) else f"{HOSTS} cannot be written, which names the nodes"


def path() -> str:
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])


class Cluster:
    """The daemons, and what users of a cluster type."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))},
            "PATH": path(),
            "SLURM_CONF": str(directory / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            for each in (one, two, three):
                each.bind(("127.0.0.1", 0))
            ports = [each.getsockname()[1] for each in (one, two, three)]
        (self.directory / "state").mkdir()
        names = {"directory": self.directory, "host": socket.gethostname(), "user": getpass.getuser()}
        (self.directory / "slurm.conf").write_text(SETTINGS.format(**names, nodes=NODES, ports=ports))
        for gpu in range(8):
            (self.directory / f"gpu{gpu}").touch()
        (self.directory / "gres.conf").write_text(f"Name=gpu File={self.directory}/gpu[0-7]\n")
        key = self.directory / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        files = {"socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed"}
        options = [f"--{name}={self.directory / file}" for name, file in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", f"--key-file={key}", *options)
        wait_for((self.directory / "munge.socket").exists, "munged to listen")
        self._daemon("controller", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: self.said("sinfo", "-h", "-o", "%T").split() == ["idle"], "both nodes to be idle")

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """As where its power fails: the daemon and all that it started, at once."""
        daemon = psutil.Process(self.daemons.pop(node).pid)
        steps = [each for each in psutil.process_iter() if f"slurmd_node={node}" in self._of_node(each)]
        for each in [daemon, *steps]:
            with suppress(psutil.NoSuchProcess):
                each.kill()

    @staticmethod
    def _of_node(process: psutil.Process) -> str:
        """Of a process of a step, which node it is on."""
        with suppress(psutil.Error):
            return f"slurmd_node={process.environ().get('SLURMD_NODENAME', '')}"
        return ""

    def _daemon(self, name: str, *words: str) -> None:
        with (self.directory / f"{name}.out").open("wb") as out:
            self.daemons[name] = subprocess.Popen(
                words, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def run(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=120, check=False
        )

    def said(self, *words: str, cwd: Path | None = None) -> str:
        done = self.run(*words, cwd=cwd)
        return done.stdout if done.returncode == 0 else f"{done.stdout}{done.stderr}"

    def submit(self, *words: str, cwd: Path) -> str:
        """The number of the job."""
        done = self.run("sbatch", "--parsable", *words, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> Mapping[str, str]:
        """What the controller knows of a job."""
        words = self.said("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def ended(self, number: str, seconds: float) -> Mapping[str, str]:
        """Wait until a job has ended for good."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.job(number).get("JobState") in over, f"job {number} to end", seconds)
        return self.job(number)

    def stop(self) -> None:
        self.run("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full")
        for daemon in self.daemons.values():
            daemon.send_signal(signal.SIGTERM)
        for daemon in self.daemons.values():
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


@contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    made, before = Cluster(directory), HOSTS.read_text()
    HOSTS.write_text(f"{before.rstrip()}\n127.0.0.1 {' '.join(NODES)}\n")
    try:
        made.start()
        yield made
    finally:
        made.stop()
        HOSTS.write_text(before)


def wait_for(there: Callable[[], object], what: str | Callable[[], str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        late = time.monotonic() > deadline
        assert not late, f"waited {seconds:.0f} s for {what if isinstance(what, str) else what()}"
        time.sleep(0.5)
