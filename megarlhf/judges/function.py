"""A judge that is a Python function of the user's own."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from megarlhf.data.prompts import PromptSet
from megarlhf.data.sources import is_there
from megarlhf.errors import ConfigError, JudgeError
from megarlhf.judges.texts import MOST, Opinion, Reader, Response, Scorer, TextJudgeConfig, is_score

FORM = "def NAME(prompt, response, answer, columns) -> float, or a dict of parts by name"


class FunctionConfig(TextJudgeConfig):
    """A function of one's own."""

    kind: Literal["function"]
    """`function`: a Python function of your own."""
    function: str
    """`FILE.py:NAME`, called as NAME(prompt, response, answer, columns) for every response: the prompt as the data has
    it, the text of the response, the expected answer or "", and all columns of the prompt's row. It returns a number,
    or a dict of numbers by name, which are added. It runs on every rank, as you."""

    def check(self, setting: str, prompts: PromptSet, source: str) -> str:
        """Nothing. Raises ConfigError where the function cannot be had, or called so."""
        _loaded(f"{setting}.function={self.function}", self.function)
        return ""

    def scorer(self, setting: str, reader: Reader) -> Scorer:
        """What calls the function."""
        found = _loaded(f"{setting}.function={self.function}", self.function)
        return partial(_judged, f"{setting}: {self.function}", found)


def _loaded(setting: str, function: str) -> Callable[..., Any]:
    """The function. Raises ConfigError where there is none that takes what it is given."""
    file, _, name = function.rpartition(":")
    if not (file.endswith(".py") and name.isidentifier() and is_there(Path(file), Path.is_file)):
        raise ConfigError(f"{setting}: no such file, or not of the form FILE.py:NAME; correct it.")
    try:
        module = _module(Path(file).resolve())
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{setting}: {file} raised {_said(error)} when it was run; mend it.") from error
    found = vars(module).get(name)
    if not callable(found):
        raise ConfigError(f"{setting}: {file} defines no function {name}; write {FORM}.")
    try:
        inspect.signature(found).bind("", "", "", {})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{setting} cannot be called ({error}); write {FORM}.") from None
    return found


@cache
def _module(path: Path) -> ModuleType:
    """The user's file, run once a process, whatever is taken from it."""
    name = f"own_judges_{hashlib.sha256(bytes(path)).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # of a .py file there is one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    spec.loader.exec_module(module)
    return module


def _judged(what: str, function: Callable[..., Any], responses: Sequence[Response]) -> list[Opinion]:
    return [_opinion(what, function, each) for each in responses]


def _opinion(what: str, function: Callable[..., Any], of: Response) -> Opinion:
    where = f"the response {_short(of.response)} to the prompt of row {of.row} ({_short(of.prompt)})"
    try:
        said = function(of.prompt, of.response, of.answer, dict(of.columns))
    except (Exception, SystemExit) as error:
        raise JudgeError(f"{what} raised {_said(error)} for {where}; mend it.") from error
    parts: dict[Any, Any] = dict(said) if isinstance(said, Mapping) else {"": said}  # pyright: ignore[reportUnknownArgumentType]
    if not all(map(is_score, parts.values())) or not is_score(sum(parts.values())):
        raise JudgeError(f"{what} returned {_short(said)} for {where}; return numbers of a size up to {MOST:g}.")
    named = {str(name): float(value) for name, value in parts.items() if name}
    return Opinion(float(sum(parts.values())), named)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _short(thing: Any) -> str:
    text = repr(thing)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"
