"""The command line: `megarlhf <command> --config FILE name=value ...`, and `--help` that explains every setting."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megarlhf import __version__
from megarlhf.commands.help import console, print_commands, print_first, print_settings
from megarlhf.commands.table import COMMANDS, Command, commands, file_and_settings, named_at, program
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

HELP = ("-h", "--help")


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
    if not arguments:
        print_first()
        return BAD_INPUT
    if arguments[0] in (*HELP, "help"):
        print_commands()
        return DONE
    if arguments[0] == "--version":
        console().print(f"megarlhf {__version__}")
        return DONE
    name, rest = named_at(arguments)
    command = _command(name)
    if asked := [place for place, word in enumerate(rest) if word in HELP]:
        settings, _ = program(command, None, [word for word in rest if word.startswith("trainer=")])
        print_settings(name, command, settings, [word for word in rest[asked[0] + 1 :] if "=" not in word])
        return DONE
    path, overrides = file_and_settings(name, rest)
    overrides = named(command.listed, overrides)
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


def named(setting: str, words: list[str]) -> list[str]:
    """The words, with those that are no name=value as the value of `setting`."""
    bare = [word for word in words if "=" not in word]
    if not setting or not bare:
        return words
    if any(word.startswith(f"{setting}=") for word in words):
        raise ConfigError(f"{' '.join(bare)}: {setting} is given too; give one of the two.")
    named = json.dumps(bare, ensure_ascii=False)
    return [f"{setting}={named}", *(word for word in words if word not in bare)]


def _who() -> str:
    """Name the rank in front of an error when there are several, as under torchrun."""
    return f"rank {os.environ['RANK']}: " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""


if __name__ == "__main__":
    sys.exit(main())
