"""Runs generated Python programs apart from everything else.

What it does not protect from:

* A hole in the kernel, in bubblewrap, or in the processor (side channels): programs share the kernel with this process.
  Who expects an attacker, rather than a policy that tries things, gives the judge a machine of its own.
* Slowness: the programs of all workers compute, and fill memory, up to their limits, beside what else the node does.
  `memory_mb` and `cpu_s` are of each process, so that a program has up to `processes` times as much; what the kernel
  keeps for it (pipes, sockets, names of files) counts in none. There is no control group.
* Eyes on what is shown to it: all of /usr, and the interpreter's own directory. This process's directory and home are
  left out of these, unless the interpreter lies in them.
* What is done with its output: that is the program's, every byte of it.

What a program sees is /usr, /lib*, the loader's files of /etc, the interpreter, five devices, and an empty directory
/tmp that is its alone, kept in memory and of `scratch_mb`. It has no network, no /proc and no /dev/shm, none of the
variables of this process, and no file of it but its own standard streams. It is a user that owns nothing, without
capabilities, in namespaces of its own that die with their first process, behind a filter of system calls
(seccomp.py). `confine.py` puts it there; bubblewrap does the first half of that where it is installed.

With `isolation: none` there is a temporary directory, the limits of each process and the filter, and nothing else: such
a program reads what you can read, deletes what you can delete, and can leave processes behind.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import platform
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megarlhf.errors import ConfigError, JudgeError
from megarlhf.judges.confine import NOBODY, READY
from megarlhf.judges.sandbox_view import bubblewrap, needs_mapping, seen
from megarlhf.judges.seccomp import MACHINES, syscall_filter

Isolation = Literal["auto", "bubblewrap", "namespaces", "none"]
Ending = Literal["itself", "time", "output", "company"]
"""Whether a program ended by itself, or was ended: by the clock, for what it printed, or because another had ended."""

START_S = 60.0
"""In which a sandbox stands, on a machine that has too much to do."""
FIRST_UID, UIDS = 0x70000000, 2**27
"""Users that no system gives to anybody: each program is another, because processes are counted by user."""
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
LATE = 'echo 1000 2>/dev/null >/proc/self/oom_score_adj; exec "$@"'
"""Where memory runs out, the kernel ends programs before it ends a run."""
CONFINE = (Path(__file__).parent / "confine.py").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_s: int
    wall_s: float
    memory_mb: int
    processes: int
    open_files: int
    output_kb: int
    scratch_mb: int

    def of_process(self, *, mapped: bool) -> dict[str, int]:
        """By the names of setrlimit. mapped: those that make the namespaces are counted too, as the same user's."""
        return {
            "RLIMIT_CPU": self.cpu_s,
            "RLIMIT_AS": self.memory_mb << 20,
            "RLIMIT_NPROC": self.processes + 2 * mapped,
            "RLIMIT_NOFILE": self.open_files,
            "RLIMIT_FSIZE": self.scratch_mb << 20,
            "RLIMIT_CORE": 1,  # 0 would still start the program that a system may have for them
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
            "RLIMIT_SIGPENDING": 256,
        }


@dataclass(frozen=True)
class Job:
    """One program to run."""

    files: Mapping[str, str]
    """Texts in its directory, by name."""
    arguments: Sequence[str]
    """Of the interpreter: a name of these first."""
    stdin: bytes = b""
    keep: tuple[int, ...] = ()
    """File descriptors that it has beside its standard streams, by the same numbers; `run` closes them here."""


