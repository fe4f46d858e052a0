"""Help that fits: what one needs first, groups and settings by name, and no name broken at 80 columns."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from megarlhf import cli
from megarlhf.commands import help as help_
from megarlhf.commands.table import commands, program
from megarlhf.config import describe, load_config
from megarlhf.errors import ConfigError
from tests.trainers.toy_reinforce import ReinforceConfig

COLUMNS = 80
MOST = 15
"""Settings that one is shown first."""
COMMANDS = tuple(commands())


@cache
def settings_of(command: str) -> Any:
    return program(commands()[command])[0]


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines that a command line prints."""
    assert cli.main(words) == 0
    return capsys.readouterr().out.splitlines()


def names(lines: list[str]) -> list[str]:
    """The first word of every line that is not indented."""
    return [line.split()[0] for line in lines if line[:1].strip()]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_name_is_broken_at_80_columns(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row.name for row in describe(settings_of(command))]
    lines = shown(capsys, *command.split(), "--help", "all")
    assert max(map(len, lines)) <= COLUMNS
    assert [name for name in names(lines) if name in rows] == rows
    for group in {name.rpartition(".")[0] for name in rows} - {""}:
        lines = shown(capsys, *command.split(), "--help", group)
        assert max(map(len, lines)) <= COLUMNS
        assert set(names(lines)) >= {name for name in rows if name.startswith(f"{group}.")}
    for name in rows:
        assert names(shown(capsys, *command.split(), "--help", name))[0] == name


@pytest.mark.parametrize("command", COMMANDS)
def test_first_comes_what_one_needs_first(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(command)
    rows = {row.name: row for row in describe(settings)}
    lines = shown(capsys, *command.split(), "--help")
    assert max(map(len, lines)) <= COLUMNS
    required = [name for name, row in rows.items() if row.default == "required" and ".NAME." not in name]
    if len(rows) <= help_.FEW:
        assert [name for name in names(lines) if name in rows] == list(rows)
        return
    assert 5 <= len(settings.first) <= MOST + (command == "doctor")  # which says whose run it is, too
    assert set(settings.needed) <= set(required) <= set(settings.first)
    groups = next(at for at, line in enumerate(lines) if line.startswith("Groups,"))
    first = [name for name in names(lines[:groups]) if name in rows]
    assert set(first[: len(required)]) == set(required)
    assert sorted(first) == sorted(settings.first)
    # Everything else is named, by itself or as a group.
    named = {*first, *(word.rstrip(",.") for line in lines[groups:] for word in line.split())}
    assert {name if "." not in name else f"{name.partition('.')[0]}.*".rstrip(",.") for name in rows} <= named


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ppo", "--help", "sampling"], ["sampling.temperature", "sampling.top_k", "sampling.top_p"]),
        (["ppo", "--help", "sampling.*"], ["sampling.temperature", "sampling.max_new_tokens"]),
        (["ppo", "--help", "actor.optim", "kl_coef"], ["actor.optim.lr", "kl_coef"]),
        (["ppo", "-h", "judges.mine.rule"], ["judges.NAME.rule"]),
        (["ppo", "--help", "judges"], ["judges", "judges.NAME.kind", "judges.NAME.isolation"]),
        (["doctor", "trainer=grpo", "--help", "group_std"], ["group_std.eps"]),
        (["tests.trainers.toy_reinforce", "--help", "all"], [row.name for row in describe(ReinforceConfig)]),
    ],
)
def test_a_topic_is_a_group_or_a_setting(words: list[str], found: list[str], capsys: pytest.CaptureFixture) -> None:
    lines = shown(capsys, *words)
    assert set(found) <= set(names(lines))
    assert "all" in words or "kl_bound" not in names(lines)


@pytest.mark.parametrize(
    ("topic", "said"),
    [
        ("samplng", "unknown setting samplng; did you mean sampling?"),
        ("temperature", "unknown setting temperature; did you mean sampling.temperature?"),
        ("xyzzy", "unknown setting xyzzy; run the command with --help all to see every setting."),
    ],
)
def test_another_topic_is_refused_with_the_nearest(topic: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ppo", "--help", topic]) == 2
    assert capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("command", [name for name in COMMANDS if settings_of(name).needed])
def test_what_is_said_to_be_required_is(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else is given."""
    monkeypatch.chdir(tmp_path)
    settings = settings_of(command)
    others = {
        "reward": ["pairs.source=arithmetic"],
        "process_reward": ["steps.source=arithmetic"],
        "dpo": ["pairs.source=arithmetic"],
        "eval": ["prompts.source=arithmetic"],
    }
    policy = ["reward.init=tiny-xs", "prompts.source=arithmetic", "global_batch=8", "rollout_batch=8"]
    given = [] if command == "eval" else ["run_dir=run"]
    cfg = load_config(settings, None, [*given, "tokenizer=arithmetic", *others.get(command, policy)])
    if command == "eval":
        from megarlhf.commands.evaluate import prepare
    elif command == "plan":
        from megarlhf.commands.plan import job_of
        from megarlhf.trainers.ppo import TRAINER

        prepare = partial(job_of, TRAINER.workload(cfg))
    else:
        from megarlhf.trainers.find import trainer_named

        prepare = trainer_named(command).prepare
    (needed,) = settings.needed
    with pytest.raises(ConfigError, match=f"^{needed} is empty; name a model"):
        prepare(cfg)


def test_without_a_word_it_says_what_to_type_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= COLUMNS
    typed = [line.split() for line in lines if line.startswith("  megarlhf ")]
    assert [words[1] for words in typed] == ["demo", "sft", "reward", "grpo", "eval", "examples"]
    for _, command, *words in typed:
        load_config(settings_of(command), None, words)


def test_a_terminal_of_80_columns_breaks_no_name_either() -> None:
    """A real one: what it is told is its width."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    command = [sys.executable, "-m", "megarlhf.cli", "convert", "--help"]
    with subprocess.Popen(command, stdout=side, stderr=side, env={**environment, "TERM": "dumb"}) as process:
        os.close(side)
        said = b""
        try:
            while part := os.read(main, 1 << 16):
                said += part
        except OSError:  # how Linux says that the other side is closed
            pass
    os.close(main)
    assert process.returncode == 0, said
    lines = said.decode().replace("\r", "").splitlines()
    assert max(map(len, lines)) <= COLUMNS
    assert {row.name for row in describe(settings_of("convert"))} <= set(names(lines))
