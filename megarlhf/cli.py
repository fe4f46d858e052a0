"""The command line: `megarlhf <command> --config FILE name=value ...`, and `--help` that explains every setting."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megarlhf import __version__
from megarlhf.errors import (
    BAD_INPUT,
    DONE,
    FAILED,
    INTERRUPTED,
    STOPPED,
    ConfigError,
    MegarlhfError,
    complain,
    printable,
)

if TYPE_CHECKING:
    from megarlhf.config import Config
    from megarlhf.observe.terminal import Terminal


class Command(NamedTuple):
    """A command: what it does, and where its settings class and its entry `main(cfg, argv) -> exit code` are."""

    summary: str
    settings: str = ""
    entry: str = ""
    goes_on: bool = False
    """The same command takes up again what a signal stopped."""
    trainer: str = ""
    """The trainer whose command it is, and who has both. Of a command with places of its own, the one whose run it is
    about, unless `trainer=NAME` is given; both are then functions of that name."""


COMMANDS = {
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
    "score": Command(
        "log-probs of given responses, or a reward model's scores, of a file of rows",
        "megarlhf.commands.score:ScoreConfig",
        "megarlhf.commands.score:main",
    ),
    "replay": Command(
        "take a failed step again on one device, from the capsule that the run left",
        "megarlhf.commands.replay:ReplayConfig",
        "megarlhf.commands.replay:main",
    ),
    "report": Command(
        "make the page of a run again", "megarlhf.commands.report:ReportConfig", "megarlhf.commands.report:main"
    ),
}


def commands() -> dict[str, Command]:
    """Every command: those above, and each trainer of the package by its name."""
    from megarlhf.trainers.find import trainers

    train = {name: Command(does, goes_on=True, trainer=name) for name, does in trainers().items()}
    return {"demo": COMMANDS["demo"], **train, **COMMANDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0, or 2 when the input must be changed, 1 when a run failed, 75 when it was stopped and the same command goes on,
    130 when it was interrupted.
    """
    from megarlhf.observe.terminal import guard

    guard()
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Megatron-Core says this four times while it is imported; a run says once, in a table, what it uses instead.
    warnings.filterwarnings("ignore", message="(Transformer Engine|Apex).* not installed", category=UserWarning)
    try:
        return _run(arguments)
    except MegarlhfError as error:
        if _speaks():
            complain(f"{_who()}{error}")
        return error.exit_code
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        from megarlhf.observe.files import reason, refused, remedy

        if not refused(error):
            raise
        place = Path(error.filename or ".")
        sys.stderr.write(printable(f"{_who()}{place}: {reason(error)}; {remedy(place)}.\n"))
        return FAILED


def _speaks() -> bool:
    """Whether this process says for all ranks of its machine, which read the same settings, what is wrong."""
    # A task of srun has no LOCAL_RANK before it is made a rank.
    task = os.environ.get("SLURM_LOCALID", "0") if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 else "0"
    return os.environ.get("LOCAL_RANK", task) == "0"


def _interrupted() -> int:
    if _speaks():
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
    return INTERRUPTED


def _stopped_at_start(number: int) -> int:
    if _speaks() and "MEGARLHF_LAUNCHER" not in os.environ:  # which says so itself
        name = signal.Signals(number).name
        sys.stderr.write(printable(f"stopped by {name} before the first step; start the same command again.\n"))
        sys.stderr.flush()
    return STOPPED


@contextmanager
def _ending_at_once(*, goes_on: bool) -> Iterator[None]:
    """Inside, a signal ends the process, without an exception: modules that are being imported swallow or wrap it."""
    answers: dict[int, Callable[[int], int]] = {signal.SIGINT: lambda _: _interrupted()}
    if goes_on:
        answers |= dict.fromkeys((signal.SIGTERM, signal.SIGUSR1), _stopped_at_start)
    main, usual = threading.current_thread() is threading.main_thread(), (signal.default_int_handler, signal.SIG_DFL)
    # What is ignored, or somebody else's, stays so.
    before = {number: signal.getsignal(number) for number in answers if main and signal.getsignal(number) in usual}
    for number in before:
        signal.signal(number, lambda number, _: os._exit(answers[number](number)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_commands()
        return DONE if arguments else BAD_INPUT
    if arguments[0] == "--version":
        _console().print(f"megarlhf {__version__}")
        return DONE
    name, *rest = arguments
    command = _command(name)
    if "-h" in rest or "--help" in rest:
        settings, _ = program(command, None, [word for word in rest if word.startswith("trainer=")])
        _print_settings(name, command, settings)
        return DONE
    path, overrides = _split(name, rest)
    with _ending_at_once(goes_on=command.goes_on):
        from megarlhf.config import load_config

        settings, entry = program(command, path, overrides)
        cfg = load_config(settings, path, overrides)
    return entry(cfg, arguments)


def _command(name: str) -> Command:
    """By its name; a name with a dot is the module of a trainer of one's own."""
    if "." in name:
        return Command("a trainer of your own", goes_on=True, trainer=name)
    if name in COMMANDS:
        return COMMANDS[name]
    there = commands()
    if name not in there:
        import difflib

        close = difflib.get_close_matches(name, there, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(there)}."
        raise ConfigError(f"unknown command {name}; {remedy}")
    return there[name]


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


def _split(name: str, rest: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Separate `--config FILE` from the overrides."""
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


def _load(where: str) -> Any:
    """Import what a Command names, as `module:attribute`."""
    module, _, attribute = where.partition(":")
    return vars(importlib.import_module(module))[attribute]


def _who() -> str:
    """Name the rank in front of an error when there are several, as under torchrun."""
    return f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


def _console() -> Terminal:
    from megarlhf.observe.terminal import Terminal

    # Piped to a file or a pager there is no width to respect, and a table squeezed to 80 columns is hard to read.
    return Terminal() if sys.stdout.isatty() else Terminal(width=140)


def _print_commands() -> None:
    from rich.table import Table
    from rich.text import Text

    console = _console()
    console.print(Text("megarlhf <command> [--config FILE] [name=value ...]", style="bold"))
    console.print(Text("RLHF for Llama 3 on Megatron-Core\n"))
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    for name, command in commands().items():
        table.add_row(Text(name, style="bold cyan"), Text(command.summary))
    console.print(table)
    console.print(Text("\nmegarlhf <command> --help lists every setting with its type, default and meaning."))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _print_settings(name: str, command: Command, settings: type[Config]) -> None:
    from rich.table import Table
    from rich.text import Text

    from megarlhf.config import describe, describe_groups

    console = _console()
    console.print(Text(f"megarlhf {name} [--config FILE] [name=value ...]", style="bold"))
    console.print(Text(f"{_sentence(command.summary)} Precedence: default < file < command line.\n"))
    table = Table(box=None, padding=(0, 2, 1, 0), header_style="dim")
    for heading, ratio in (("setting", 3), ("type", 3), ("default", 2), ("meaning", 8)):
        table.add_column(heading, overflow="fold", ratio=ratio)
    groups = describe_groups(settings)
    for row in describe(settings):
        # A group is introduced where its first setting stands.
        parents = [name for name in groups if row.name.startswith(f"{name}.")]
        for name in parents:
            table.add_row(Text(f"{name}.*", style="bold"), Text(""), Text(""), Text(groups.pop(name), style="bold"))
        default = Text(row.default, style="bold red" if row.default == "required" else "green")
        table.add_row(Text(row.name, style="bold cyan"), Text(row.type, style="dim"), default, Text(row.help))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
