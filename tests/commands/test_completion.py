"""The completion script in real shells: what it offers, and what Tab makes of a line that is typed."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Literal

import pytest

from megarlhf import cli
from megarlhf.commands.completion import script
from megarlhf.commands.table import commands, program
from megarlhf.config import FieldHelp, describe

TIMEOUT_S = 60
SHELLS = [
    pytest.param(name, marks=pytest.mark.skipif(shutil.which(name) is None, reason=f"there is no {name} here"))
    for name in ("bash", "zsh")
]
NO_SETTINGS = {
    "bash": ("bash", "--noprofile", "--norc"),
    "zsh": ("zsh", "-f"),
}


@cache
def rows() -> dict[str, list[FieldHelp]]:
    return {name: describe(program(made)[0]) for name, made in commands().items()}


@pytest.fixture
def written(tmp_path: Path) -> dict[str, Path]:
    """The script of each shell, in a directory with a few files."""
    shells: tuple[Literal["bash", "zsh"], ...] = ("bash", "zsh")
    for shell in shells:
        (tmp_path / f"complete.{shell}").write_text(script(shell, rows()))
    (tmp_path / "my model").mkdir()
    (tmp_path / "run.yaml").touch()
    return {shell: tmp_path / f"complete.{shell}" for shell in shells}


def said(shell: str, file: Path, text: str) -> list[str]:
    """What a program of the shell prints once it has the script."""
    begun = f"compdef() {{ :; }}\nsource {shlex.quote(str(file))}\n{text}"
    done = subprocess.run(
        [*NO_SETTINGS[shell], "-c", begun], capture_output=True, text=True, cwd=file.parent, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_has_every_setting_and_every_choice(shell: str, written: dict[str, Path]) -> None:
    names = {name: [row.name for row in of if row.type != "mapping"] for name, of in rows().items()}
    asked = "\n".join(f"_megarlhf_settings '{name}'" for name in names)
    assert [line.split() for line in said(shell, written[shell], asked)] == list(names.values())
    for name, values in (
        ("ppo:offload", ["host", "none"]),
        ("ppo:tensorboard", ["true", "false"]),
        ("ppo:run_dir", ["FILES"]),
        ("sft:model", ["FILES"]),
        ("grpo:judges.mine.kind", ["model", "rule", "function", "remote", "code_tests", "process"]),
        ("ppo:kl_coef", []),
        ("eval pool:output", ["FILES"]),
    ):
        assert " ".join(said(shell, written[shell], f"_megarlhf_values '{name}'")).split() == values


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("megarlhf pp", ["ppo"]),
        ("megarlhf ", [*dict.fromkeys(name.split()[0] for name in commands()), "--help", "--version"]),
        ("megarlhf eval p", ["pool", "prompts."]),
        ("megarlhf eval pool g", ["gold="]),
        ("megarlhf eval pool gold=answer pool=ru", ["run.yaml"]),
        ("megarlhf eval pool --help pr", ["proxy"]),
        ("megarlhf eval samp", ["sampling."]),
        ("megarlhf ppo sample", ["sampler_correction.", "samples=", "samples_every="]),
        ("megarlhf ppo seed=3 actor.optim.s", ["actor.optim.schedule="]),
        ("megarlhf ppo actor.optim.schedule=", ["constant", "linear", "cosine"]),
        ("megarlhf grpo judges.mine.ki", ["judges.mine.kind="]),
        ("megarlhf grpo judges.mine.kind=r", ["rule", "remote"]),
        ("megarlhf ppo --help sampling.t", ["sampling.temperature", "sampling.top_k", "sampling.top_p"]),
        ("megarlhf ppo --help al", ["all"]),
        ("megarlhf ppo --config r", ["run.yaml"]),
        ("megarlhf sft model=m", ["my model"]),
        ("megarlhf ppo --", ["--config", "--help"]),
        ("megarlhf ppo kl_coef=", []),
        ("megarlhf nothing ru", []),
    ],
)
def test_bash_offers(line: str, offered: list[str], written: dict[str, Path]) -> None:
    text = f"COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}; _megarlhf; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    assert [word for word in said("bash", written["bash"], text) if word] == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_a_name_of_the_user_s_may_stand_anywhere(shell: Literal["bash", "zsh"], tmp_path: Path) -> None:
    names = ("data.parts.NAME.source", "data.parts.NAME.weight", "data.seed", "judges.NAME.weight")
    file = tmp_path / "complete"
    file.write_text(script(shell, {"sft": [FieldHelp(name, "float", "1", "") for name in names]}))
    for word, offered in (
        ("d", ["data."]),
        ("data.", ["data.parts.", "data.seed="]),
        ("data.parts.", []),
        ("data.parts.mine.", ["data.parts.mine.source=", "data.parts.mine.weight="]),
        ("judges.mine.w", ["judges.mine.weight="]),
    ):
        assert said(shell, file, f"_megarlhf_names sft {word}") == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes_what_is_typed(shell: str, written: dict[str, Path]) -> None:
    """At a real prompt, which completes with readline or with zle."""
    setup = "autoload -Uz compinit; compinit -u -D; " if shell == "zsh" else ""
    setup += f"source {shlex.quote(str(written[shell]))}; megarlhf() {{ printf GOT; printf '<%s>' \"$@\"; echo; }}\n"
    typed = "megarlhf gr\tsampling.temp\t0.5 offl\tho\t--config ru\t\n"
    expected = "GOT<grpo><sampling.temperature=0.5><offload=host><--config><run.yaml>"
    assert expected in at_a_prompt(shell, setup, typed, expected, written[shell].parent)


def at_a_prompt(shell: str, setup: str, typed: str, until: str, directory: Path) -> str:
    """What the terminal shows once `setup` has run and `typed` is typed, up to `until`."""
    main, side = pty.openpty()
    environment = {**os.environ, "TERM": "vt100", "PS1": "ready ", "HISTFILE": "", "ZDOTDIR": str(directory)}
    command = [*NO_SETTINGS[shell], "-i"]
    with subprocess.Popen(
        command, stdin=side, stdout=side, stderr=side, env=environment, cwd=directory, start_new_session=True
    ) as process:
        os.close(side)
        os.write(main, setup.encode())
        shown(main, "ready ")
        os.write(main, typed.encode())
        found = shown(main, until)
        process.kill()
    os.close(main)
    return found


def shown(terminal: int, until: str) -> str:
    """What comes from a terminal, up to `until`."""
    text, deadline = "", time.monotonic() + TIMEOUT_S
    while until not in text and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            text += os.read(terminal, 1 << 16).decode(errors="replace")
    return text


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_command_prints_it(shell: Literal["bash", "zsh"], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", f"shell={shell}"]) == 0
    assert capfd.readouterr().out == script(shell, rows())
