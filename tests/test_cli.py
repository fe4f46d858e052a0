"""The command line: exit codes, one message per mistake, and help that is complete and quick."""

from __future__ import annotations

import ast
import subprocess
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from megarlhf import cli
from megarlhf.config import Config
from megarlhf.errors import CheckpointError, DataError, LayoutError, TrainingError
from megarlhf.observe.writers import RunWriter


class PlayConfig(Config):
    """Settings of a command made up for these tests."""

    times: int = 3
    """How often, a count. Source: these tests."""
    word: str
    """What to say."""


def play(cfg: PlayConfig, argv: Sequence[str]) -> int:
    """Fail as the word says, else echo."""
    errors = {"layout": LayoutError, "data": DataError, "checkpoint": CheckpointError, "training": TrainingError}
    if cfg.word in errors:
        raise errors[cfg.word](f"{cfg.word} is wrong: {cfg.times}; change it.")
    if cfg.word == "interrupt":
        raise KeyboardInterrupt
    print(cfg.word * cfg.times, *argv)
    return 0


@pytest.fixture(autouse=True)
def made_up_command(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("made_up")
    vars(module).update(PlayConfig=PlayConfig, play=play)
    monkeypatch.setitem(sys.modules, "made_up", module)
    monkeypatch.setitem(cli.COMMANDS, "play", cli.Command("play", "made_up:PlayConfig", "made_up:play"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_settings_come_from_file_and_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "play.yaml"
    file.write_text("word: ab\ntimes: 5\n")
    arguments = ["play", "--config", str(file), "times=2"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"abab {' '.join(arguments)}\n"
    assert cli.main(["play", f"--config={file}"]) == 0
    assert capsys.readouterr().out.startswith("ababababab ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["play", "word=layout"], 2, "layout is wrong: 3; change it.\n"),
        (["play", "word=data"], 2, "data is wrong: 3; change it.\n"),
        (["play", "word=checkpoint"], 2, "checkpoint is wrong: 3; change it.\n"),
        (["play", "word=training"], 1, "training is wrong: 3; change it.\n"),
        (["play", "word=interrupt"], 130, "interrupted\n"),
        (["play"], 2, "missing setting word (text); add it to the file or give word=... on the command line.\n"),
        (["play", "word=a", "tmes=1"], 2, "unknown setting tmes = 1 (from the command line); did you mean times?\n"),
        (["play", "--word", "a"], 2, "unknown option --word; settings are written name=value, without dashes.\n"),
        (["play", "--config"], 2, "--config : give it once, with one YAML file; megarlhf play --help.\n"),
        (
            ["play", "--config", "no.yaml"],
            2,
            "config file no.yaml: No such file or directory; give a readable YAML file",
        ),
        (["pqo"], 2, "unknown command pqo; did you mean ppo?\n"),
        (
            ["xyzzy"],
            2,
            "unknown command xyzzy; choose one of demo, cispo, dapo, dpo, dr_grpo, grpo, gspo, ppo, process_reward, ",
        ),
    ],
)
def test_mistakes_end_with_one_message_and_a_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_errors_name_the_rank_when_there_are_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert cli.main(["play", "word=data"]) == 2
    assert capsys.readouterr().err.startswith("rank 3: data is wrong")


@pytest.mark.parametrize(("tasks", "speaks"), [("1", True), ("8", False)])
def test_of_the_tasks_of_a_node_one_speaks_before_they_are_ranks(
    tasks: str, speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """srun sets these; a batch script itself has the number of a task and is alone."""
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    assert cli.main(["play", "word=data"]) == 2
    assert ("data is wrong" in capsys.readouterr().err) == speaks


def test_other_errors_are_bugs_and_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["made_up"], "play", lambda cfg, argv: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["play", "word=a"])


def test_help_lists_every_setting_with_type_default_and_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["play", "word=ignored", "--help"]) == 0
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines()]
    assert rows[rows.index("times int default 3") + 1] == "How often, a count. Source: these tests."
    assert rows[rows.index("word text required") + 1] == "What to say."


def test_help_introduces_groups_and_needs_no_required_setting(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ppo", "--help", "all"]) == 0
    rows = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    (heading,) = (index for index, row in enumerate(rows) if row.startswith("actor.* The policy; `actor.init`"))
    assert [row.split()[0] for row in rows[heading:] if row.startswith("actor.")][:4] == [
        *("actor.*", "actor.init", "actor.optim.*", "actor.optim.lr"),
    ]


def test_report_command_makes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunWriter(tmp_path) as writer:
        writer.log({"policy/loss": 0.5}, step=1)
    assert cli.main(["report", f"run_dir={tmp_path}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert "Policy loss" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert cli.main(["report", "run_dir=nowhere"]) == 2
    assert "run_dir nowhere: no metrics.jsonl" in capsys.readouterr().err


def test_top_level_help_does_not_load_torch() -> None:
    code = (
        "import sys; from megarlhf.cli import main; assert main(['--help']) == 0;"
        "print([m for m in ('torch', 'pydantic', 'transformers', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in cli.commands() if name != "play")
    assert "unknown" not in done.stdout


@pytest.mark.parametrize(
    "where", [place for command in cli.COMMANDS.values() for place in (command.settings, command.entry)]
)
def test_every_command_has_its_settings_and_its_entry(where: str) -> None:
    module, _, name = where.partition(":")
    file = Path(cli.__file__).parents[1] / f"{module.replace('.', '/')}.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body
    defined = {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    imported = {alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert name in defined | imported
