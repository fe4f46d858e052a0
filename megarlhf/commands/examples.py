"""`megarlhf examples`: the run files that come with the package, listed or copied."""

from __future__ import annotations

import ast
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import megarlhf
from megarlhf.commands.help import console, first_sentence, listed
from megarlhf.config import Config
from megarlhf.errors import DONE, ConfigError, printable
from megarlhf.observe.files import writing


class ExamplesConfig(Config):
    """Which examples, and where they go."""

    output: Path | None = None
    """Directory to copy them to. A file that is there already stays as it is where it is the same, and is refused where
    it is another. null lists them."""
    name: str = ""
    """One example, `ppo_tiny` for instance; empty means all."""


def main(cfg: ExamplesConfig, _: Sequence[str]) -> int:
    """`megarlhf examples`."""
    files = chosen(cfg.name)
    if cfg.output is None:
        console().print(listed({path.name: summary(path) for path in files}))
        console().print("\nmegarlhf examples output=DIR copies them, with name=NAME one of them.")
        return DONE
    for path in files:
        target = cfg.output / path.name
        if target.exists() and not (target.is_file() and target.read_bytes() == path.read_bytes()):
            raise ConfigError(f"output={cfg.output}: {target} exists and differs; choose another, or remove it.")
    for path in files:
        target = cfg.output / path.name
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        sys.stdout.write(printable(f"{command(path, target)}\n"))
    return DONE


def directory() -> Path:
    """Where they are: in the installed package, or beside it in a checkout."""
    package = Path(megarlhf.__file__).parent
    return next(place for place in (package / "examples", package.parent / "examples") if place.is_dir())


def chosen(name: str) -> list[Path]:
    """All examples, or the one of that name.

    Raises:   ConfigError naming the nearest where there is none.
    """
    files = {path.stem: path for path in sorted(directory().glob("*.*")) if path.suffix in (".yaml", ".py")}
    if not name:
        return list(files.values())
    stem = Path(name).stem
    if stem not in files:
        close = difflib.get_close_matches(stem, files, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(files)}."
        raise ConfigError(f"name={name}: there is no such example; {remedy}")
    return [files[stem]]


def summary(path: Path) -> str:
    """What an example says of itself, below the command that runs it."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return first_sentence(ast.get_docstring(ast.parse(text)) or "")
    (head,) = re.findall(r"\A(?:#.*\n)+", text)
    return first_sentence(" ".join(line.lstrip("# ") for line in head.splitlines()[1:]))


def command(path: Path, target: Path) -> str:
    """The command that runs a copy at `target`; for one that others name, the copy."""
    runs = rf"^[# ]*((?:megarlhf \S+ --config|python) )examples/{re.escape(path.name)}(.*)"
    found = re.search(runs, path.read_text(encoding="utf-8"), re.MULTILINE)
    return f"{found[1]}{target}{found[2]}" if found else str(target)
