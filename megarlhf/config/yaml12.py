"""YAML as people write settings: `1e-5` is a number, `no` is a word, a key given twice is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

# PyYAML follows YAML 1.1, where 1e-5 is a string, no and off are booleans and 1:30 is ninety. These are the rules of
# the YAML 1.2 core schema instead, for reading and for writing, so that a dumped config reads back as the same values.
_RULES = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9][0-9_]*$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+.0123456789"),
    ),
)


class Loader(yaml.SafeLoader):
    """Safe loader with the rules above."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, refusing a key that appears twice (YAML would silently keep the last)."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) != len(node.value):
            keys = [key_node.value for key_node, _ in node.value]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is given twice", node.start_mark)
        return mapping

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Decimal only: 010 is ten."""
        return int(str(self.construct_scalar(node)))


class Dumper(yaml.SafeDumper):
    """Safe dumper that quotes exactly the strings the loader would read as something else."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


for _tag, _pattern, _first in _RULES:
    Loader.add_implicit_resolver(_tag, re.compile(_pattern), _first)
    Dumper.add_implicit_resolver(_tag, re.compile(_pattern), _first)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)


def parse(text: str) -> Any:
    """Parse one YAML document; raises yaml.YAMLError."""
    return yaml.load(text, Loader)  # noqa: S506 (Loader derives from SafeLoader)


def render(data: Any) -> str:
    """Write plain data as YAML, keys in the order given."""
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
