"""Read settings: defaults, then the file, then the command line. Nothing the user wrote is ever changed silently."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from megarlhf.config import yaml12
from megarlhf.config.base import Config, kinds_of, named_config
from megarlhf.config.describe import NAME, describe, nested_config
from megarlhf.errors import ConfigError

C = TypeVar("C", bound=Config)

_MOST_MISTAKES = 20
"""How many an error lists."""
_DEEPEST = 10
"""Groups inside each other that a dotted name may ask for; there are 4 at most."""


def load_config(cls: type[C], path: Path | None, overrides: Sequence[str]) -> C:
    """Build `cls` from a YAML file and overrides such as `layout.tensor=2`; the last one wins.

    Raises:   ConfigError naming the setting, its value, where it came from and the remedy, one line per mistake.
    """
    settings, typed = _given(path, overrides)
    try:
        # Strict JSON mode: 2.0 or "2" for an int is an error, while a list may fill a tuple and text may fill a Path.
        return cls.model_validate_json(json.dumps(_over_defaults(cls, settings)), strict=True)
    except pydantic.ValidationError as error:
        lines = [_explain(cls, detail, path, typed) for detail in error.errors()[:_MOST_MISTAKES]]
        more = error.error_count() - len(lines)
        raise ConfigError("\n".join([*lines, *([f"and {more} more mistakes."] if more else [])])) from None


def given(path: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What file and overrides say, before any class has looked at it.

    Raises:   ConfigError where one of them cannot be read.
    """
    return _given(path, overrides)[0]


def _given(path: Path | None, overrides: Sequence[str]) -> tuple[dict[str, Any], set[str]]:
    """The settings, and the dotted names of those that the overrides gave values to."""
    settings = {} if path is None else _read(path)
    typed: set[str] = set()
    for override in overrides:
        typed |= _apply(settings, override)
    return settings, typed


def dump_config(cfg: Config, path: Path) -> None:
    """Write every setting with its resolved value, so that `load_config` of the file gives an equal object."""
    path.write_text(cfg.to_yaml(), encoding="utf-8")


