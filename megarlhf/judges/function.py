"""A judge that is a Python function of the user's own."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from megarlhf.data.prompts import PromptSet
from megarlhf.errors import ConfigError, JudgeError
from megarlhf.judges.texts import Opinion, Response, Scorer, TextJudgeConfig

FORM = "def NAME(prompt, response, answer, columns) -> float, or a dict of parts by name"


class FunctionConfig(TextJudgeConfig):
    """A function of one's own."""

    kind: Literal["function"]
    """`function`: a Python function of your own."""
    function: str
    """`FILE.py:NAME`, called as NAME(prompt, response, answer, columns) for every response: the prompt as the data has
    it, the text of the response, the expected answer or "", and all columns of the prompt's row. It returns a number,
    or a dict of numbers by name, which are added. It runs on every rank, as you."""

    def check(self, name: str, prompts: PromptSet, source: str) -> None:
        """Raise ConfigError where the function cannot be had, or called so."""
        _loaded(name, self.function)

    def scorer(self, name: str, world: int) -> Scorer:
        """What calls the function."""
        return partial(_judged, f"judges.{name}: {self.function}", _loaded(name, self.function))


@cache
def _loaded(judge: str, function: str) -> Callable[..., Any]:
    """The function, its file run once a process.

    Raises:   ConfigError where there is none that takes what it is given.
    """
    setting = f"judges.{judge}.function={function}"
    file, _, name = function.rpartition(":")
    path = Path(file)
    if not (file.endswith(".py") and name.isidentifier() and path.is_file()):
        raise ConfigError(f"{setting}: no such file, or not of the form FILE.py:NAME; correct it.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None  # of a .py file there is one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{setting}: {path} raised {_said(error)} when it was run; mend it.") from error
    found = vars(module).get(name)
    if not callable(found):
        raise ConfigError(f"{setting}: {path} defines no function {name}; write {FORM}.")
    try:
        inspect.signature(found).bind("", "", "", {})
    except TypeError as error:
        raise ConfigError(f"{setting} cannot be called ({error}); write {FORM}.") from None
    return found


def _judged(what: str, function: Callable[..., Any], responses: Sequence[Response]) -> list[Opinion]:
    return [_opinion(what, function, each) for each in responses]


def _opinion(what: str, function: Callable[..., Any], of: Response) -> Opinion:
    where = f"the response {_short(of.response)} to the prompt of row {of.row} ({_short(of.prompt)})"
    try:
        said = function(of.prompt, of.response, of.answer, dict(of.columns))
    except Exception as error:
        raise JudgeError(f"{what} raised {_said(error)} for {where}; mend it.") from error
    parts: dict[Any, Any] = dict(said) if isinstance(said, Mapping) else {"": said}  # type: ignore[reportUnknownArgumentType]
    for value in parts.values():
        # bool is a number to Python; NumPy's and torch's scalars are not
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise JudgeError(f"{what} returned {_short(said)} for {where}; return finite numbers.")
    named = {str(name): float(value) for name, value in parts.items() if name}
    return Opinion(float(sum(parts.values())), named)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _short(thing: Any) -> str:
    text = repr(thing)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"
