"""The settings of a run one by one, each beside its default: what a page shows of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic_core import PydanticUndefined

from megarlhf.config.base import Config


class Settled(NamedTuple):
    """One setting as a run has it, in words of YAML."""

    name: str
    """Dotted."""
    value: str
    default: str
    """`required` where there is none, `not set` of an entry of a mapping."""
    differs: bool
    """The value is another than the default."""


def settled(cfg: Config) -> list[Settled]:
    """Every setting of `cfg` in declaration order, nested ones and the entries of mappings under dotted names."""
    return list(_walk(cfg, None, ""))


def _walk(cfg: Config, usual: Config | None, prefix: str) -> Iterator[Settled]:
    # A composing class may give a nested class other defaults, so the instance that holds them travels down.
    values, defaults = dict(cfg), {} if usual is None else dict(usual)
    for field_name, field in type(cfg).model_fields.items():
        name, value = f"{prefix}{field_name}", values[field_name]
        default = defaults.get(field_name, field.get_default(call_default_factory=True, validated_data={}))
        if isinstance(value, Config):
            yield from _walk(value, default if isinstance(default, type(value)) else None, f"{name}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, Config):
                    yield from _walk(item, None, f"{name}.{key}.")
                else:
                    yield Settled(f"{name}.{key}", _said(item), "not set", differs=True)
        else:
            yield Settled(name, _said(value), _said(default), differs=value != default)


def _said(value: Any) -> str:
    match value:
        case _ if value is PydanticUndefined:
            return "required"
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case float():
            return f"{value:.12g}"
        case "":
            return '""'
        case tuple() | list():
            return f"[{', '.join(map(_said, value))}]"
        case Config():
            return "a group of settings"
        case _:
            return str(value)
