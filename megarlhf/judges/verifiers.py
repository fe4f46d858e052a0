"""Rule rewards: is the answer of this response right? Never by running or evaluating anything the model wrote."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from itertools import product
from random import Random
from typing import Any, Literal

from megarlhf.data.arithmetic import is_correct
from megarlhf.data.prompts import PromptSet
from megarlhf.data.reasoning_gym import is_task
from megarlhf.data.rows import BUILT_IN
from megarlhf.errors import ConfigError

Compared = Literal["arithmetic", "gsm8k", "maths", "exact"]
"""By the text of response and answer alone."""
Verifier = Literal["arithmetic", "gsm8k", "maths", "exact", "reasoning_gym"]
Decider = Verifier | Literal["code_tests"]
"""What says that a response is right: a rule that compares with the answer, or the tests of a program."""
AutoVerifier = Literal["auto", "arithmetic", "gsm8k", "maths", "exact", "reasoning_gym"]
"""A setting: auto is the verifier of what is generated, of the built-in task or of reasoning-gym's, and none for any
other data."""

_BOXED = re.compile(r"\\boxed\s*\{")
_SAID = re.compile(r"answer(?:\s+is\b\s*:?|\**\s*:)|####", re.IGNORECASE)
"""What an answer follows; GSM8K's solutions have four hashes."""
_OF_A_UNIT = re.compile(r"([-+]?\$?[\d,]*\.?\d+)(?:\s+[a-z]{2,}){1,3}", re.IGNORECASE)
"""A number and what it counts, as in 18 dollars; a single letter may be a variable."""
_NUMBER = re.compile(r"(?:(?<!\d)-(?=[\d.$\\]))?(?:\\?\$)?\s?(-?(?:\d[\d,]*)?\.?\d+)")
"""As in -$1,234.50, and the sign before or after the currency."""
_MORE = re.compile(r"\s*(?:[/^]|:\d|e[+-]?\d|\\times|\\cdot|\*\s*\d)", re.IGNORECASE)
"""What makes another number of the one before it."""
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,!]|\{,\})(?=\d{3})")
"""Their separators in LaTeX, which math-verify takes for the end of a number."""
_LOOKED_AT = 512
"""Answers of a data set: a second of work."""
_LONGEST_ANSWER = 200
"""Characters. Longer ones are wrong unread: the time spent on an answer must not be in the hands of the policy."""
_SECONDS = 2
"""For parsing and again for comparing an answer, such as a tower of powers; then it is wrong."""


def verify(response: str, answer: str, verifier: Compared = "arithmetic") -> bool | None:
    """Whether `response` gives `answer`; None, which counts as wrong, where that took too long to find out.

    arithmetic: the response ends in "The answer is N.", digit for digit (the built-in task).
    gsm8k: its final answer, or where there is none its last number, is the number that `answer` gives, whatever stands
    around it: currency, units, per cent, stars of bold text, commas of thousands.
    maths: its final answer (the last \\boxed{...}, or else what follows the last "answer is", "Answer:" or "####",
    without the stars of bold text and the unit of a number) equals that of `answer`, or all of it where it has none, as
    mathematics, by the package math-verify: 1/2, 0.5 and \\frac{1}{2} are one answer. No final answer is a wrong one.
    exact: all of the response is `answer`, letter for letter, but for white space around them.

    Ranks:    main thread only for maths: math-verify stops overlong work by SIGALRM.
    Raises:   ConfigError if `maths` is asked for and math-verify is not installed.
    """
    if verifier == "arithmetic":
        return is_correct(response, answer)
    if verifier == "exact":
        return response.strip() == answer.strip()
    said = final_answer(response)
    gold = final_answer(answer)
    if verifier == "gsm8k":
        numbers = [_number(found, text) for found, text in ((gold, answer), (said, response))]
        return numbers[0] is not None and numbers[0] == numbers[1]
    return said is not None and _equal(said, _counted(answer) if gold is None else gold)


def check_answers(answers: Sequence[str], verifier: Compared, source: str, setting: str = "verifier") -> str:
    """What is to be said of answers that are right for no response, such as words where mathematics is compared.

    Up to 512 of them are looked at: a response that gives the very answer must be right.
    Raises:   ConfigError where that is none: every accuracy would be 0.
    """
    if verifier == "exact":  # any text can be given
        return ""
    every = [answer for answer in answers if answer]
    seen = Random(0).sample(every, min(len(every), _LOOKED_AT))
    given = (f"The answer is {final_answer(answer) or answer}." for answer in seen)
    unread = [answer for said, answer in zip(given, seen, strict=True) if not verify(said, answer, verifier)]
    if seen and len(unread) == len(seen):
        raise ConfigError(
            f"{setting}={verifier}: of {source} no answer can be right, for example {unread[0][-80:]!r}; choose "
            "another, or write answers as it reads them."
        )
    example = f", for example {unread[0][-80:]!r}" if unread else ""
    return f"{len(unread):,} of {len(seen):,} answers can be right for no response{example}" if unread else ""


