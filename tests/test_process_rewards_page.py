"""docs/process_rewards.md: its commands are taken as they stand, and one after another they lead where it says."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megarlhf import cli
from megarlhf.commands.table import named_at, program
from megarlhf.config import load_config
from tests.helpers.documents import blocks
from tests.test_cli_runs import EXAMPLES, ROOT, megarlhf

PAGE = (ROOT / "docs" / "process_rewards.md").read_text(encoding="utf-8")
LINES = [shlex.split(line)[1:] for block in blocks(PAGE) for line in block.splitlines() if line.startswith("megarlhf ")]


def parted(words: list[str]) -> tuple[str, Path | None, list[str]]:
    """Command, file and settings."""
    name, rest = named_at(words)
    file = ROOT / rest[1] if rest[0] == "--config" else None
    return name, file, [word for word in rest if "=" in word]


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_a_command_is_one_and_its_settings_are_taken(words: list[str]) -> None:
    name, file, settings = parted(words)
    config, _ = program(cli.commands()[name], file, settings)
    load_config(config, file, settings)


def test_the_page_goes_the_whole_way() -> None:
    names = [named_at(words)[0] for words in LINES]
    whole = ["generate", "judge", "rows", "label_steps", "process_reward", "eval reward", "judge", "eval pool", "ppo"]
    assert names == whole


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_commands_run_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the SFT example on; the process model ranks the pool better than chance does, and PPO gains by it."""
    monkeypatch.setattr("tests.test_cli_runs.TIMEOUT_S", 900)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    said = {}
    for words in (["sft", "--config", "examples/sft_tiny.yaml", "layout.data=2"], *LINES):
        done = megarlhf(*words, directory=tmp_path)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        said[named_at(words)[0]] = done.stdout + done.stderr
    assert "first error found" in said["eval reward"]
    assert "steps (min)" in said["eval pool"]
    first, last = (
        line.split("\u2502")
        for line in said["eval pool"].splitlines()
        if line.startswith("\u2502") and "KL" not in line and line.split()[1] in ("1", "4")
    )
    assert float(last[3].split()[0]) > float(first[3].split()[0]) + 0.1