def _over_defaults(cls: type[Config], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Lay each group of settings over the default that its owner gives it.

    Without this, `optim.warmup_steps=5` beside `optim: OptimConfig = OptimConfig(lr=1e-5)` would also bring back the lr
    of OptimConfig itself.
    """
    merged = dict(settings)
    for name, field in cls.model_fields.items():
        inner, given = nested_config(field.annotation), settings.get(name)
        if inner is None or not isinstance(given, dict):
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        chosen = default.model_dump(mode="json") if isinstance(default, Config) else {}
        merged[name] = _over_defaults(inner, _merged(chosen, given))
    return merged


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    both = {name: _merged(below[name], value) for name, value in above.items() if _are_dicts(below.get(name), value)}
    return {**below, **above, **both}


def _are_dicts(*values: Any) -> bool:
    return all(isinstance(value, dict) for value in values)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            # One character more than is read, so that what never ends (/dev/zero) ends here.
            data = yaml12.parse(file.read(yaml12.LARGEST + 1))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"config file {path}: {reason}; give a readable YAML file to --config.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {path}: not YAML for settings ({_flat(error)}); correct that line.") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"config file {path}: holds {_shown(data)}; write one `name: value` per line.")
    return _nest(data, str(path))


def _nest(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Expand dotted keys at the top of a file, so that `layout.tensor: 2` means what it means on the command line."""
    nested: dict[str, Any] = {}
    for name, value in data.items():
        _set(nested, name, value, source)
    return nested


def _apply(settings: dict[str, Any], override: str) -> set[str]:
    """Lay `name=value` over `settings`; returns the dotted names that it gave values to."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError(f"argument {override!r}: not a setting; write name=value, for example layout.tensor=2.")
    try:
        override.encode()
        value = yaml12.parse(text)
    except UnicodeEncodeError:
        raise ConfigError(f"argument {override!r}: not UTF-8; type it in that encoding.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"setting {name}={text}: not a YAML value ({_flat(error)}); quote it.") from None
    _set(settings, name, value, "the command line")
    return set(_leaves(name, value))


def _leaves(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(f"{name}.{key}", item)
    else:
        yield name


def _set(settings: dict[str, Any], name: str, value: Any, source: str) -> None:
    *parents, leaf = name.split(".")
    if len(parents) > _DEEPEST:
        raise ConfigError(f"unknown setting {_shown(name)} (from {source}); settings nest at most {_DEEPEST} deep.")
    for depth, parent in enumerate(parents):
        inner = settings.setdefault(parent, {})
        if not isinstance(inner, dict):
            above = ".".join(parents[: depth + 1])
            raise ConfigError(f"setting {name} ({source}): {above} is already {_shown(inner)}; give one of the two.")
        settings = inner
    # An empty mapping empties; any other is laid over what is there.
    if isinstance(value, dict) and value and isinstance(settings.get(leaf), dict):
        for key, item in value.items():
            _set(settings[leaf], key, item, source)
    else:
        settings[leaf] = value


def _explain(cls: type[Config], detail: Any, path: Path | None, typed: Collection[str]) -> str:
    """Turn one pydantic error into `<what>: <names and values>; <remedy>`."""
    loc, chosen = _without_kinds(cls, detail["loc"])
    name = ".".join(loc)
    value = _shown(detail["input"])
    types = {_chosen(row.name, chosen): row.type for row in describe(cls)}
    types |= {} if chosen == NAME else {".".join(loc[:2]): "a group of settings"}
    # An element of a list carries its index in `loc`; the setting is the longest prefix that is one.
    setting = next((prefix for prefix in _prefixes(loc) if prefix in types), name)
    wanted = types.get(setting, "a group of settings")
    is_typed = path is None or any(given in _prefixes(loc) or given.startswith(f"{name}.") for given in typed)
    match detail["type"]:
        case "union_tag_invalid" | "union_tag_not_found":
            kinds, kind = types[f"{name}.kind"], detail["ctx"].get("tag")
            close = difflib.get_close_matches(str(kind), kinds.split(" | "), n=1)
            remedy = f"did you mean {close[0]}?" if close else f"give {kinds}."
            return (
                f"setting {name}.kind = {_shown(kind)}: there is no such kind; {remedy}"
                if kind
                else (f"missing setting {name}.kind ({kinds}), which says what {name} is; add it.")
            )
        case "extra_forbidden":
            source = "the command line" if is_typed else str(path)
            return f"unknown setting {name} = {value} (from {source}); {suggestion(cls, name, chosen)}"
        case "missing" if setting == name:
            file = "the file" if path is None else str(path)
            return f"missing setting {name} ({wanted}); add it to {file} or give {name}=... on the command line."
        case "value_error" | "assertion_error":
            reason = str(detail["ctx"]["error"])
            return f"setting {name}: {reason}" if name else reason
        case _:
            message = detail["msg"][:1].lower() + detail["msg"][1:]
            source = "" if is_typed else f" (from {path})"
            return f"setting {setting} = {value}{source}: {message}; give {wanted}."


def _without_kinds(cls: type[Config], loc: Sequence[str | int]) -> tuple[list[str], str]:
    """The parts of a setting's name, without the kind that pydantic puts after a name of the user's; and that name."""
    parts = [str(part) for part in loc]
    field = cls.model_fields.get(parts[0]) if parts else None
    if len(parts) < 2 or field is None:
        return parts, NAME
    if (inner := nested_config(field.annotation)) is not None:
        deeper, name = _without_kinds(inner, loc[1:])
        return [parts[0], *deeper], name
    if kinds := kinds_of(field.annotation):
        return [*parts[:2], *(parts[3:] if parts[2:3] and parts[2] in kinds else parts[2:])], parts[1]
    return parts, parts[1] if named_config(field.annotation) else NAME


def _chosen(row: str, name: str) -> str:
    return row.replace(f".{NAME}.", f".{name}.")


def _prefixes(loc: Sequence[str | int]) -> list[str]:
    parts = [str(part) for part in loc]
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def suggestion(cls: type[Config], name: str, chosen: str = NAME) -> str:
    """What to do about `name`, which is no setting of `cls`: the nearest that is. chosen: the user's for NAME."""
    known = [_chosen(row.name, chosen) for row in describe(cls)]
    groups = sorted({prefix for row in known for prefix in _prefixes(row.split("."))[1:]})
    leaves = {row.rpartition(".")[2]: row for row in reversed(known)}
    # Right word, wrong group: `tensor=2` instead of `layout.tensor=2`.
    close = [leaves[name]] if name in leaves else difflib.get_close_matches(name, [*known, *groups], n=1, cutoff=0.6)
    if not close:
        close = [leaves[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], leaves, n=1, cutoff=0.75)]
    return f"did you mean {close[0]}?" if close else "run the command with --help all to see every setting."


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())
