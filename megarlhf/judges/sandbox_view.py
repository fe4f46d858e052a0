"""What a program in the sandbox sees of this machine, and bubblewrap's words for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarlhf.judges.confine import NOBODY

TREE = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin")
LOADER = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
CAPABILITIES = ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
"""What the way in needs of bubblewrap, and gives up: to mount /tmp, and to become somebody else."""


def seen() -> dict[str, Any]:
    """What a program sees, where it lies here too. Names that are links stay so: /lib is one to usr/lib."""
    prefixes = {str(Path(each).resolve()) for each in (sys.base_prefix, sys.base_exec_prefix)}
    paths = [Path(each) for each in (*TREE, *LOADER, *sorted(prefixes)) if Path(each).exists()]
    links = {str(path): str(path.readlink()) for path in paths if path.is_symlink()}
    roots = [path for path in paths if not path.is_symlink()]
    # What lies in another that is shown is there with it.
    binds = [path for path in roots if not any(other in path.parents for other in roots)]
    hidden = {Path.cwd(), Path(os.environ.get("HOME", "/root")).resolve()}
    covered = [path for path in hidden if _is_in(path, binds) and not any(path in [p, *p.parents] for p in roots)]
    return {
        "binds": [str(path) for path in binds],
        "links": links,
        "devices": list(DEVICES),
        "hidden": [str(path) for path in sorted(covered)],
    }


def needs_mapping() -> bool:
    """Whether a program can only be nobody in a user namespace: this process is not root, or a root of its own alone.

    Not where that root is everybody's: then the kernel would not count its processes.
    """
    if os.geteuid() != 0:
        return True
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    there = any(first <= NOBODY < first + count for first, _, count in ranges)
    return not there and any(first == 0 != outside for first, outside, _ in ranges)


def _is_in(path: Path, roots: Sequence[Path]) -> bool:
    return any(root in path.parents for root in roots)


def bubblewrap(*, mapped: bool) -> list[str]:
    """The command that makes namespaces with that view, and starts what follows it there as root, or as nobody."""
    view = seen()
    # bwrap itself would make them for their owner alone.
    above = sorted({str(each) for path in (*view["binds"], *DEVICES) for each in Path(path).parents} - {"/"})
    nobody = ("--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)) if mapped else ()
    return [
        *("bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try", *nobody),
        *("--die-with-parent", "--new-session", "--cap-drop", "ALL"),
        *(word for name in CAPABILITIES for word in ("--cap-add", name)),
        *(word for path in above for word in ("--perms", "755", "--dir", path)),
        *(word for path in view["binds"] for word in ("--ro-bind", path, path)),
        *(word for path, target in view["links"].items() for word in ("--symlink", target, path)),
        *(word for path in view["devices"] for word in ("--dev-bind", path, path)),
        *(word for path in view["hidden"] for word in ("--tmpfs", path, "--remount-ro", path)),
        *("--dir", "/tmp", "--remount-ro", "/", "--chdir", "/", "--"),
    ]
