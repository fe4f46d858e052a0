"""Settings that make no sense, and files that are no settings: one message with file, line or name, and at once."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from random import Random
from typing import Any

import pydantic
import pytest

from megarlhf import cli
from megarlhf.config import Config, describe, load_config
from megarlhf.config.base import MOST_WHOLE, kinds_of
from megarlhf.config.describe import NAME
from megarlhf.errors import ConfigError
from megarlhf.trainers.policy_config import PolicyConfig
from tests.helpers.hostile import within


class Inner(Config):
    rate: float = 0.5
    """A rate."""
    pair: tuple[float, ...] = (0.1, 0.2)
    """Two numbers."""


class Outer(Config):
    path: Path = Path("runs")
    """A place."""
    words: str = ""
    """Some text."""
    count: int = 1
    """A count."""
    bound: float | None = None
    """A bound."""
    model: str = ""
    """A directory or a name."""
    inner: Inner = Inner()
    """A group."""


def read(tmp_path: Path, text: str | bytes, *overrides: str) -> Outer:
    file = tmp_path / "settings.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return load_config(Outer, file, overrides)


def said(tmp_path: Path, text: str | bytes, *overrides: str) -> str:
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text, *overrides)
    assert time.process_time() - began < 2
    return str(caught.value)


COMMANDS = cli.commands()


WITHOUT_SENSE = ["Infinity", "-Infinity", "NaN", "1e300", "-1e300", "1e-300", "1e400", str(10**30)]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", WITHOUT_SENSE)
def test_no_number_of_any_command_takes_a_value_without_sense(command: str, value: str) -> None:
    check_numbers(cli.program(COMMANDS[command])[0], value)


@pytest.mark.parametrize("kind", kinds_of(PolicyConfig.model_fields["judges"].annotation).values())
@pytest.mark.parametrize("value", WITHOUT_SENSE)
def test_no_number_of_any_judge_does(kind: type[Config], value: str) -> None:
    check_numbers(kind, value)


def check_numbers(cls: type[Config], value: str) -> None:
    """Every one of them is refused where all have this value."""
    rows = [row for row in describe(cls) if f".{NAME}." not in row.name]
    numbers = [row.name for row in rows if {"int", "float"} & set(row.type.replace("|", " ").split())]
    if not numbers:
        return
    given: dict[str, Any] = {}
    for name in numbers:
        *groups, leaf = name.split(".")
        group = given
        for parent in groups:
            group = group.setdefault(parent, {})
        group[leaf] = "VALUE"
    with pytest.raises(pydantic.ValidationError) as caught:
        cls.model_validate_json(json.dumps(given).replace('"VALUE"', value), strict=True)
    refused = {".".join(map(str, detail["loc"])) for detail in caught.value.errors() if detail["type"] != "missing"}
    # Where a word would do too, each branch says why it is none, under its name.
    assert {name for name in numbers if any(f"{said}.".startswith(f"{name}.") for said in refused)} == set(numbers)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.rate=.inf", "setting inner.rate = Infinity: input should be a finite number; give float."),
        ("bound=.nan", "setting bound = NaN: input should be a finite number; give float | null."),
        ("inner.rate=1e300", "setting inner.rate = 1e+300: should be 0 or of a size from 1e-20 to 1e12; give float."),
        ("inner.pair=[0.1, 1e-30]", "setting inner.pair = [0.1, 1e-30]: should be 0 or of a size from 1e-20 to 1e12"),
        ("count=1000000000000000001", "setting count = 1000000000000000001: should be of a size up to 1e18; give int."),
        ("inner.rate=1e-400", "setting inner.rate=1e-400: not a YAML value ('1e-400': too small for a number"),
        ('words="a\\0b"', "setting words = 'a\\x00b': should not contain a NUL character; give text."),
        ('path="a\\0b"', "setting path = 'a\\x00b': should not contain a NUL character; give path."),
        (f"model={'a' * 256}", "should be a path that a file system takes, of names of at most 255 bytes; give text."),
        ('model="a\\0b"', "setting model = 'a\\x00b': should not contain a NUL character; give text."),
        (f"path={'a' * 256}", "should be a path that a file system takes, of names of at most 255 bytes; give path."),
        (f"path={'a/' * 2500}", "should be a path that a file system takes, of names of at most 255 bytes; give path."),
    ],
)
def test_values_without_sense_are_named_with_what_would_do(tmp_path: Path, override: str, message: str) -> None:
    assert message in said(tmp_path, "", override)


@pytest.mark.parametrize("value", ["0", "-0.0", "1e-20", "1e12", "-5"])
def test_values_at_the_bounds_are_kept(tmp_path: Path, value: str) -> None:
    assert read(tmp_path, f"inner: {{rate: {value}}}").inner.rate == float(value)
    assert read(tmp_path, f"count: {MOST_WHOLE}").count == MOST_WHOLE


BOMB = "a0: &a0 [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{i + 1}: &a{i + 1} [{','.join([f'*a{i}'] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: &a [*a]", "an alias stands for what it is a part of in .* line 1, column 12"),
        ("inner: &a {rate: *a}", "an alias stands for what it is a part of"),
        ("words: x\ncount: !!set {a, b}", "tag:yaml.org,2002:set.* line 2"),
        ("count: !!binary aGk=", "tag:yaml.org,2002:binary"),
        ("count: !!timestamp 2020-01-01", "tag:yaml.org,2002:timestamp"),
        ("count: !!omap [a: 1]", "tag:yaml.org,2002:omap"),
        ("count: !!python/name:os.system x", "tag:yaml.org,2002:python/name:os.system"),
        ("count: !own x", "'!own'"),
        ("\ncount: !!bool maybe", "'maybe': not a value of type bool in .* line 2"),
        ("count: !!float ''", "'': not a value of type float"),
        ("count: !!int x", "'x': not a value of type int"),
        ("count: !!int 1:30", "'1:30': not a value of type int"),
        ("count: !!map [1]", "a sequence, not a mapping"),
        ("inner: {1: a, 01: b}", "1 is not a name in .* line 1, column 9"),
        ("inner: {null: a}", "None is not a name"),
        ("? [a, b]\n: c", "is not a name"),
        ("5: 6", "5 is not a name"),
        ("count: " + "9" * 5000, "5000 digits"),
        ("count: " + "[" * 800, "nested more than 40 deep in .* line 1, column 4"),
        ("count: " + "{a: " * 800, "nested more than 40 deep"),
        ("count: " + "- " * 2000, "not YAML"),
        ("- " * 2000, "nested more than 40 deep"),
        (BOMB, "more than 2000 values in .* line 4"),
        ("count: [" + "1," * 40000 + "]", "more than 2000 values"),
        ("words: " + "x" * 100_000, "100001 characters; settings take at most 100000"),
        ('words: "\\ud83d"', "surrogates not allowed in .* line 1"),
        ('words: "\\UFFFFFFFF"', "OverflowError: .* line 1"),
        ("words: a\0b", "#x0000"),
        ("%YAML " + "9" * 5000 + ".1\n--- x", "not YAML"),
        (b"words: \xff\xfe", "can't decode byte 0xff"),
        ("words: ä".encode("utf-16"), "can't decode byte 0xff"),
        ("\n".join(f"k{i}: 1" for i in range(500)), "and 480 more mistakes"),
        (".".join("a" * 100) + ": 1", "settings nest at most 10 deep"),
        ("inner: " + "{a: " * 30 + "1" + "}" * 30, "unknown setting inner.a"),
    ],
)
def test_odd_yaml_is_refused_with_file_and_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    found = said(tmp_path, text)
    assert str(tmp_path / "settings.yaml") in found
    assert re.search(message, found), found


@pytest.mark.parametrize("value", ["1_", "1__0", "_1"])
def test_underscores_part_digits_or_make_it_text(tmp_path: Path, value: str) -> None:
    assert read(tmp_path, "count: 1_000").count == 1000
    assert read(tmp_path, f"words: {value}").words == value
    assert f"setting count = '{value}'" in said(tmp_path, f"count: {value}")


def test_a_file_without_an_end_is_not_read_to_its_end() -> None:
    with pytest.raises(ConfigError, match=r"config file /dev/zero: not YAML for settings \(100001 characters"):
        load_config(Outer, Path("/dev/zero"), [])


def test_a_mistake_is_blamed_on_where_it_was_made(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    assert said(tmp_path, "count: 2", "cuont=3") == (
        "unknown setting cuont = 3 (from the command line); did you mean count?"
    )
    assert said(tmp_path, "cuont: 2", "count=3") == f"unknown setting cuont = 2 (from {file}); did you mean count?"
    assert said(tmp_path, "inner: {rat: 1}", "inner={rta: 2}").splitlines() == [
        f"unknown setting inner.rat = 1 (from {file}); did you mean inner.rate?",
        "unknown setting inner.rta = 2 (from the command line); did you mean inner.rate?",
    ]
    assert said(tmp_path, "count: x").startswith(f"setting count = 'x' (from {file}): input should be a valid integer")
    assert said(tmp_path, "count: 1", "count=x").startswith("setting count = 'x': input should be a valid integer")


def test_an_argument_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    raw = b"words=a\xff".decode("utf-8", "surrogateescape")
    assert said(tmp_path, "", raw) == "argument 'words=a\\udcff': not UTF-8; type it in that encoding."


WILD = [
    *(
        "null",
        "true",
        "-1",
        "1.5",
        "1e9",
        "1e-300",
        ".inf",
        "-.nan",
        "''",
        "[]",
        "{}",
        "[[]]",
        "&x [*x]",
        "*x",
        "!!set {a}",
    ),
    *(
        "!!binary aa",
        "!!float x",
        "1_",
        "0x1F",
        "~",
        "'",
        '"\\x',
        "{",
        "- -",
        "|",
        "%",
        "@",
        "\t",
        "\0",
        "\ufeff",
        "\x1b[31m",
    ),
    *(
        "'\u202e'",
        '"\\ud800"',
        "9" * 4500,
        "[" * 300,
        "{1: 2}",
        "<<: x",
        "? x",
        "!!int 0o7",
        "2020-01-01",
        "1:30",
        "=",
        "!!value =",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_mutated_settings_are_read_or_refused_with_one_message(seed: int, tmp_path: Path) -> None:
    random, outcomes = Random(seed), {"read": 0, "refused": 0}
    classes = [cli.program(command)[0] for name, command in COMMANDS.items() if name not in ("report", "replay")]
    file = tmp_path / "settings.yaml"
    for _ in range(300):
        cls = random.choice(classes)
        lines = [
            f"{row.name}: {row.default.replace('required', 'x')}" for row in describe(cls) if row.default != "null"
        ]
        at = random.randrange(len(lines))
        name = lines[at].partition(":")[0]
        spot = random.randrange(len(lines[at]) + 1)
        lines[at] = random.choice(
            [
                f"{name}: {random.choice(WILD)}",
                f"{name}{random.choice(['', 's', '.x', '.', '..'])}: {random.choice(WILD)}",
                lines[at][:spot] + chr(random.choice([*range(128), 0x85, 0x2028, 0xFEFF])) + lines[at][spot:],
                "",
            ]
        )
        data = bytearray("\n".join(lines).encode())
        if random.random() < 0.2:
            data[random.randrange(len(data))] = random.randrange(256)
        file.write_bytes(data)
        began = time.process_time()
        try:
            with within(20):
                load_config(cls, file, [f"{name}={random.choice(WILD)}"] if random.random() < 0.2 else [])
            outcomes["read"] += 1
        except ConfigError:
            outcomes["refused"] += 1
        assert time.process_time() - began < 2
    assert min(outcomes.values()) > 20, outcomes
