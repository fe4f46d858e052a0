"""A test and the program that it is about, in two processes that only exchange data: standard library alone.

`FILE program READ WRITE` runs program.py and answers; `FILE test READ WRITE` runs test.py, in which the names that the
program defines stand for what the other side has. Arguments and results cross as data: None, bools, numbers, text,
bytes, and lists, tuples, sets and dicts of such. Anything else stays where it is, and a number stands for it. So the
program never meets what it is compared with, and nothing that it patches, prints, raises or exits with is a verdict:
that is the exit code of the side of the test, 0 where the test ran to its end.

What a program can still forge is a test that compares what the program says with what the program says, or asks for
no more than truth: `assert f(1) == f(1)`, `assert is_prime(7)`, `assert Point(1, 2) == Point(1, 2)` for a class of its
own; and where a test names built-in functions alone, it can be taken in by a program that redefines them.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import importlib.util
import json
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast


def _called(of: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return of(*args, **named)


ACTIONS: dict[str, Callable[..., Any]] = {
    "call": _called,
    "attribute": getattr,
    "item": operator.getitem,
    "items": list,
    "length": len,
    "str": str,
    "repr": repr,
    "equal": operator.eq,
}
"""What the test may have done to an object of the program. None of them tells it what is expected."""
QUIET = (StopIteration, StopAsyncIteration)
"""What ends a loop of the test in place of failing it."""


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """As JSON has it; `keep` gives the number of what is no data."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes" if isinstance(value, bytes) else "bytearray": value.hex()}
    if isinstance(value, dict):
        pairs = cast("dict[Any, Any]", value).items()
        return {"dict": [[encode(key, keep), encode(each, keep)] for key, each in pairs]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(each, keep) for each in cast("list[Any]", value)]}
    return {"object": keep(value)}


def decode(said: Any, find: Callable[[int], Any]) -> Any:
    """What `encode` was given."""
    if not isinstance(said, dict):
        return said
    ((kind, inner),) = cast("dict[str, Any]", said).items()
    if kind == "object":
        return find(inner)
    if kind == "complex":
        return complex(*inner)
    if kind in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[kind].fromhex(inner)
    if kind == "dict":
        return {decode(key, find): decode(each, find) for key, each in inner}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](
        decode(each, find) for each in inner
    )


def answer(reading: IO[str], writing: IO[str]) -> None:
    """The side of the program: run it, then do as asked until nobody asks."""
    program = _loaded("program", {})
    objects: list[Any] = [program]

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    for line in reading:
        try:
            asked = json.loads(line)
            args = [decode(each, objects.__getitem__) for each in asked["args"]]
            named = {name: decode(each, objects.__getitem__) for name, each in asked["named"].items()}
            value = ACTIONS[asked["do"]](objects[asked["of"]], *args, **named)
            changed = [encode(each, keep) if _may_change(each) else None for each in args]
            said = {"value": encode(value, keep), "changed": changed}
        except Exception as error:  # noqa: BLE001 (the test is told, and may be about it)
            said = {"error": type(error).__name__, "text": str(error)}
        print(json.dumps(said), file=writing, flush=True)


class GoneError(BaseException):
    """The program is no more. Not to be caught by a test that expects an error."""


class Asker:
    """The side of the test."""

    def __init__(self, reading: IO[str], writing: IO[str]) -> None:
        self.reading, self.writing = reading, writing

    def ask(self, do: str, of: int, *args: Any, **named: Any) -> Any:
        """Have the program do something, and return what it says."""
        asked = {
            "do": do,
            "of": of,
            "args": [encode(each, _number) for each in args],
            "named": {name: encode(each, _number) for name, each in named.items()},
        }
        try:
            print(json.dumps(asked), file=self.writing, flush=True)
            line = self.reading.readline()
        except OSError:
            line = ""
        if not line.endswith("\n"):
            raise GoneError
        said = json.loads(line)
        if "error" in said:
            raise _error(said["error"], said["text"])
        for each, after in zip(args, said["changed"], strict=True):
            if _may_change(each):
                # In place, as the program did it to its copy.
                after = decode(after, self.theirs)
                each.clear()
                each.update(after) if isinstance(each, dict | set) else each.extend(after)  # pyright: ignore[reportUnknownMemberType]
        return decode(said["value"], self.theirs)

    def theirs(self, number: int) -> Theirs:
        """What stands for an object of the program."""
        return Theirs(self, number)


