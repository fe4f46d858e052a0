"""What models, files and exceptions say reaches the terminal as text: every exit is tried with the same hostile one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import megarlhf
from megarlhf import cli
from megarlhf.errors import DataError, complain, printable
from megarlhf.observe.progress import Progress
from megarlhf.observe.terminal import Terminal

HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\r\b\x7f\u202egnp.exe\u2066\u200b\ud83d [bold]x[/bold] [/nothing] :smile:"
SHOWN = (
    "\\u001b]0;title\\u0007\\u001b[2J\\u009b31m\\u000d\\u0008\\u007f\\u202egnp.exe\\u2066\\u200b\\ud83d "
    "[bold]x[/bold] [/nothing] :smile:"
)


def test_controls_are_escapes_and_all_else_is_itself() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable(SHOWN) == SHOWN
    plain = "a\tb\nÄ 漢字 👩‍🚀 é ~"
    assert printable(plain) == plain
    assert json.loads(printable(json.dumps(HOSTILE, ensure_ascii=False))) == HOSTILE


def test_errors_of_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: list[str]) -> int:
        raise DataError(f"bad: {HOSTILE}; mend it.")

    monkeypatch.setattr(cli, "_run", fail)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert cli.main(["x"]) == 2
    assert capsys.readouterr().err == f"bad: {SHOWN}; mend it.\n"


def test_what_ranks_and_their_launcher_complain_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    complain(HOSTILE)
    assert capsys.readouterr().err == f"{SHOWN}\n"


@pytest.mark.parametrize("forced", [False, True])
def test_tables_and_lines_of_a_console(forced: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console = Terminal(width=300, force_terminal=forced)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE, style="red"))
    console.print(HOSTILE, soft_wrap=True)
    console.print(table)
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 4
    # Of a Text rich itself drops BEL, backspace and carriage return.
    assert SHOWN.replace("\\u0007", "").replace("\\u0008", "").replace("\\u000d", "") in out
    assert re.sub(r"\x1b\[[0-9;]*m", "", out).count("\x1b") == 0
    assert ("\x1b[31m" in out) == forced
    assert not set(out) & set("\x07\x08\r\x7f\x9b\u202e\u2066\u200b\ud83d")


def test_warnings_logs_and_bugs_of_other_libraries() -> None:
    code = (
        "import logging, sys, warnings; from megarlhf.observe.terminal import guard\n"
        "for _ in range(5000): guard()\n"  # a program that runs many commands
        f"text = {HOSTILE!r}\n"
        "warnings.warn(text); logging.getLogger('x').error('%s', text); raise RuntimeError(text)"
    )
    environment = {"PYTHONPATH": str(Path(megarlhf.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.stderr.count(SHOWN) == 3
    assert "\x1b" not in done.stderr
    assert "Traceback" in done.stderr


def test_a_progress_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, HOSTILE, enabled=True) as bar:
        bar.advance(2)
    assert "\x1b" not in capsys.readouterr().err


def test_nothing_speaks_to_the_terminal_without_escaping() -> None:
    package = Path(megarlhf.__file__).parent
    # Of the tools, the one that repeats what files say; the others print what they have measured.
    tools = [package.parent / "tools" / "compare_runs.py"]
    speaks = re.compile(r"rich\.console|(?<![\w.])print\(|sys\.(stderr|stdout)\.write\(")
    found = {
        f"{os.path.relpath(path, package)}: {line.strip()}"
        for path in (*package.rglob("*.py"), *tools)
        for line in path.read_text(encoding="utf-8").splitlines()
        if speaks.search(line) and "printable(" not in line
    }
    assert found == {
        'cli.py: sys.stderr.write("interrupted\\n")',
        # Its parent reads this, as the two sides of a test in the sandbox read each other's.
        'data/template_worker.py: sys.stdout.write(f"{json.dumps(answer)}\\n")',
        "judges/two_sides.py: print(json.dumps(asked), file=self.writing, flush=True)",
        "judges/two_sides.py: print(json.dumps(said), file=writing, flush=True)",
        # Programs that are demonstrated, and one that the sandbox is tried with.
        "data/programs.py: n = int(input()); n = n + 3; n = n * 2; print(n)",
        'data/programs.py: return f"print({self.totals(self.example)[-1]})"',
        'data/programs.py: return f"n = int(input()); {steps}print(n)"',
        'judges/sandbox.py: (said,), reason = _tried(sandbox, Job({"program.py": "print(6 * 7)"}, ["program.py"]))',
        "observe/terminal.py: from rich.console import Console, ConsoleOptions, RenderableType",
    }
