"""Whether a data directory of unknown origin stays inside itself: what its card names, and where its links lead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from megarlhf.errors import DataError

_CARDS = ("README.md", ".huggingface.yaml")
"""Where `datasets` reads which files make a data set."""
_LARGEST = 4_000_000
"""Bytes of a card; the largest on the hub have a tenth."""
_NAMING = ("data_files", "data_dir")
"""Entries of a card, at any depth, whose texts are patterns of files."""


def check_inside(directory: Path) -> None:
    """Raise DataError where loading `directory` would read files outside it, or its card is no plain YAML."""
    for name in _CARDS:
        if (directory / name).is_file():
            _check_card(directory / name)
    # A snapshot in the hub's cache is made of links to the files beside it.
    home = directory.absolute().parents[1] if directory.absolute().parent.name == "snapshots" else directory
    root = home.resolve()
    for parent, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(parent, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise DataError(
                    f"data directory {directory}: {path} is a link out of it, to {path.resolve()}; copy what "
                    "it leads to, or name that itself."
                )


def _check_card(path: Path) -> None:
    if path.stat().st_size > _LARGEST:
        raise DataError(f"data card {path}: more than {_LARGEST} bytes; it says what a data set is, shorten it.")
    with path.open(encoding="utf-8", newline="") as file:  # as datasets reads it: \r stays \r
        text = file.read()
    if path.suffix == ".md":
        front = REGEX_YAML_BLOCK.search(text)  # as datasets finds it: another end of it would hide what comes after
        text = "" if front is None else front[2]
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.CSafeLoader)):
            raise DataError(f"data card {path}: has YAML aliases, which can stand for endless data; write them out.")
        named = list(_named(yaml.compose(text, yaml.CSafeLoader), naming=False))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise DataError(f"data card {path}: not YAML ({' '.join(str(error).split())}); mend it.") from error
    for pattern in named:
        parts = PurePosixPath(pattern).parts
        if "://" in pattern or "::" in pattern or pattern.startswith(("/", "~")) or ".." in parts:
            raise DataError(
                f"data card {path}: names {pattern!r}, outside of its directory; name files in it, or give the file "
                "itself as source."
            )


def _named(node: yaml.Node | None, *, naming: bool) -> Iterator[str]:
    """The texts at or below an entry that names files."""
    if isinstance(node, yaml.ScalarNode) and naming:
        yield node.value
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _named(item, naming=naming)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _named(value, naming=naming or key.value in _NAMING)