class Theirs:
    """An object of the program. It equals no data, and is no number: who computes with it, fails."""

    def __init__(self, asker: Asker, number: int) -> None:
        self._asker, self._number = asker, number

    def __call__(self, *args: Any, **named: Any) -> Any:
        """What the program says."""
        return self._asker.ask("call", self._number, *args, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._asker.ask("attribute", self._number, name)

    def __getitem__(self, key: Any) -> Any:
        return self._asker.ask("item", self._number, key)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._asker.ask("items", self._number))

    def __len__(self) -> int:
        return self._asker.ask("length", self._number)

    def __str__(self) -> str:
        return self._asker.ask("str", self._number)

    def __repr__(self) -> str:
        return self._asker.ask("repr", self._number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Theirs) and bool(self._asker.ask("equal", self._number, other))

    def __hash__(self) -> int:
        return self._number

    @property
    def number_there(self) -> int:
        """By which the program knows it."""
        return self._number


def names_for(tree: ast.AST) -> tuple[list[str], list[str], list[str]]:
    """What a test names and does not define: what is the program's; modules of Python's; and, where it names nothing
    that must be the program's, built-in functions whose names the program may have taken.

    `assert abs(f(2) - 1.41) < 0.01` means Python's abs, whatever the program calls so; `assert sum(10, 15) == 6` may
    not.
    """
    nodes = list(ast.walk(tree))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    own = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | {
        *(node.arg for node in nodes if isinstance(node, ast.arg)),
        *(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)),
        *(node.name for node in nodes if isinstance(node, ast.ExceptHandler) and node.name),
        *((node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)),
    }
    used = {node.id for node in names} - own
    built_in = used & set(dir(builtins))
    of_dots = [node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    bare = {name for name in used if sum(node.id == name for node in names) > of_dots.count(name)}
    modules = {name for name in used - built_in - bare if name in sys.stdlib_module_names}
    theirs = used - built_in - modules
    return sorted(theirs), sorted(modules), [] if theirs else sorted(built_in)


def test(reading: IO[str], writing: IO[str]) -> None:
    """The side of the test: it returns where the test holds."""
    asker = Asker(reading, writing)
    theirs, modules, perhaps = names_for(ast.parse(Path("test.py").read_text(encoding="utf-8")))
    names = {name: importlib.import_module(name) for name in modules}
    names |= {name: asker.ask("attribute", 0, name) for name in theirs}
    for name in perhaps:
        try:
            names[name] = asker.ask("attribute", 0, name)
        except AttributeError:
            continue
    _loaded("test", names)


def _loaded(name: str, names: dict[str, Any]) -> ModuleType:
    """The module of a file of this directory, in which these names are set."""
    spec = importlib.util.spec_from_file_location(name, Path(f"{name}.py").resolve())
    assert spec is not None  # of a .py file there is one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module).update(names)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def _may_change(value: Any) -> bool:
    return isinstance(value, list | dict | set | bytearray)


def _number(value: Any) -> int:
    if isinstance(value, Theirs):
        return value.number_there
    raise TypeError(f"{type(value).__name__} cannot be handed to the program: it is no data")


def _error(name: str, text: str) -> Exception:
    kind = vars(builtins).get(name)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, QUIET):
        try:
            return kind(text)
        except TypeError:
            pass  # it takes more than a text
    return RuntimeError(f"{name}: {text}")


def main() -> None:
    """Be one of the two sides."""
    side, reads, writes = sys.argv[1:]
    with os.fdopen(int(reads), encoding="utf-8") as reading, os.fdopen(int(writes), "w", encoding="utf-8") as writing:
        if side == "program":
            answer(reading, writing)
            return
        try:
            test(reading, writing)
        except BaseException:  # noqa: BLE001 (SystemExit(0) above all is no verdict)
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


if __name__ == "__main__":
    main()
