"""Trainers by name: a module of this package, or one's own, that exports TRAINER; none is imported unasked."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megarlhf.errors import ConfigError

if TYPE_CHECKING:
    from megarlhf.trainers.trainer import Trainer

_PACKAGE = __name__.rpartition(".")[0]


@cache
def trainers() -> dict[str, str]:
    """Every trainer of this package, by name, and what it does: the first line of its module, read, not imported."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.Assign | ast.AnnAssign) and _assigns(node, "TRAINER") for node in tree.body):
            summary = (ast.get_docstring(tree) or "").partition("\n")[0].rstrip(".")
            found[path.stem] = summary if summary[1:2].isupper() else summary[:1].lower() + summary[1:]
    return found


def _assigns(node: ast.Assign | ast.AnnAssign, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def module_of(name: str) -> str:
    """The module of a trainer: `ppo` is this package's, a name with a dot is whole."""
    return name if "." in name else f"{_PACKAGE}.{name}"


def is_own(module: str) -> bool:
    """Whether a module is a trainer of this package, whose import runs no other code."""
    package, _, name = module.rpartition(".")
    return package == _PACKAGE and name in trainers()


def trainer_named(name: str) -> Trainer[Any, Any, Any]:
    """The trainer, its module imported.

    Raises:   ConfigError where there is no such module, or none that exports TRAINER with settings of its own.
    """
    module = module_of(name)
    if "." not in name and not is_own(module):
        raise ConfigError(
            f"trainer {name} is none of {', '.join(trainers())}; choose one of them, or name a module of your own with "
            "its package, as in my_package.my_algorithm."
        )
    if not _is_there(module):
        raise ConfigError(
            f"trainer {name}: Python finds no such module; put the directory that holds it on PYTHONPATH, or choose "
            f"one of {', '.join(trainers())}."
        )
    found = vars(importlib.import_module(module)).get("TRAINER")
    from megarlhf.trainers.trainer import Trainer

    if not isinstance(found, Trainer):
        raise ConfigError(f"trainer {name}: the module does not define TRAINER; see megarlhf/trainers/trainer.py.")
    if found.config.__module__ != module:
        raise ConfigError(
            f"trainer {name}: its settings are {found.config.__name__} of {found.config.__module__}, whose runs "
            "its own would be taken for; derive a class from it in the module."
        )
    return found


def _is_there(module: str) -> bool:
    if not all(part.isidentifier() for part in module.split(".")):
        return False
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            return False
        raise  # its package is there, and lacks something itself