@dataclass(frozen=True)
class Finished:
    """What became of a program; all of it is the program's own word but `ended`."""

    ended: Ending
    code: int
    """Of its exit; 128 and the signal's number where one ended it."""
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class Sandbox:
    """A way to run programs here; `open_sandbox` makes one, and tries it."""

    isolation: Literal["bubblewrap", "namespaces", "none"]
    limits: Limits
    mapped: bool
    """Whether it hangs on a user namespace, as it must for anybody but root."""

    def order(self, job: Job, status: int, where: str) -> dict[str, Any]:
        """What confine.py is to do."""
        alone = self.isolation != "none"
        files = 1024 + 64 * self.limits.scratch_mb
        options = f"size={self.limits.scratch_mb}m,nr_inodes={files},mode=777"
        own = [FIRST_UID + secrets.randbelow(UIDS), NOBODY]
        return {
            "enter": self.isolation == "namespaces",
            "mapped": self.mapped,
            "view": seen(),
            "scratch": {"where": where, "options": options if alone else ""},
            "uids": own if alone and not self.mapped else [],
            "limits": self.limits.of_process(mapped=self.mapped),
            "filter": base64.b64encode(syscall_filter(platform.machine())).decode(),
            "files": dict(job.files),
            "command": [_python(), "-I", "-B", "-X", "utf8", *job.arguments],
            "status": status,
        }

    def command(self, order: int) -> list[str]:
        """What is started."""
        outside = bubblewrap(mapped=self.mapped) if self.isolation == "bubblewrap" else []
        return ["/bin/sh", "-c", LATE, "sh", *outside, _python(), "-I", "-S", "-B", "-c", CONFINE, str(order)]


def open_sandbox(isolation: Isolation, limits: Limits, setting: str) -> Sandbox:
    """A sandbox that was tried.

    Raises:   ConfigError where none works here, with what failed of each.
    """
    kinds: dict[Isolation, list[Literal["bubblewrap", "namespaces", "none"]]] = {
        "auto": ["bubblewrap", "namespaces"],
        "bubblewrap": ["bubblewrap"],
        "namespaces": ["namespaces"],
        "none": ["none"],
    }
    failed: list[str] = []
    for kind in kinds[isolation]:
        sandbox = Sandbox(kind, limits, mapped=needs_mapping())
        reason = _trouble(sandbox)
        if not reason:
            return sandbox
        failed.append(f"{kind}: {reason}")
    raise ConfigError(
        f"{setting}.isolation={isolation}: generated programs cannot be run apart here ({'; '.join(failed)}); install "
        "bubblewrap, or allow namespaces (a container: --cap-add SYS_ADMIN with seccomp and AppArmor unconfined; else "
        "sysctl user.max_user_namespaces above 0, and kernel.apparmor_restrict_unprivileged_userns=0), raise limits "
        f"that are too low, or have programs run unguarded, as you: {setting}.isolation=none."
    )


def _trouble(sandbox: Sandbox) -> str:
    """Why it does not work; empty where it does."""
    if sandbox.isolation != "none" and platform.machine() not in MACHINES:
        return f"the filter of system calls knows {' and '.join(MACHINES)}, not {platform.machine()}"
    if sandbox.isolation == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    (said,), reason = _tried(sandbox, Job({"program.py": "print(6 * 7)"}, ["program.py"]))
    if reason:
        return reason
    if (said.ended, said.code, said.stdout) == ("itself", 0, b"42\n"):
        return ""
    return f"a program that prints 42 ended by {said.ended} with code {said.code}: {_shown(said.stderr)}"


def run(sandbox: Sandbox, *jobs: Job) -> list[Finished]:
    """Run programs at once, each in a sandbox of its own, until the first of them has ended; the others end with it.

    wall_s counts from when all stand. It takes START_S + wall_s at most, and what a kernel needs to end them.

    Raises:   JudgeError where one could not be put into its sandbox: nothing is known of the program then.
    """
    said, reason = _tried(sandbox, *jobs)
    if reason:
        raise JudgeError(
            f"a sandbox failed: {reason}; see that the node has memory, processes and namespaces left, and start the "
            "same command again."
        )
    return said


def _tried(sandbox: Sandbox, *jobs: Job) -> tuple[list[Finished], str]:
    """What became of programs; or why nothing did."""
    started: list[_Run] = []
    try:
        try:
            started.extend(_Run(sandbox, job) for job in jobs)
        finally:
            # What is open here would never end for who reads it there.
            for descriptor in (kept for job in jobs for kept in job.keep):
                os.close(descriptor)
        _watch(started, sandbox.limits.wall_s)
    finally:
        for each in started:
            each.close()
    said = [Finished(each.ended, each.code, bytes(each.stdout), bytes(each.stderr)) for each in started]
    return said, next(filter(None, (each.trouble() for each in started)), "")


