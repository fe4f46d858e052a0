"""Programs that would do harm, none of which does, and none of which earns anything by it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megarlhf.errors import ConfigError, JudgeError
from megarlhf.judges import sandbox as module
from megarlhf.judges.code_tests import is_right
from megarlhf.judges.sandbox import Finished, Isolation, Job, Limits, Sandbox, open_sandbox, run
from tests.judges.hostile import HOSTILE, TIME

LIMITS = Limits(cpu_s=1, wall_s=20, memory_mb=256, processes=4, open_files=32, output_kb=64, scratch_mb=4)
SECRET = "a-secret-that-nobody-may-see"
MARK = f"megarlhf_test_{os.getpid()}"
"""In the arguments of every program, so that what one leaves is found."""


@dataclass(frozen=True)
class Scene:
    """What there is to be harmed."""

    secret: Path
    victim: subprocess.Popen[bytes]
    listening: tuple[socket.socket, ...]
    names: dict[str, str]

    def job(self, program: str) -> Job:
        for name, value in self.names.items():
            program = program.replace(f"${name}", value)
        return Job({"program.py": program}, ["program.py", MARK])


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("ours")
    folder.chmod(0o777)
    secret = folder / "secret.txt"
    secret.write_text(SECRET)
    secret.chmod(0o666)
    stream, packets = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    packets.bind(stream.getsockname())
    abstract, named = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
    abstract.bind(f"\0{MARK}")
    named.bind(str(folder / "socket"))
    (folder / "socket").chmod(0o777)
    for each in (stream, packets, abstract, named):
        each.setblocking(False)
    for each in (abstract, named):
        each.listen()
    victim = subprocess.Popen(["sleep", "600"], start_new_session=True)
    names = {
        "secret": str(secret),
        "directory": str(folder),
        "repository": str(Path(__file__).resolve()),
        "value": SECRET,
        "port": str(stream.getsockname()[1]),
        "abstract": MARK,
        "socket": str(folder / "socket"),
        "victim": str(victim.pid),
        "pid": str(os.getpid()),
        "mark": MARK,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MY_TOKEN", SECRET)
        yield Scene(secret, victim, (stream, packets, abstract, named), names)
    victim.kill()
    victim.wait()
    for each in (stream, packets, abstract, named):
        each.close()


def opened(isolation: Isolation, limits: Limits = LIMITS) -> Sandbox:
    try:
        return open_sandbox(isolation, limits, "judges.code")
    except ConfigError as error:
        pytest.skip(str(error))


Ended = tuple[Sandbox, dict[str, Finished]]


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def ended(request: pytest.FixtureRequest, scene: Scene) -> Ended:
    """Every hostile program, a few at once."""
    sandbox = opened(request.param)
    brief = replace(sandbox, limits=replace(LIMITS, wall_s=1))

    def one(program: str, *allowed: str) -> Finished:
        return run(brief if TIME in allowed else sandbox, scene.job(program))[0]

    with ThreadPoolExecutor(4) as pool:
        said = pool.map(lambda name: one(*HOSTILE[name]), HOSTILE)
        return sandbox, dict(zip(HOSTILE, said, strict=True))


def summary(said: Finished) -> str:
    if said.ended != "itself":
        return said.ended
    return "failed" if said.code else said.stdout.decode(errors="replace").strip()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_does_no_harm_and_earns_nothing(name: str, ended: Ended, scene: Scene) -> None:
    said = ended[1][name]
    allowed = HOSTILE[name][1:]
    assert allowed == ("",) or summary(said) in allowed, (said, allowed)
    assert not is_right(said, "42")
    assert len(said.stdout) <= LIMITS.output_kb << 10
    assert len(said.stderr) <= LIMITS.output_kb << 10
    assert SECRET.encode() not in said.stdout + said.stderr


def test_all_that_was_to_be_harmed_is_unharmed(ended: Ended, scene: Scene) -> None:
    assert scene.secret.read_text() == SECRET
    assert sorted(path.name for path in scene.secret.parent.iterdir()) == ["secret.txt", "socket"]
    assert scene.victim.poll() is None
    for each in scene.listening:
        with pytest.raises(BlockingIOError):
            each.recv(1) if each.type == socket.SOCK_DGRAM else each.accept()
    assert not [path for path in Path("/tmp").iterdir() if path.name.startswith(MARK)]
    assert not Path("/dev/shm/x").exists()
    assert os.environ["MY_TOKEN"] == SECRET


def test_nobody_survives(ended: Ended) -> None:
    """Neither a daemon nor a bomb's children."""
    assert within(5, lambda: not marked())


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def marked() -> list[str]:
    found: list[str] = []
    for place in Path("/proc").iterdir():
        try:
            if place.name.isdigit() and MARK.encode() in (place / "cmdline").read_bytes().split(b"\0"):
                found.append(place.name)
        except OSError:
            continue
    return found


def test_after_them_a_program_still_runs(ended: Ended) -> None:
    program = Job({"program.py": "import sys\nprint(sum(map(int, sys.stdin)))"}, ["program.py"], b"20\n22\n")
    (said,) = run(ended[0], program)
    assert (summary(said), is_right(said, "42 \n\n")) == ("42", True)


