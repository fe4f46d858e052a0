"""Chat templates as `transformers` renders them, and those that never end, or have nothing to say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from megarlhf.data import chat_template
from megarlhf.data.arithmetic import words
from megarlhf.data.chat_template import render
from megarlhf.data.tokenizer import LLAMA3_CHAT_TEMPLATE, Tokenizer, build_tiny_tokenizer, load_tokenizer
from megarlhf.errors import DataError

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ' How "many"?\n<b>ü</b> '}]
VARIABLES: dict[str, Any] = {"messages": TURNS, "bos_token": "<s>", "tools": None, "add_generation_prompt": True}

FOR_EACH = "{% for m in messages %}{{ m['role'] }}: {{ m.content | trim }}\n{% endfor %}"
GOOD = [
    LLAMA3_CHAT_TEMPLATE,
    FOR_EACH,
    "  {% if add_generation_prompt %}\n  {{ bos_token }}\n  {% endif %}\nend",
    "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = 1 %}{% break %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}{% endgeneration %}{{ x }}|{% endfor %}",
    "{% macro said(m) %}[{{ m.role|upper }}]{{ caller() if caller else '' }}{% endmacro %}{{ said(messages[0]) }}",
    "{{ strftime_now('%Y') | length }}{{ dict(a=1)['a'] }}{{ missing }}{{ messages[-1]['content'][:3] }}",
]


@pytest.fixture(autouse=True)
def _short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nobody waits long for the endless ones."""
    monkeypatch.setattr(chat_template, "COMPUTING_S", 1.0)


@pytest.mark.parametrize("template", GOOD)
def test_templates_write_what_transformers_writes(template: str) -> None:
    others = {name: value for name, value in VARIABLES.items() if name != "messages"}
    theirs, _ = render_jinja_template(conversations=[TURNS], chat_template=template, **others)
    assert render(template, VARIABLES) == theirs[0]
    assert render(template, VARIABLES, trusted=True) == theirs[0]


BAD = {
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "it computes for more than 1 s",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}": (
        "MemoryError|it computes for more than 1 s"
    ),
    "{{ 'x' * 10000000000 }}": "it takes more than 1 GiB of memory",
    "{{ 'x'.ljust(10000000000) }}": "MemoryError",
    "{{ '%10000000000d' % 1 }}": "MemoryError|OverflowError|ValueError",
    "{{ 'x' * 10000001 }}": "it writes 10000001 characters",
    "{{ 9 ** (9 ** (9 ** 9)) }}": "it computes for more than 1 s|MemoryError|OverflowError",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "RecursionError",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "RecursionError|ended the process",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'a' + 1 }}": 'TypeError: can only concatenate str \\(not "int"\\) to str',
    "{% include '/etc/passwd' %}": "TypeError: no loader for this environment",
    "{% for": "unexpected",
    "{{ messages.x.y }}": "has no attribute 'x'",
    "{{ ().__class__.__base__.__subclasses__() }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe|not safely callable",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
}


@pytest.mark.parametrize("template", BAD)
def test_a_template_that_fails_or_does_not_end_ends_with_its_reason(template: str) -> None:
    with pytest.raises(DataError, match=BAD[template]):
        render(template, VARIABLES)
    # The next one is answered all the same, and not with what the last one was asked.
    assert render(FOR_EACH, VARIABLES).startswith("system: Be brief.")


def test_a_thread_that_is_not_the_main_one_is_bounded_too() -> None:
    found: list[str] = []

    def ask() -> None:
        try:
            render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", VARIABLES)
        except DataError as error:
            found.append(str(error))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(timeout=60)
    assert found == ["it computes for more than 1 s"]


def test_no_worker_outlives_who_asked_it_and_none_is_kept_for_long() -> None:
    code = (
        "import os, sys; from megarlhf.data import chat_template as c\n"
        "for n in range(6): c.render('{{ %d }}' % n, {})\n"
        "print(*[w.pid for w in c._workers.values()], flush=True); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == chat_template._MOST_WORKERS
    ends = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_signal_to_the_group_does_not_end_the_worker() -> None:
    render(FOR_EACH, VARIABLES)
    worker = chat_template._workers[os.getpid(), FOR_EACH]
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        worker.send_signal(number)
    assert render(FOR_EACH, VARIABLES).startswith("system: Be brief.")
    assert worker.poll() is None


def with_template(directory: Path, template: str) -> Tokenizer:
    build_tiny_tokenizer(words()).save(directory)
    (directory / "chat_template.jinja").write_text(template)
    return load_tokenizer(directory)


def test_a_prompt_of_no_token_is_refused(tmp_path: Path) -> None:
    for name, template in {"empty": "", "quiet": "{% for m in messages %}{% endfor %}"}.items():
        with pytest.raises(DataError, match=rf"template of {tmp_path / name} writes nothing of the prompt"):
            with_template(tmp_path / name, template).encode_prompt("How many?", "chat")


def test_what_the_template_raises_names_the_tokenizer_and_the_roles(tmp_path: Path) -> None:
    tokenizer = with_template(tmp_path, "{{ 1 / 0 }}")
    with pytest.raises(DataError, match=rf"of {tmp_path} refuses the roles \['user'\]: ZeroDivisionError.*; mend chat"):
        tokenizer.encode_prompt("How many?", "chat")
