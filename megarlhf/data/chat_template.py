"""Render chat templates in a process that an endless or huge one ends alone (`template_worker`)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template

from megarlhf.data import template_worker
from megarlhf.errors import DataError

COMPUTING_S = 10.0
"""Seconds of processor time that a template may take for one conversation. It needs a thousandth of one; a machine that
others share counts what they took too."""
_MOST_WORKERS = 4
_LOCK = threading.Lock()
_workers: dict[tuple[int, str], subprocess.Popen[str]] = {}
"""By the process that asks (a forked one must not read another's answers) and the template."""


def render(template: str, variables: Mapping[str, Any], *, trusted: bool = False) -> str:
    """What `template` writes for `variables`, which are plain data. A trusted one, our own, is rendered here.

    Raises:   DataError with what the template raised, or the bound that it passed.
    """
    if trusted:
        return _compiled(template).render(variables)
    key = (os.getpid(), template)
    with _LOCK:
        worker = _workers.get(key) or _start(key)
        try:
            answer = _ask(worker, variables)
        except BaseException:  # Ctrl-C: the answer to this question must not be taken for that to the next
            _stop(key)
            raise
        if not answer:
            _stop(key)
            raise DataError(_why_it_ended(worker.returncode))
    found = json.loads(answer)
    if "error" in found:
        raise DataError(found["error"])
    return found["text"]


@lru_cache(maxsize=1)
def _compiled(template: str) -> Template:
    return template_worker.environment().from_string(template)


def _start(key: tuple[int, str]) -> subprocess.Popen[str]:
    if len(_workers) >= _MOST_WORKERS:
        _stop(next(iter(_workers)))
    # -P: this directory's files are no modules of the worker.
    command = [sys.executable, "-P", str(Path(template_worker.__file__)), str(COMPUTING_S)]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8"
    )
    _workers[key] = worker
    with suppress(BrokenPipeError):  # it has ended, which the first question finds out
        _send(worker, key[1])
    return worker


def _ask(worker: subprocess.Popen[str], variables: Mapping[str, Any]) -> str:
    try:
        _send(worker, variables)
    except BrokenPipeError:
        return ""
    assert worker.stdout is not None
    return worker.stdout.readline()


def _send(worker: subprocess.Popen[str], value: Any) -> None:
    assert worker.stdin is not None
    worker.stdin.write(f"{json.dumps(value)}\n")
    worker.stdin.flush()


def _stop(key: tuple[int, str]) -> None:
    worker = _workers.pop(key)
    if key[0] != os.getpid():
        return
    worker.kill()
    worker.communicate()


def _why_it_ended(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"it computes for more than {COMPUTING_S:g} s"
    return f"it ended the process that renders it ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
