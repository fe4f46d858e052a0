"""The way into the sandbox, walked by the process that becomes the program: standard library alone, and run by itself.

`python -I -S -c TEXT FD` reads its order, as JSON, from that file descriptor:

    enter       whether it makes the namespaces itself; else somebody did, or there are none
    mapped      whether they hang on a user namespace, as without root they must
    view        what is seen: binds, devices, links, hidden
    scratch     "where", and where that is a disk of its own in memory, its "options"
    uids        who it becomes: the first of these that there is; none where it is nobody already
    limits      of a process, by the name of setrlimit
    filter      of system calls, in base64; empty for none
    files       what is written to the scratch directory, by name
    command     what it becomes
    status      the file descriptor that says "ready" right before it does so, or else what failed
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

READY = b"ready"
NOBODY = 65534
STAGE = "/tmp"
"""Where the new root is put together; it is in every system, and hidden only for this process."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_USER = 0x10000000
_NEW_OTHERS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWPID, NEWNET."""
_READ_ONLY, _NO_SUID, _NO_DEVICES, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_DETACH = 2
_MOUNT_SETATTR = 442
"""System call, of one number on all machines; it alone makes a tree of mounts read-only (Linux 5.12)."""
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_DEATH_SIGNAL, _DROP_CAPABILITY, _SECCOMP, _NO_NEW_PRIVILEGES, _AMBIENT = 1, 24, 22, 38, 47


def main() -> None:
    """Walk all of it; leaves this program only by becoming another, or by its end."""
    # Who started it keeps the time: without them nobody would.
    _call("prctl", _DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    with os.fdopen(int(sys.argv[1]), "rb") as file:
        order: dict[str, Any] = json.load(file)
    status: int = order["status"]
    os.set_inheritable(status, False)
    try:
        if order["enter"]:
            enter(order["view"], status, mapped=order["mapped"])
        confine(order)
        environment = {**os.environ, "HOME": order["scratch"]["where"], "TMPDIR": order["scratch"]["where"]}
        os.write(status, READY)
        os.execve(order["command"][0], order["command"], environment)
    except BaseException as error:  # noqa: BLE001 (whatever it is, the program must not start)
        os.write(status, f"{type(error).__name__}: {error}".encode())
    os._exit(1)


def enter(view: dict[str, Any], status: int, *, mapped: bool) -> None:
    """Make namespaces of one's own, with a root that holds the view; returns in what becomes the program."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", _NEW_OTHERS | (_NEW_USER if mapped else 0))
    if mapped:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {gid} 1")
    _mount(None, "/", _RECURSIVE | _PRIVATE)
    # Opened before the new root hides some of them, and in this namespace, whose mounts alone it may copy.
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in (*view["binds"], *view["devices"])}
    _mount("tmpfs", STAGE, _NO_SUID, kind="tmpfs", options="size=1m,nr_inodes=4k,mode=755")
    for path, source in sources.items():
        _bind(source, STAGE + path, device=path in view["devices"])
    for path, target in view["links"].items():
        Path(STAGE + path).symlink_to(target)
    for path in view["hidden"]:
        _mount("tmpfs", STAGE + path, _READ_ONLY | _NO_SUID, kind="tmpfs", options="size=4k,mode=555")
    Path(STAGE + "/tmp").mkdir(exist_ok=True)
    os.chdir(STAGE)
    # The old root comes to lie on the new one, and is taken away: no name leads back.
    _system_call(_PIVOT_ROOT[os.uname().machine], b".", b".")
    _call("umount2", b".", _DETACH)
    os.chdir("/")
    _mount(None, "/", _REMOUNT | _BIND | _READ_ONLY | _NO_SUID)
    for source in sources.values():
        os.close(source)
    child = os.fork()
    if child:
        os.close(status)
        _mirror(child)
    # The first process of the namespace: with it everything in there dies, and it dies with the one outside.
    _call("prctl", _DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    child = os.fork()
    if child:
        os.close(status)
        _mirror(child)


def confine(order: dict[str, Any]) -> None:
    """Take everything away that can still be taken away; what it leaves is the program's."""
    scratch = order["scratch"]
    if scratch["options"]:
        _mount("tmpfs", scratch["where"], _NO_SUID | _NO_DEVICES, kind="tmpfs", options=scratch["options"])
    os.chdir(scratch["where"])
    os.umask(0o022)
    for name, text in order["files"].items():
        Path(name).write_text(text, encoding="utf-8", errors="replace")
    for name, value in order["limits"].items():
        number: int = vars(resource)[name]
        hard = resource.getrlimit(number)[1]
        least = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (least, least))
    for capability in range(64):
        # May fail: without CAP_SETPCAP, and beyond the last. No capability outlives the change of user either way.
        _LIBC.prctl(_DROP_CAPABILITY, capability, 0, 0, 0)
    _call("prctl", _AMBIENT, 4, 0, 0, 0)
    if order["uids"]:
        _become(order["uids"])
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    code = base64.b64decode(order["filter"])
    if code:
        held = ctypes.create_string_buffer(code, len(code))
        program = _Program(len(code) // 8, ctypes.addressof(held))
        _call("prctl", _SECCOMP, 2, ctypes.byref(program), 0, 0)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _become(uids: list[int]) -> None:
    for uid in uids:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        except OSError as error:
            if uid == uids[-1]:
                raise OSError(error.errno, f"root cannot become user {uid} here: {error.strerror}") from error
        else:
            return


def _bind(source: int, target: str, *, device: bool) -> None:
    if device or not Path(f"/proc/self/fd/{source}").is_dir():
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).touch()
    else:
        Path(target).mkdir(parents=True, exist_ok=True)
    _mount(f"/proc/self/fd/{source}", target, _BIND | _RECURSIVE)
    if not device:
        flags = _READ_ONLY | _NO_SUID | _NO_DEVICES
        attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
        at_here, recursive = -100, 0x8000
        _system_call(_MOUNT_SETATTR, at_here, target.encode(), recursive, ctypes.byref(attributes), 32)


def _mount(source: str | None, target: str, flags: int, *, kind: str | None = None, options: str | None = None) -> None:
    given = (None if text is None else text.encode() for text in (source, target, kind))
    first, second, third = given
    _call("mount", first, second, third, ctypes.c_ulong(flags), None if options is None else options.encode())


def _call(name: str, *arguments: Any) -> None:
    if _LIBC[name](*arguments) != 0:
        number = ctypes.get_errno()
        shown = ", ".join(str(each) for each in arguments if isinstance(each, bytes | int))
        raise OSError(number, f"{name}({shown}): {os.strerror(number)}")


def _system_call(number: int, *arguments: Any) -> None:
    _call("syscall", ctypes.c_long(number), *arguments)


def _mirror(child: int) -> None:
    """Wait for the child, and whoever is left to this process; then end as it did."""
    while True:
        pid, how = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(how)
            os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
