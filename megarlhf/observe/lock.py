"""One process at a time writes a run's directory, or a file of results, however many were started by mistake."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from megarlhf.errors import ConfigError, printable
from megarlhf.observe.files import writing

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems that know no locks say to a wish for one."""

TRIES, BETWEEN_S = 5, 0.1
"""A process that has just been killed may be a moment in dying, and one that looks holds the lock for an instant."""

_held: set[int] = set()


def _forget() -> None:
    """A forked process would keep the lock beyond the death of the one that took it."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def held(lock: Path, what: str, setting: str) -> Iterator[None]:
    """Be the only process that writes `what`: inside, the file `lock` is this one's, and says so.

    The kernel takes the lock back when this process ends, however it ends, so that a stale file stops nobody. On a file
    system without locks a line on standard error says that nobody watches.

    Raises:   ConfigError naming the process that has it, and `setting`, which is to be changed.
    """
    handle = _taken(lock, what, setting)
    _held.add(handle)
    try:
        with writing(lock):
            os.ftruncate(handle, 0)
            os.write(handle, f"{_own_name()}{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}\n".encode())
        yield
    finally:
        with suppress(OSError):  # a run directory may be moved or removed under its run
            if _is_at(handle, lock):
                lock.unlink()
        _held.discard(handle)
        os.close(handle)


def check_free(lock: Path, what: str, setting: str) -> None:
    """Raise ConfigError, as `held` does, where another process has `lock` now; nothing is made or written."""
    said = holder(lock)
    if said is not None:
        raise _refusal(lock, what, setting, said)


def holder(lock: Path) -> str | None:
    """What the process that has `lock` now says of itself; None where there is none, or nobody can know."""
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _said(handle)
    except OSError:
        return None
    finally:
        os.close(handle)
    return None


def is_written_by_another(lock: Path) -> bool:
    """Whether a process has `lock` now, and it is not this one."""
    said = holder(lock)
    return said is not None and not said.startswith(_own_name())


def _own_name() -> str:
    return f"{socket.gethostname()} {os.getpid()} "


def _said(handle: int) -> str:
    return os.pread(handle, 200, 0).decode(errors="replace")


def _taken(lock: Path, what: str, setting: str) -> int:
    tries = 0
    while True:
        with writing(lock):
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tries += 1
            if tries == TRIES:
                raise _refusal(lock, what, setting, _said(handle)) from None
            os.close(handle)
            time.sleep(BETWEEN_S)
            continue
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            text = f"{what}: no locks on this file system ({error.strerror}); start no second writer.\n"
            sys.stderr.write(printable(text))
        # The last holder may have removed the file between these two calls: then this one is nobody's any more.
        if _is_at(handle, lock):
            return handle
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(handle), path.stat())


def _refusal(lock: Path, what: str, setting: str, said: str) -> ConfigError:
    found = re.fullmatch(r"([\w.-]+) (\d+) ([\w:-]+)\n", said)
    if found is None:
        return ConfigError(f"{what} is in use by another process ({lock}); wait for it, or choose another {setting}.")
    host, pid, since = found.groups()
    gone = f" If {host} is down, remove {lock}." if host != socket.gethostname() else ""
    return ConfigError(
        f"{what} is in use: process {pid} on {host} writes there since {since} ({lock}); wait for it or stop it, or "
        f"choose another {setting}.{gone}"
    )