class _Run:
    """A program under way, and what came of it so far."""

    def __init__(self, sandbox: Sandbox, job: Job) -> None:
        self.ended: Ending = "company"
        self.code = -1
        self.stdout, self.stderr, self.status = bytearray(), bytearray(), bytearray()
        self._limit = sandbox.limits.output_kb << 10
        self._scratch = tempfile.mkdtemp(prefix="program_") if sandbox.isolation == "none" else ""
        reading, writing = os.pipe()
        order = sandbox.order(job, writing, self._scratch or "/tmp")
        text, stdin = _sealed(json.dumps(order).encode()), _sealed(job.stdin)
        try:
            self._process = subprocess.Popen(
                sandbox.command(text),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                cwd="/",
                pass_fds=(text, writing, *job.keep),
                start_new_session=True,
            )
        except OSError as error:
            os.close(reading)
            raise JudgeError(f"a sandbox could not be started: {error}; free processes or memory.") from error
        finally:
            for descriptor in (text, stdin, writing):
                os.close(descriptor)
        assert self._process.stdout is not None  # as asked for
        assert self._process.stderr is not None
        self.pipes = {self._process.stdout.fileno(): self.stdout, self._process.stderr.fileno(): self.stderr}
        self.pipes[reading] = self.status
        self._reading = reading
        self.over = os.pidfd_open(self._process.pid)
        for descriptor in self.pipes:
            os.set_blocking(descriptor, False)

    @property
    def stands(self) -> bool:
        """Whether the program has begun."""
        return bytes(self.status) == READY

    def read(self, descriptor: int) -> bool:
        """Take what is there; whether more may come."""
        buffer = self.pipes[descriptor]
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return True
        buffer += data
        if len(buffer) > self._limit:
            del buffer[self._limit :]
            self.end("output")
        return bool(data)

    def end(self, why: Ending) -> None:
        """End it, and all that came of it; the reason that came first stays."""
        if self._process.returncode is None:
            self.ended = why
            # Not yet waited for, so that the number is still its own.
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def has_ended(self) -> None:
        """It did so by itself: take the rest of what it said."""
        if self._process.returncode is None:
            code = self._process.wait()
            self.code = code if code >= 0 else 128 - code
            self.ended = "itself"
            for descriptor, buffer in self.pipes.items():
                before = -1
                while before < len(buffer) < self._limit:
                    before = len(buffer)
                    self.read(descriptor)

    def close(self) -> None:
        """Leave nothing behind."""
        self.end("company")
        os.close(self.over)
        os.close(self._reading)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)  # follows no link

    def trouble(self) -> str:
        """Why it never began; empty where it did, or was ended before it could."""
        if self.stands or (self.ended == "company" and not self.status):
            return ""
        late = f"it did not stand after {START_S:g} s" if self.ended == "time" else ""
        said = bytes(self.status.removeprefix(READY)) or bytes(self.stderr)
        return f"{late or _shown(said)} (exit code {self.code})"


def _watch(runs: Sequence[_Run], wall_s: float) -> None:
    deadline, counting = time.monotonic() + START_S, False
    with selectors.DefaultSelector() as selector:
        for each in runs:
            for descriptor in (each.over, *each.pipes):
                selector.register(descriptor, selectors.EVENT_READ, each)
        while runs[0].ended == "company":
            if not counting and all(each.stands or each.ended != "company" for each in runs):
                deadline, counting = time.monotonic() + wall_s, True
            left = deadline - time.monotonic()
            if left <= 0:
                runs[0].end("time")
            for key, _ in selector.select(max(left, 0)):
                each: _Run = key.data
                if key.fd == each.over:
                    each.has_ended()
                    selector.unregister(each.over)
                elif not each.read(key.fd):
                    selector.unregister(key.fd)


def _python() -> str:
    """The interpreter itself, not the link of a virtual environment."""
    return str(Path(sys.executable).resolve())


def _sealed(data: bytes) -> int:
    """A file in memory that nobody can change, to read from its beginning."""
    descriptor = os.memfd_create("program", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return descriptor


def _shown(text: bytes) -> str:
    said = text.decode(errors="replace").strip()
    return repr(said[-200:]) if said else "nothing was said"
