"""Every command: what it does, and where its settings and its entry are, which are imported as late as possible."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megarlhf.errors import ConfigError

if TYPE_CHECKING:
    from megarlhf.config import Config


class Command(NamedTuple):
    """A command: what it does, and where its settings class and its entry `main(cfg, argv) -> exit code` are."""

    summary: str
    settings: str = ""
    entry: str = ""
    listed: str = ""
    """The setting that words without = are values of; empty where there may be none."""
    goes_on: bool = False
    """The same command takes up again what a signal stopped."""
    trainer: str = ""
    """The trainer whose command it is, and who has both. Of a command with places of its own, the one whose run it is
    about, unless `trainer=NAME` is given; both are then functions of that name."""


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "the whole pipeline on a laptop: data, SFT, reward model, PPO, evaluation, report",
        "megarlhf.commands.demo:DemoConfig",
        "megarlhf.commands.demo:main",
    ),
    "doctor": Command(
        "check this machine and a run's settings: environment, and gates for correct results",
        "megarlhf.commands.doctor:settings_of",
        "megarlhf.commands.doctor:main",
        trainer="ppo",
    ),
    "plan": Command(
        "without a GPU: bytes of a run by role and phase, whether it fits, and the fastest layouts",
        "megarlhf.commands.plan:settings_of",
        "megarlhf.commands.plan:main",
        trainer="ppo",
    ),
    "generate": Command(
        "sample responses to a prompt or a file of prompts",
        "megarlhf.commands.generate:GenerateConfig",
        "megarlhf.commands.generate:main",
    ),
    "eval": Command(
        "accuracy on held-out problems, sampled and greedy, with intervals",
        "megarlhf.commands.evaluate:EvalConfig",
        "megarlhf.commands.evaluate:main",
    ),
    "eval reward": Command(
        "what a reward model is worth on pairs, judged responses and judged steps",
        "megarlhf.commands.evaluate_reward:EvalRewardConfig",
        "megarlhf.commands.evaluate_reward:main",
    ),
    "judge": Command(
        "scores of the responses of a pool, by judges as a policy's",
        "megarlhf.commands.judge:PoolJudgesConfig",
        "megarlhf.commands.judge:main",
    ),
    "eval pool": Command(
        "from a judged pool: best-of-n, pass@n and the vote of n, with intervals",
        "megarlhf.commands.evaluate_pool:EvalPoolConfig",
        "megarlhf.commands.evaluate_pool:main",
    ),
    "rows": Command(
        "from a judged pool: demonstrations, preference pairs or judged responses to train on",
        "megarlhf.commands.rows:RowsConfig",
        "megarlhf.commands.rows:main",
    ),
    "score": Command(
        "log-probs of given responses, or a reward model's scores, of a file of rows",
        "megarlhf.commands.score:ScoreConfig",
        "megarlhf.commands.score:main",
    ),
    "label_steps": Command(
        "what each step of given solutions is worth, by completions that go on from it",
        "megarlhf.commands.label_steps:LabelStepsConfig",
        "megarlhf.commands.label_steps:main",
    ),
    "replay": Command(
        "take a failed step again on one device, from the capsule that the run left",
        "megarlhf.commands.replay:ReplayConfig",
        "megarlhf.commands.replay:main",
    ),
    "convert": Command(
        "a Llama 3 model from a Hugging Face directory, or to one",
        "megarlhf.commands.convert:ConvertConfig",
        "megarlhf.commands.convert:main",
    ),
    "examples": Command(
        "list the run files and launch scripts that come with the package, or copy them",
        "megarlhf.commands.examples:ExamplesConfig",
        "megarlhf.commands.examples:main",
    ),
    "completion": Command(
        "print what completes commands, settings and their values in a shell",
        "megarlhf.commands.completion:CompletionConfig",
        "megarlhf.commands.completion:main",
    ),
    "report": Command(
        "make the page of a run again; of several, a page that compares them",
        "megarlhf.commands.report:ReportConfig",
        "megarlhf.commands.report:main",
        listed="run_dir",
    ),
}


def named_at(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command that the first words name, of one or of two words, and the words behind it."""
    name = " ".join(words[:2])
    return (name, words[2:]) if name in COMMANDS and len(words) > 1 else (words[0], words[1:])


def file_and_settings(name: str, rest: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Of the words behind the command `name`, the file of `--config FILE` and the settings."""
    path: Path | None = None
    overrides: list[str] = []
    words = iter(rest)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in ("--config", "-c"):
            file = value if equals else next(words, "")
            if not file or path is not None:
                raise ConfigError(f"--config {file}: give it once, with one YAML file; megarlhf {name} --help.")
            path = Path(file)
        elif word.startswith("-"):
            raise ConfigError(f"unknown option {word}; settings are written name=value, without dashes.")
        else:
            overrides.append(word)
    return path, overrides


def commands() -> dict[str, Command]:
    """Every command: those above, and each trainer of the package by its name."""
    from megarlhf.trainers.find import trainers

    train = {name: Command(does, goes_on=True, trainer=name) for name, does in trainers().items()}
    return {"demo": COMMANDS["demo"], **train, **COMMANDS}


def program(
    command: Command, path: Path | None = None, overrides: Sequence[str] = ()
) -> tuple[type[Config], Callable[[Any, Sequence[str]], int]]:
    """The command's settings class and its entry, imported as late as possible; for the trainer that is given."""
    if not command.settings:
        from megarlhf.trainers.find import trainer_named

        own = trainer_named(command.trainer)
        return own.config, own.main
    settings, entry = _load(command.settings), _load(command.entry)
    if not command.trainer:
        return settings, entry
    from megarlhf.config.load import given

    chosen = str(given(path, overrides).get("trainer", command.trainer))
    return settings(chosen), partial(entry, chosen)


def _load(where: str) -> Any:
    """Import what a Command names, as `module:attribute`."""
    module, _, attribute = where.partition(":")
    return vars(importlib.import_module(module))[attribute]
