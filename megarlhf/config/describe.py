"""The settings of a class as rows for `--help` and for nearest-name suggestions."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megarlhf.config.base import Config, kinds_of, named_config

_WORDS = {int: "int", float: "float", bool: "true | false", str: "text", Path: "path", type(None): "null"}

NAME = "NAME"
"""Stands in the name of a setting for one that the user chooses."""
REQUIRED = "required"
"""Stands for the default of a setting that must be given."""


class FieldHelp(NamedTuple):
    """One setting: dotted name, type, default (`required` when there is none) and its documentation."""

    name: str
    type: str
    default: str
    help: str


def describe(cls: type[Config]) -> list[FieldHelp]:
    """List every setting of `cls` in declaration order, nested settings under dotted names.

    A mapping from names of the user's to groups of several kinds has the rows of all kinds, under NAME.
    """
    rows = _rows(cls, prefix="", defaults=None)
    return [row._replace(default=REQUIRED) if row.name in cls.needed else row for row in rows]


def describe_groups(cls: type[Config]) -> dict[str, str]:
    """The documentation of every group of settings in `cls`, by dotted name."""
    found: dict[str, str] = {}
    for name, field in cls.model_fields.items():
        inner = nested_config(field.annotation)
        if inner is not None:
            found[name] = _one_line(field.description)
            found |= {f"{name}.{deeper}": text for deeper, text in describe_groups(inner).items()}
    return found


def nested_config(annotation: Any) -> type[Config] | None:
    """Return the settings class inside an annotation such as `OptimConfig` or `OptimConfig | None`, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        found = (nested_config(argument) for argument in typing.get_args(annotation))
        return next((cls for cls in found if cls is not None), None)
    return None


def _rows(cls: type[Config], prefix: str, defaults: Config | None) -> Iterator[FieldHelp]:
    # A composing class may give a nested class other defaults (`optim: OptimConfig = OptimConfig(lr=1e-4)`), so the
    # instance that holds them travels down.
    values = {} if defaults is None else dict(defaults)
    for name, field in cls.model_fields.items():
        default = values.get(name, field.get_default(call_default_factory=True, validated_data={}))
        inner = nested_config(field.annotation)
        if kinds := kinds_of(field.annotation):
            yield FieldHelp(f"{prefix}{name}", "mapping", "{}", _one_line(field.description))
            yield from _rows_of_kinds(kinds, f"{prefix}{name}.{NAME}.")
        elif named := named_config(field.annotation):
            yield FieldHelp(f"{prefix}{name}", "mapping", "{}", _one_line(field.description))
            yield from _rows(named, f"{prefix}{name}.{NAME}.", None)
        elif inner is not None:
            yield from _rows(inner, f"{prefix}{name}.", default if isinstance(default, Config) else None)
        else:
            yield FieldHelp(f"{prefix}{name}", _type_text(field), _default_text(default), _one_line(field.description))


def _rows_of_kinds(kinds: Mapping[str, type[Config]], prefix: str) -> Iterator[FieldHelp]:
    """A setting that all kinds have once; one of some kinds with their names."""
    every = [(kind, row) for kind, cls in kinds.items() for row in _rows(cls, prefix, defaults=None)]
    texts = [row.help.rstrip(".") for _, row in every if row.name == f"{prefix}kind"]
    yield FieldHelp(f"{prefix}kind", " | ".join(kinds), REQUIRED, "; ".join(dict.fromkeys(texts)))
    for text in dict.fromkeys(row for _, row in every if row.name != f"{prefix}kind"):
        of = [kind for kind, row in every if row == text]
        yield text if len(of) == len(kinds) else text._replace(help=f"Of {', '.join(of)}. {text.help}")


def type_name(annotation: Any) -> str:
    """Name a type in words a user of YAML knows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is typing.Literal:
        return " | ".join(str(choice) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(argument) for argument in arguments)
    if origin in (tuple, list, set, frozenset):
        return "list of " + " | ".join(dict.fromkeys(type_name(a) for a in arguments if a is not Ellipsis))
    if origin is dict:
        return f"mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    return _WORDS.get(annotation) or (annotation.__name__ if isinstance(annotation, type) else str(annotation))


def _type_text(field: FieldInfo) -> str:
    bounds = ", ".join(filter(None, map(_bound_text, field.metadata)))
    return f"{type_name(field.annotation)} {bounds}".strip()


def _bound_text(item: Any) -> str:
    match item:
        case Ge(ge=bound):
            return f">= {bound}"
        case Gt(gt=bound):
            return f"> {bound}"
        case Le(le=bound):
            return f"<= {bound}"
        case Lt(lt=bound):
            return f"< {bound}"
        case _:
            return ""


def _default_text(default: Any) -> str:
    if default is PydanticUndefined:
        return REQUIRED
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    if default == "":
        return '""'
    if isinstance(default, tuple | list):
        return "[" + ", ".join(map(_default_text, default)) + "]"
    return str(default)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