USUAL = """
import asyncio, collections, decimal, json, os, random, re, subprocess, sys, tempfile, threading
with tempfile.TemporaryFile() as file:
    file.write(b"x" * 1000)
open("own.txt", "w").write("mine")
os.remove("own.txt")
done = []
thread = threading.Thread(target=done.append, args=(1,))
thread.start()
thread.join()
subprocess.run([sys.executable, "-c", "print(1)"], stdout=subprocess.DEVNULL, check=True)
os.urandom(8), open("/dev/urandom", "rb").read(8), random.random()
asyncio.run(asyncio.sleep(0))
sys.setrecursionlimit(20000)
def deep(n): return 0 if n == 0 else 1 + deep(n - 1)
print(len(done), deep(15000), os.path.expanduser("~"), sys.stdin.encoding)
"""


def test_what_programs_usually_do_works(ended: Ended) -> None:
    (said,) = run(ended[0], Job({"program.py": USUAL}, ["program.py"]))
    assert summary(said) == "1 15000 /tmp utf-8", said


HARMLESS_HERE = ("reads files of ours", "lists directories of ours", "puts links in its directory")


@pytest.mark.parametrize("name", [*HARMLESS_HERE, "reads the environment of others"])
def test_the_harm_is_real_where_nothing_prevents_it(name: str, scene: Scene) -> None:
    (said,) = run(opened("none"), scene.job(HOSTILE[name][0]))
    assert summary(said).startswith("42"), said
    scene.secret.write_text(SECRET)


def test_without_isolation_links_are_not_followed_when_its_directory_is_deleted(scene: Scene) -> None:
    program = "import os\nos.symlink('$directory', 'there')\nprint(os.getcwd())"
    (said,) = run(opened("none"), scene.job(program))
    assert Path(summary(said)).name.startswith("program_")
    assert not Path(summary(said)).exists()
    assert scene.secret.read_text() == SECRET


def test_the_directory_of_the_run_is_hidden_also_within_what_is_shown(
    ended: Ended, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/usr/share")
    (said,) = run(ended[0], scene.job("import os\nprint(os.listdir('/usr/share'), len(os.listdir('/usr')) > 3)"))
    assert summary(said) == "[] True"


def test_programs_at_once_end_with_the_first_and_talk_by_what_they_are_given(ended: Ended) -> None:
    reads, writes = os.pipe()
    first = Job({"program.py": f"import os\nprint(os.read({reads}, 9))"}, ["program.py"], keep=(reads,))
    other = f"import os, time\nos.write({writes}, b'hello')\ntime.sleep(1000)"
    said, company = run(ended[0], first, Job({"program.py": other}, ["program.py", MARK], keep=(writes,)))
    assert (summary(said), company.ended) == ("b'hello'", "company")
    assert within(5, lambda: not marked())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reads)


@pytest.mark.parametrize("isolation", ["bubblewrap", "namespaces"])
def test_without_root_it_hangs_on_a_user_namespace(isolation: Isolation) -> None:
    sandbox = replace(opened(isolation), mapped=True)
    # Root's files are this user's own there, so that only the mounts keep it from writing. It writes nothing.
    program = "import os\nprint(os.getuid(), os.listdir('.'))\nopen(os.__file__, 'a').close()"
    (said,) = run(sandbox, Job({"program.py": program}, ["program.py"]))
    assert said.stdout == b"65534 ['program.py']\n", said
    assert b"OSError: [Errno 30]" in said.stderr or b"PermissionError" in said.stderr, said


@pytest.mark.parametrize("isolation", ["bubblewrap", "namespaces", "none"])
def test_when_this_process_is_killed_its_programs_are(isolation: Isolation, scene: Scene) -> None:
    sandbox = opened(isolation)
    child = os.fork()
    if not child:
        try:
            run(sandbox, scene.job("import time\ntime.sleep(1000)"))
        finally:
            os._exit(1)
    assert within(10, lambda: len(marked()) > 0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert within(5, lambda: not marked())


def test_where_nothing_works_it_says_what_failed_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_python", lambda: "/nowhere/python")
    for isolation in ("auto", "none"):
        with pytest.raises(ConfigError) as error:
            open_sandbox(isolation, LIMITS, "judges.code")
        said = str(error.value)
        assert said.startswith(f"judges.code.isolation={isolation}: generated programs cannot be run apart here (")
        assert "/nowhere/python" in said
        assert said.endswith("judges.code.isolation=none.")
    with pytest.raises(JudgeError, match=r"a sandbox failed: .*/nowhere/python"):
        run(Sandbox("none", LIMITS, mapped=False), Job({"program.py": "print(1)"}, ["program.py"]))


def test_limits_that_no_interpreter_keeps_to_are_said_before_a_run() -> None:
    opened("namespaces")
    with pytest.raises(ConfigError, match=r"a sandbox failed|a program that prints 42 ended by itself with code"):
        open_sandbox("namespaces", replace(LIMITS, memory_mb=8), "judges.code")


def test_an_unknown_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "riscv64")
    with pytest.raises(ConfigError, match="the filter of system calls knows x86_64 and aarch64, not riscv64"):
        open_sandbox("auto", LIMITS, "judges.code")
