"""Programs that print 42 where they have done harm, and what each says where it has not.

$names are filled in by test_sandbox.py: a secret file, a port that listens, a process that is to be killed, and others.
"""

from __future__ import annotations

REFUSED = "refused"
TIME, OUTPUT, FAILED = "time", "output", "failed"
"""How those end that would go on: by the clock, for what they print, or by a signal or an error."""

TRY = """
import os, sys
def attempt(*tries):
    done = []
    for number, each in enumerate(tries):
        try:
            each()
            done.append(number)
        except (OSError, MemoryError):
            pass
    print(f"42 {done}" if done else "refused")
"""
CALL = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments)) == -1:
        raise OSError(ctypes.get_errno(), "no")
"""

HOSTILE: dict[str, tuple[str, ...]] = {
    # ---- more than its share
    "forks without end": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", TIME, FAILED),
    "forks fifty times": (
        (
            "import os, time\nmade = 0\ntry:\n    while made < 50:\n        if os.fork() == 0: time.sleep(60)\n"
            "        made += 1\n"
            "except OSError: pass\nprint(42 if made > 8 else 'refused')"
        ),
        REFUSED,
    ),
    "starts fifty threads": (
        (
            "import threading, time\nthreading.stack_size(1 << 16)\nmade = 0\ntry:\n    while made < 50:\n"
            "        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n        made += 1\n"
            "except RuntimeError: pass\nprint(42 if made > 8 else 'refused')"
        ),
        REFUSED,
    ),
    "takes a gigabyte at once": (TRY + "attempt(lambda: bytearray(1 << 30))", REFUSED),
    "takes memory bit by bit": (
        TRY + "def fill():\n    held = []\n    while len(held) < 512: held.append(b'x' * (1 << 20))\nattempt(fill)",
        REFUSED,
    ),
    "maps shared memory": (TRY + "import mmap\nattempt(lambda: mmap.mmap(-1, 1 << 30))", REFUSED),
    "makes shared memory of System V, and queues": (
        TRY
        + CALL
        + "attempt(lambda: call(29, 0, 1 << 30, 0o1600), lambda: call(68, 0, 0o1600), lambda: call(319, 0, 0))",
        REFUSED,
    ),
    "fills the disk with one file": (
        TRY + "def fill():\n    with open('big', 'wb', 0) as file:\n"
        "        for _ in range(64): file.write(b'x' * (1 << 20))\n"
        "attempt(fill)",
        REFUSED,
        FAILED,  # by SIGXFSZ, which Python ignores
    ),
    "fills the disk with many": (
        TRY + "def fill():\n    for n in range(64):\n        with open(f'{n}', 'wb', 0) as file:\n"
        "            assert file.write(b'x' * (1 << 20)) == 1 << 20 or (_ for _ in ()).throw(OSError)\nattempt(fill)",
        REFUSED,
    ),
    "makes empty files": (
        TRY
        + "def fill():\n    for n in range(20000): os.close(os.open(f'{n}', os.O_CREAT | os.O_WRONLY))\nattempt(fill)",
        REFUSED,
    ),
    "opens a hundred files": (
        TRY + "held = []\ndef fill():\n    while len(held) < 100: held.append(os.open('/dev/null', 0))\nattempt(fill)",
        REFUSED,
    ),
    "prints without end": ("while True: print(42)", OUTPUT),
    "prints errors without end": ("import sys\nprint(42, flush=True)\nwhile True: print(42, file=sys.stderr)", OUTPUT),
    "computes without end": ("print(42, flush=True)\nwhile True: pass", TIME, FAILED),
    "sleeps": ("import time\nprint(42, flush=True)\ntime.sleep(1000)", TIME),
    "ignores every signal": (
        (
            "import signal, time\nprint(42, flush=True)\nfor number in range(1, 65):\n"
            "    try: signal.signal(number, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
            "while True: time.sleep(1000)"
        ),
        TIME,
    ),
    "hangs at its exit": ("import atexit, time\nprint(42, flush=True)\natexit.register(time.sleep, 1000)", TIME),
    "hangs when it is cleared away": (
        (
            "import time\nprint(42, flush=True)\nclass Last:\n"
            "    def __del__(self, sleep=time.sleep): sleep(1000)\nlast = Last()"
        ),
        TIME,
    ),
    "calls itself without end": (
        "import sys\nsys.setrecursionlimit(10**9)\nprint(42, flush=True)\ndef f(n): return f(n + 1) + 1\nf(0)",
        FAILED,
    ),
    # ---- the network
    "connects to a port of this machine": (
        TRY + "import socket\nattempt(lambda: socket.create_connection(('127.0.0.1', $port), timeout=1))",
        REFUSED,
    ),
    "sends a datagram, and asks for a name": (
        TRY + "import socket\nattempt(lambda: socket.socket(2, 2).sendto(b'x', ('127.0.0.1', $port)), "
        "lambda: socket.getaddrinfo('example.org', 80))",
        REFUSED,
    ),
    "connects to sockets of this machine without a network": (
        TRY + "import socket\nattempt(lambda: socket.socket(1, 1).connect('\\0$abstract'), "
        "lambda: socket.socket(1, 1).connect('$socket'))",
        REFUSED,
    ),
    "takes sockets of other families": (
        TRY + "import socket\nattempt(*(lambda family=family: socket.socket(family, kind) for kind in (1, 2, 3) "
        "for family in range(2, 46)))",
        REFUSED,
    ),
    # ---- what it must not see
    "reads files of ours": (
        TRY + "attempt(*(lambda path=path: open(path).read() for path in ('$secret', '/etc/shadow', '/etc/passwd', "
        "'$repository', os.path.expanduser('~root/.bashrc'), '/dev/mem', '/dev/kmsg')))",
        REFUSED,
    ),
    "lists directories of ours": (
        TRY + "attempt(*(lambda path=path: os.listdir(path) for path in ('/home', '/var', '/proc', '/sys', '/run', "
        "'/mnt', '/opt', '$directory')))",
        REFUSED,
    ),
    "reads the environment": (
        "import os\nprint(42 if '$value' in str(dict(os.environ)) else 'refused')",
        REFUSED,
    ),
    "reads the environment of others": (
        TRY + "attempt(*(lambda who=who: open(f'/proc/{who}/environ', 'rb').read() for who in (1, $pid, 'self', "
        "os.getppid(), 'thread-self')))",
        REFUSED,
    ),
    "reads what is open already": (TRY + "attempt(*(lambda fd=fd: os.fstat(fd) for fd in range(3, 2000)))", REFUSED),
    # ---- what it must not touch
    "kills others": (
        TRY + "import signal\nattempt(lambda: os.kill($pid, 9), lambda: os.kill($victim, 9), "
        "lambda: os.killpg($victim, 9), lambda: os.kill(-1, 9) or os.kill(os.getppid(), 9) or os.kill(1, 0) or 1 / 0)",
        REFUSED,
        FAILED,  # it divides by zero where it has nobody to kill, or killed nobody
    ),
    "reads and stops others": (
        TRY
        + CALL
        + "attempt(lambda: call(101, 16, 1, 0, 0), lambda: call(101, 0, 0, 0, 0), lambda: call(310, 1, 0, 0, 0), "
        "lambda: call(438, 1, 0, 0))",
        REFUSED,
    ),
    "writes outside of its directory": (
        TRY + "attempt(*(lambda path=path: open(path, 'a').write('x') for path in ('$secret', '/etc/motd', '/usr/x', "
        "'/dev/shm/x', '/proc/sys/kernel/core_pattern', '/x', '/srv/x', sys.prefix + '/x', '/var/tmp/x', '/dev/x', "
        "os.__file__)))",
        REFUSED,
    ),
    "writes to the host's /tmp": (
        "import os\nopen('/tmp/$mark', 'w').write('x')\nos.symlink('/etc/passwd', '/tmp/$mark_link')\nprint('refused')",
        REFUSED,
    ),
    "puts links in its directory": (
        TRY + "os.remove('program.py')\nos.symlink('$secret', 'program.py')\nos.symlink('$directory', 'there')\n"
        "attempt(lambda: open('program.py').read(), lambda: open('program.py', 'a').write('x'), "
        "lambda: os.listdir('there'))",
        REFUSED,
    ),
    "deletes all it can": (
        (
            "import os, shutil, sys\nfor path in ('/tmp', '/etc', '/dev', sys.prefix + '/bin', '$directory'):\n"
            "    shutil.rmtree(path, ignore_errors=True)\nos.rmdir('/tmp')"
        ),
        FAILED,
    ),
    "becomes root": (
        TRY + "import subprocess\nsu = lambda: subprocess.run(['/usr/bin/su', '-c', 'id'], check=True, timeout=1)\n"
        "def try_su():\n    try: su()\n    except subprocess.SubprocessError as error: raise OSError from error\n"
        "attempt(lambda: os.setuid(0), lambda: os.setresuid(0, 0, 0), lambda: os.setgroups([0]), try_su)",
        REFUSED,
    ),
    "makes mounts and namespaces": (
        TRY + CALL + "attempt(lambda: os.chroot('/tmp'), lambda: call(272, 0x10000000), lambda: call(272, 0x40000000), "
        "lambda: call(165, 0, 0, 0, 0, 0), lambda: call(56, 0x10000011, 0, 0, 0, 0), lambda: call(435, 0, 0), "
        "lambda: call(155, 0, 0), lambda: call(308, 0, 0))",
        REFUSED,
    ),
    "knocks at the kernel": (
        TRY
        + CALL
        + "attempt(*(lambda number=number: call(number, 0, 0, 0, 0, 0) for number in (321, 298, 323, 425, 250, "
        "248, 175, 246, 169, 103, 135, 304, 237)))",
        REFUSED,
    ),
    "takes the second table of calls": (CALL + "print(42, flush=True)\ncall(0x40000000 | 39)", FAILED),
    # ---- what it leaves
    "leaves a daemon": (
        (
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
            "    if os.fork() == 0:\n        os.closerange(0, 100)\n"
            "        time.sleep(1000)\n    os._exit(0)\nprint('refused')"
        ),
        REFUSED,
    ),
    # ---- lies
    "closes everything": ("import os\nos.write(1, b'refused\\n')\nos.closerange(0, 1000)", REFUSED),
    "prints a pickle": (
        (
            "import os, pickle, sys\nclass Bad:\n"
            "    def __reduce__(self): return os.system, ('touch /tmp/$mark_pickle',)\n"
            "sys.stdout.buffer.write(pickle.dumps(Bad()))"
        ),
        "",
    ),
    "says that it is ready, and right": (
        "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'ready')\n    except OSError: pass\nos._exit(0)",
        "ready",
    ),
    "prints what is right, and fails": ("print(42)\nraise SystemExit(3)", FAILED),
    "prints what is right, and is killed": ("import os\nprint(42, flush=True)\nos.kill(os.getpid(), 9)", FAILED),
}
