"""YAML as people write settings: `1e-5` is a number, `no` is a word, a key given twice is an error.

Settings are plain data of a page, so that is all that is read: text, numbers, true and false, null, lists, and mappings
from names. Whatever else YAML can say (sets, bytes, dates, objects) is an error with its line, and so is a text that
would grow beyond a page's worth when its aliases are followed, a mapping that holds itself, or a nesting that no
setting has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

LARGEST = 100_000
"""Characters of a text that is read, some 20 times a resolved config."""
_MOST_VALUES = 2_000
"""Values of a text, each as often as an alias stands for it."""
_DEEPEST = 40
"""Lists and mappings inside each other; settings nest 4 deep."""

_KIND = "tag:yaml.org,2002:"

# PyYAML follows YAML 1.1, where 1e-5 is a string, no and off are booleans and 1:30 is ninety. These are the rules of
# the YAML 1.2 core schema instead, for reading and for writing, so that a dumped config reads back as the same values.
# Underscores may part the digits of a number, as in Python.
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_RULES: dict[str, tuple[str, list[str]]] = {
    "null": (r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    "int": (rf"[-+]?{_DIGITS}", list("-+0123456789")),
    "float": (
        rf"(?:[-+]?(?:\.[0-9]+|{_DIGITS}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+.0123456789"),
    ),
}


class Loader(yaml.SafeLoader):
    """Safe loader with the rules above."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012
    yaml_constructors: dict[str | None, Callable[[Any, Any], Any]] = {  # noqa: RUF012
        None: yaml.SafeLoader.construct_undefined,
        f"{_KIND}seq": yaml.SafeLoader.construct_yaml_seq,
        f"{_KIND}map": yaml.SafeLoader.construct_yaml_map,
    }

    def __init__(self, text: str) -> None:
        """Read `text`."""
        super().__init__(text)
        self._depth = 0
        self._values = 0
        self._weights: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, counting what it will be once its aliases are followed."""
        mark, is_alias, before = self.peek_event().start_mark, self.check_event(yaml.AliasEvent), self._values
        self._depth += 1
        if self._depth > _DEEPEST:
            raise ComposerError(None, None, f"nested more than {_DEEPEST} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not is_alias:
            self._values += 1
            self._weights[id(node)] = self._values - before
        elif id(node) in self._weights:
            self._values += self._weights[id(node)]
        else:
            raise ComposerError(None, None, "an alias stands for what it is a part of", mark)
        if self._values > _MOST_VALUES:
            raise ComposerError(None, None, f"more than {_MOST_VALUES} values", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        """Build a mapping from names, refusing one that appears twice (YAML would silently keep the last)."""
        if not isinstance(node, yaml.MappingNode):
            raise ConstructorError(None, None, f"a {node.id}, not a mapping", node.start_mark)
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConstructorError(None, None, f"{key} is not a name", key_node.start_mark)
            if key in mapping:
                raise ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


class Dumper(yaml.SafeDumper):
    """Safe dumper that quotes exactly the strings the loader would read as something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


def _float(text: str) -> float:
    sign, word = (-1 if text.startswith("-") else 1), text.lower().lstrip("+-")
    value = sign * float(word.removeprefix(".") if word in (".inf", ".nan") else word)
    if value == 0 and re.search("[1-9]", word.partition("e")[0]):
        raise ValueError("too small for a number")
    return value


def _text(text: str) -> str:
    text.encode()  # a file may spell half of a surrogate pair, which is no character
    return text


_SCALARS: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,  # decimal only: 010 is ten
    "float": _float,
    "str": _text,
}


def _constructor(kind: str) -> Callable[[Loader, yaml.ScalarNode], Any]:
    def construct(loader: Loader, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node))
        try:
            if kind in _RULES and not re.fullmatch(_RULES[kind][0], text):
                raise ValueError(f"not a value of type {kind}")
            return _SCALARS[kind](text)
        except ValueError as error:
            shown = text if len(text) <= 40 else f"{text[:37]}..."
            raise ConstructorError(None, None, f"{shown!r}: {error}", node.start_mark) from None

    return construct


for _kind in _SCALARS:
    Loader.add_constructor(_KIND + _kind, _constructor(_kind))
for _kind, (_pattern, _first) in _RULES.items():
    Loader.add_implicit_resolver(_KIND + _kind, re.compile(rf"^{_pattern}$"), _first)
    Dumper.add_implicit_resolver(_KIND + _kind, re.compile(rf"^{_pattern}$"), _first)


def parse(text: str) -> Any:
    """Parse one YAML document.

    Raises:   yaml.YAMLError, of whatever kind the fault is.
    """
    if len(text) > LARGEST:
        raise yaml.YAMLError(f"{len(text)} characters; settings take at most {LARGEST}")
    loader = Loader(text)
    try:
        return loader.get_single_data()
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML's own slips, of any type
        where = f"{type(error).__name__}: {error}"
        raise ConstructorError(None, None, where, loader.get_mark()) from error


def render(data: Any) -> str:
    """Write plain data as YAML, keys in the order given."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
