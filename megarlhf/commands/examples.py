"""`megarlhf examples`: the run files and launch scripts that come with the package, listed or copied."""

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
        console().print(listed({relative(path): summary(path) for path in files}))
        console().print("\nmegarlhf examples output=DIR copies them, with name=NAME one of them.")
        return DONE
    targets = {path: cfg.output / relative(path) for path in files}
    for path, target in targets.items():
        if target.exists() and not (target.is_file() and target.read_bytes() == path.read_bytes()):
            raise ConfigError(f"output={cfg.output}: {target} exists and differs; choose another, or remove it.")
    for path, target in targets.items():
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            target.chmod(path.stat().st_mode)
        sys.stdout.write(printable(f"{command(path, target)}\n"))
    return DONE


def directory() -> Path:
    """Where they are: in the installed package, or beside it in a checkout."""
    package = Path(megarlhf.__file__).parent
    return next(place for place in (package / "examples", package.parent / "examples") if place.is_dir())


def relative(path: Path) -> str:
    """Of an example, where it is below all of them."""
    return str(path.relative_to(directory()))


def chosen(name: str) -> list[Path]:
    """All examples, or the one of that name.

    Raises:   ConfigError naming the nearest where there is none.
    """
    found = [*sorted(directory().glob("*.*")), *sorted(directory().glob("launch/*.*"))]
    files = {path.stem: path for path in found if path.suffix in (".yaml", ".py", ".sh", ".md")}
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
    if path.suffix == ".md":
        return first_sentence(" ".join(text.partition("\n\n")[2].split()))
    # A script's first line is for the kernel.
    (head,) = re.findall(r"\A(?:#!.*\n)?((?:# .*\n)+)", text)
    return first_sentence(" ".join(line.lstrip("# ") for line in head.splitlines()[1:]))


def command(path: Path, target: Path) -> str:
    """The command that runs a copy at `target`; for one that others name, the copy."""
    program = r"megarlhf \S+ --config|python|sbatch \S+|kubectl apply -f|HOSTS=\"[^\"]*\""
    runs = rf"^[# ]*((?:{program}) )examples/{re.escape(relative(path))}(.*)"
    found = re.search(runs, path.read_text(encoding="utf-8"), re.MULTILINE)
    return f"{found[1]}{target}{found[2]}" if found else str(target)