def chosen_verifier(setting: Literal["auto", "none"] | Verifier, source: str) -> Verifier | None:
    """What judges responses to the prompts of `source`; none by default for data of the user's own.

    Raises:   ConfigError where it needs a package that is not installed.
    """
    if setting == "auto":
        return "arithmetic" if source == BUILT_IN else "reasoning_gym" if is_task(source) else None
    if setting == "none":
        return None
    check_verifier(setting)
    return setting


UNANSWERED = ("reasoning_gym", "code_tests")
"""What needs no answer to know whether a response is right."""


def is_told_right(verifier: Decider | None, prompts: PromptSet) -> bool:
    """Whether it will be known of any response if it is right, so that an accuracy is logged."""
    return verifier in UNANSWERED or (verifier is not None and any(prompts.answers))


def verifier_remark(verifier: Decider | None, prompts: PromptSet) -> str:
    """What the logged accuracy is of, or why none is logged."""
    answered = sum(map(bool, prompts.answers))
    if verifier is None:
        there = f", though {answered:,} of {len(prompts):,} prompts have an answer" if answered else ""
        return f"verifier: none, so no accuracy is logged{there}"
    if not is_told_right(verifier, prompts):
        return f"verifier: {verifier}, but no prompt has an answer (column 'answer'), so no accuracy is logged"
    if verifier in UNANSWERED:
        return f"verifier: {verifier}, of all {len(prompts):,} prompts"
    return f"verifier: {verifier}, of the {answered:,} of {len(prompts):,} prompts that have an answer"


def final_answer(response: str) -> str | None:
    """What the last \\boxed{...} holds, else what follows the last "answer is", "Answer:" or "####"; None for none."""
    boxes = list(_BOXED.finditer(response))
    if boxes:
        return _braced(response[boxes[-1].end() :])
    said = [
        response[found.end() :].strip(" *\n\t").partition("\n")[0].partition(". ")[0].strip(" *.")
        for found in _SAID.finditer(response)
    ]
    # "I am sure that the answer is correct" gives none.
    numbers = [text for text in said if re.search(r"[\d\\]", text)]
    return _counted((numbers or said)[-1]) if said else None


def _counted(text: str) -> str:
    """A number without what it counts; any other text as it is."""
    found = _OF_A_UNIT.fullmatch(text.strip()) if len(text) <= _LONGEST_ANSWER else None
    return found[1] if found else text


def _number(final: str | None, text: str) -> Decimal | None:
    """The number that a final answer begins with, behind its last "=", or else the last of the whole text."""
    said = text[-_LONGEST_ANSWER:] if final is None else final[:_LONGEST_ANSWER].rpartition("=")[2]
    said = _THOUSANDS.sub("", said.replace("\N{MINUS SIGN}", "-"))
    every = list(_NUMBER.finditer(said))
    if not every or (final is not None and re.search(r"\\[dt]?frac|\\sqrt", said)):
        return None
    found = every[-1 if final is None else 0]
    if _MORE.match(said, found.end()) or said[: found.start()].endswith(("/", "^")):
        return None
    value = Decimal(found[1].replace(",", ""))
    return -value if found[0].startswith("-") and not found[1].startswith("-") else value


def _braced(text: str) -> str | None:
    """`text` up to the brace that closes one opened before it; None if none does."""
    depth = 1
    for index, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:index]
    return None


def check_verifier(verifier: Verifier, setting: str = "verifier") -> None:
    """Raise ConfigError where `verifier` needs a package that is not installed."""
    if verifier == "maths" and importlib.util.find_spec("math_verify") is None:
        raise ConfigError(f"{setting}=maths needs the package math-verify; pip install math-verify.")


def _equal(said: str, answer: str) -> bool | None:
    check_verifier("maths")
    package: Any = importlib.import_module("math_verify")  # it has no types

    if len(said) > _LONGEST_ANSWER:
        return False
    # LaTeX alone: math-verify's other reader, of bare expressions, goes through sympy's parse_expr, which calls eval().
    read = partial(package.parse, extraction_config=[package.LatexExtractionConfig()], parsing_timeout=_SECONDS)
    gold, given = (
        _in_time(read, f"${_THOUSANDS.sub('', text.strip().strip('$'))}$", default=[]) for text in (answer, said)
    )
    if gold is None or given is None:
        return None
    verify_pair = partial(package.verify, timeout_seconds=_SECONDS)
    same = [_in_time(verify_pair, *pair, default=False) for pair in product(gold, given)]
    return None if not any(same) and None in same else any(same)


def _in_time(function: Callable[..., Any], *given: Any, default: Any) -> Any:
    """What it returns; `default` where it cannot take what is given, None where math-verify stops it."""
    try:
        return function(*given, raise_on_error=True)
    except Exception:  # noqa: BLE001 (of any kind: sympy's, its parser's)
        return default
    except importlib.import_module("math_verify.errors").TimeoutException:
        return None
