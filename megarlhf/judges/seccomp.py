"""Which system calls a generated program may not make, as a filter that the kernel runs (seccomp, classic BPF).

All others are allowed: the filter takes away what has no use in a program that reads, computes and writes, and what
kernels were broken by most often. It is no list of what is safe.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from typing import NamedTuple


class Machine(NamedTuple):
    """How one kind of machine names its calls."""

    audit: int
    """AUDIT_ARCH_* of linux/audit.h."""
    column: int
    """In the table of numbers."""


MACHINES: Mapping[str, Machine] = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}
"""By the name that uname -m gives."""

# linux/unistd.h: on x86_64, and as asm-generic has it, on aarch64; None where there is none.
DENIED: Mapping[str, tuple[int | None, int | None]] = {
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    # keys
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # mounts, roots, namespaces
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "fanotify_mark": (301, 263),
    # doors into the kernel
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "lookup_dcookie": (212, 18),
    "nfsservctl": (180, 42),
    "uselib": (134, None),
    "sysfs": (139, None),
    "modify_ldt": (154, None),
    "iopl": (172, None),
    "ioperm": (173, None),
    "personality": (135, 92),
    "vmsplice": (278, 75),
    # the machine
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "acct": (163, 89),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "vhangup": (153, 58),
    # where memory lies
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # memory that no limit of a process counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
}
"""What fails with "not permitted"."""
SOCKET, CLONE, CLONE3 = (41, 198), (56, 220), (435, 435)
NEW_NAMESPACES = 0x7E020000
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET."""
X32 = 0x40000000
"""From here on a number of x86_64 is one of its second table."""

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16
"""Bytes into struct seccomp_data; of an argument the low half, where both machines have it first."""
_ALLOW, _KILL, _FAIL = 0x7FFF0000, 0x80000000, 0x00050000
_AF_UNIX = 1


def syscall_filter(machine: str) -> bytes:
    """The filter as the kernel takes it; empty for a machine whose calls are not known here.

    Sockets are of the machine itself only (AF_UNIX): some families, AF_VSOCK for one, know no network namespace.
    """
    if machine not in MACHINES:
        return b""
    audit, column = MACHINES[machine]
    code = [*_load(_MACHINE), *_if(_EQUAL, audit, skip=1, otherwise=0), *_give(_KILL), *_load(_NUMBER)]
    if machine == "x86_64":
        code += _when(_AT_LEAST, X32, _KILL)
    for numbers in DENIED.values():
        number = numbers[column]
        code += _when(_EQUAL, number, _FAIL | errno.EPERM) if number is not None else []
    # Its flags are in memory, where no filter can look; glibc then takes clone.
    code += _when(_EQUAL, CLONE3[column], _FAIL | errno.ENOSYS)
    allow = _give(_ALLOW)
    spaces = [*_load(_FIRST_ARGUMENT), *_when(_ANY_BIT, NEW_NAMESPACES, _FAIL | errno.EPERM), *allow]
    family = [*_load(_FIRST_ARGUMENT), *_when(_EQUAL, _AF_UNIX, _ALLOW), *_give(_FAIL | errno.EAFNOSUPPORT)]
    code += [*_if(_EQUAL, CLONE[column], skip=0, otherwise=len(spaces)), *spaces]
    code += [*_if(_EQUAL, SOCKET[column], skip=0, otherwise=len(family)), *family]
    return b"".join([*code, *allow])


def _load(offset: int) -> list[bytes]:
    return [struct.pack("=HBBI", _LOAD, 0, 0, offset)]


def _if(test: int, value: int, *, skip: int, otherwise: int) -> list[bytes]:
    return [struct.pack("=HBBI", test, skip, otherwise, value)]


def _give(action: int) -> list[bytes]:
    return [struct.pack("=HBBI", _RETURN, 0, 0, action)]


def _when(test: int, value: int, action: int) -> list[bytes]:
    return [*_if(test, value, skip=0, otherwise=1), *_give(action)]
