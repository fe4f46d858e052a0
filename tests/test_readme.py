"""What README says of commands, settings, tools, exit codes and files is what the product has."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megarlhf import cli
from megarlhf.config import describe, load_config
from megarlhf.errors import ConfigError, MegarlhfError, RunStopped, TrainingError
from tests.helpers.documents import blocks

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [line for block in blocks(README) for line in block.splitlines()]
COMMANDS = cli.commands()
NAMES = "|".join(sorted(COMMANDS, key=len, reverse=True))
"""Of commands, those of two words first."""
COMMAND = re.compile(rf"(?:^|srun )megarlhf ((?:{NAMES})\b|\w+)([^|]*)")
SHOWN = [match for line in LINES if (match := COMMAND.search(line)) and "demo seed=S" not in line]
TABLE = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", README, re.MULTILINE))


def settings_of(command: str) -> Any:
    return cli.program(COMMANDS[command])[0]


@cache
def every_setting() -> set[str]:
    """Names of all settings and groups of them, dotted, of every command."""
    names = {row.name for command in COMMANDS for row in describe(settings_of(command))}
    return names | {part for name in names for part in (name, name.rpartition(".")[0]) if part}


def test_there_is_something_to_check() -> None:
    assert len(SHOWN) >= 8
    assert {match[1] for match in SHOWN} >= {"sft", "reward", "ppo", "report", "doctor", "replay", "score"}


@pytest.mark.parametrize("shown", SHOWN, ids=lambda match: match[0].strip())
def test_a_command_is_one_and_its_settings_are_taken(shown: re.Match[str]) -> None:
    words = shlex.split(shown[2].split("||")[0], comments=True)
    if "--help" in words:
        return
    at = words.index("--config") + 1 if "--config" in words else 0
    rest = [word for index, word in enumerate(words) if not at or index not in (at - 1, at)]
    overrides = cli.named(COMMANDS[shown[1]].listed, rest)
    assert all("=" in word for word in overrides), "only settings and --config FILE"
    file = ROOT / words[at] if at else None
    if file is not None and not file.exists():
        assert words[at] == "run.yaml", "the reader's own file"
        file = ROOT / "examples" / "ppo_tiny.yaml"
    load_config(settings_of(shown[1]), file, overrides)


@pytest.mark.parametrize("span", sorted(set(re.findall(r"`([a-z_.0-9]+(?:=|: )[^`]*)`", README))))
def test_a_setting_that_the_text_names_is_one(span: str) -> None:
    assert re.split(r"=|: ", span)[0] in every_setting()


def test_the_tables_are_those_of_the_product() -> None:
    assert {name: TABLE.get(name) for name in COMMANDS} == {name: made.summary for name, made in COMMANDS.items()}
    tools = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").glob("*.[ps][yh]")}
    assert {name for name in TABLE if name.startswith("tools/")} == tools


def test_exit_codes() -> None:
    (told,) = re.findall(r"^Exit codes: (.*?)\n\n", README, re.DOTALL | re.MULTILINE)
    codes = dict(re.findall(r"\b(\d+) (\w+(?: \w+)*)", " ".join(told.split())))
    assert set(map(int, codes)) == {
        0,
        MegarlhfError.exit_code,
        TrainingError.exit_code,
        RunStopped.exit_code,
        cli.INTERRUPTED,
    }
    assert codes[str(ConfigError.exit_code)] == "the input must be changed"
    assert codes[str(cli.FAILED)] == "the run failed"


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("python tools/")])
def test_a_tool_takes_the_arguments_that_are_shown(line: str) -> None:
    _, path, *arguments = shlex.split(line, comments=True)
    tool = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    defined = vars(tool)
    given = defined["parse"](arguments) if "parse" in defined else defined["_parser"]().parse_args(arguments)
    assert isinstance(given, argparse.Namespace)


def test_files_that_are_named_are_there() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    shown = re.findall(r"\b(?:examples|tools)/\w+\.\w+", README)
    assert not [path for path in links + shown if not (ROOT / path).exists()]


def test_make_targets_are_those_of_the_makefile() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)`|[(;] ?make ([a-z-]+):", README, re.MULTILINE))
    assert {name for found in named for name in found if name} <= set(targets)


def test_the_layers_are_those_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (told,) = re.findall(r"cli -> .*", README)
    layers = [line.replace("megarlhf.", "") for line in contracts[0]["layers"] if not line.startswith("(")]
    assert [set(layer.split(" | ")) for layer in told.split(" -> ")] == [
        set(layer.split(" | ")) for layer in layers[: len(told.split(" -> "))]
    ]
