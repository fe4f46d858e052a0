"""What the command line says of itself: what to type first, the commands, and the settings of one.

A setting stands at the start of a line, whole at any width; what it means is wrapped below it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megarlhf.commands.table import Command, commands
from megarlhf.observe.terminal import Terminal

if TYPE_CHECKING:
    from megarlhf.config import Config, FieldHelp

FEW = 20
"""Settings that a command's help shows all at once."""
INDENT = 4
"""Columns before what goes on after the line that names a setting."""
PIPED = 80
"""Columns where standard output is no terminal: a pager in a narrow one breaks no line either."""
FIRST = (
    ("The whole pipeline, on data that it makes: six minutes on two CPU cores.", "demo"),
    ("With data of your own: a model that imitates demonstrations,", "sft run_dir=sft model=DIR data.source=FILE"),
    ("a reward model from preference pairs,", "reward run_dir=rm model=sft pairs.source=FILE"),
    (
        "a policy that the reward model judges (or a rule, or your own function),",
        "grpo run_dir=grpo actor.init=sft reward.init=rm prompts.source=FILE",
    ),
    ("and how often it is right.", "eval model=grpo prompts.source=FILE verifier=maths"),
    ("Run files to begin with, which say what they need.", "examples"),
)
"""What somebody who has typed nothing yet may type, each with its reason."""


def console() -> Terminal:
    """Standard output, of the terminal's width."""
    return Terminal() if sys.stdout.isatty() else Terminal(width=PIPED)


def print_first() -> None:
    """What to type first."""
    out = console()
    out.print(Text("RLHF for Llama 3 on Megatron-Core. What to type first:\n"))
    for reason, words in FIRST:
        out.print(Text(reason))
        out.print(Text(f"  megarlhf {words}\n", style="bold cyan"))
    out.print(Text("megarlhf --help lists the commands, megarlhf COMMAND --help the settings that one needs first."))


def print_commands() -> None:
    """Every command with what it does."""
    out = console()
    out.print(Text("megarlhf <command> [--config FILE] [name=value ...]", style="bold"))
    out.print(Text("RLHF for Llama 3 on Megatron-Core\n"))
    out.print(listed({name: command.summary for name, command in commands().items()}))
    out.print(Text("\nmegarlhf <command> --help shows the settings that one needs first, --help all every one."))


def print_settings(name: str, command: Command, settings: type[Config], topics: Sequence[str]) -> None:
    """The settings of a command: those that one needs first, or what `topics` ask for.

    topics: `all`, groups, settings; of a mapping with names of the user's, such a name stands for any.

    Raises:   ConfigError where a topic is none of these, naming the nearest.
    """
    from megarlhf.config import describe, describe_groups

    out, rows, groups = console(), describe(settings), describe_groups(settings)
    if topics:
        found = {row: None for topic in topics for row in about(settings, topic)}
        shown = {group: text for group, text in groups.items() if any(_within(group, topic) for topic in topics)}
        _print_rows(out, found, shown)
        return
    bare = f" [{command.listed} ...]" if command.listed else ""
    out.print(Text(f"megarlhf {name}{bare} [--config FILE] [name=value ...]", style="bold"))
    summary = f"{command.summary[:1].upper()}{command.summary[1:]}"
    out.print(Text(f"{summary}. Precedence: default < file < command line.\n"))
    if len(rows) <= FEW or not settings.first:
        _print_rows(out, rows, groups)
        return
    by_name = {row.name: row for row in rows}
    chosen = sorted((by_name[first] for first in settings.first), key=lambda row: row.default != "required")
    _print_rows(out, [row._replace(help=first_sentence(row.help)) for row in chosen], {}, gap=0)
    top = dict.fromkeys(row.name.partition(".")[0] for row in rows if "." in row.name)
    texts = {group: groups[group] if group in groups else by_name[group].help for group in top}
    out.print(Text(f"\nGroups, each by megarlhf {name} --help GROUP:\n", style="bold"))
    out.print(listed({f"{group}.*": first_sentence(text) for group, text in texts.items()}))
    alone = [row.name for row in rows if "." not in row.name and row.name not in (*settings.first, *top)]
    out.print(Text(f"\nOthers: {', '.join(alone)}.\n"))
    out.print(Text(f"megarlhf {name} --help NAME says what one is, megarlhf {name} --help all what all are."))


def about(settings: type[Config], topic: str) -> list[FieldHelp]:
    """The settings that a topic names: all, those of a group, or one.

    Raises:   ConfigError naming the nearest where there is none.
    """
    from megarlhf.config import describe
    from megarlhf.config.load import suggestion
    from megarlhf.errors import ConfigError

    found = [row for row in describe(settings) if _within(row.name, topic)]
    if not found:
        raise ConfigError(f"unknown setting {topic}; {suggestion(settings, topic)}")
    return found


def _within(name: str, topic: str) -> bool:
    from megarlhf.config.describe import NAME

    parts, asked = name.split("."), topic.removesuffix(".*").split(".")
    alike = len(parts) >= len(asked) and all(part in (word, NAME) for part, word in zip(parts, asked, strict=False))
    return topic == "all" or alike


def _print_rows(out: Terminal, rows: Iterable[FieldHelp], groups: Mapping[str, str], gap: int = 1) -> None:
    left = dict(groups)
    for row in rows:
        # A group is introduced where its first setting stands.
        for group in [group for group in left if row.name.startswith(f"{group}.")]:
            _print_line(out, Text(f"{group}.*", style="bold"), Text(left.pop(group)))
            out.print()
        required = row.default == "required"
        default = ("required", "bold red") if required else (f"default {row.default}", "green")
        _print_line(out, Text(row.name, style="bold cyan"), Text.assemble((row.type, "dim"), "  ", default))
        out.print(Padding(Text(row.help), (0, 0, gap, INDENT), expand=False))


def _print_line(out: Terminal, name: Text, rest: Text) -> None:
    """Both on one line where they fit."""
    if name.cell_len + 2 + rest.cell_len <= out.width:
        out.print(Text("  ").join([name, rest]))
    else:
        out.print(name)
        out.print(Padding(rest, (0, 0, 0, INDENT), expand=False))


def listed(texts: Mapping[str, str]) -> Table:
    """Names, never broken, each with a text."""
    table = Table(box=None, show_header=False, padding=(0, 3, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in texts.items():
        table.add_row(Text(name, style="bold cyan"), Text(text))
    return table


def first_sentence(text: str) -> str:
    """Up to the first full stop that a new sentence, or a line of its own, follows."""
    first = re.split(r"[.:](?= [A-Z`]|\n)", text, maxsplit=1)[0]
    return f"{first.rstrip('.:')}."
