"""Rules about the form of a response, whatever its answer: a pattern, a shape, a length."""

from __future__ import annotations

from typing import Literal

import regex

SECONDS = 1.0
"""For one pattern and one response: the policy writes the text, and some patterns take exponential time for some texts,
which only the package `regex` can stop."""

Unit = Literal["characters", "words"]


def pattern_fault(pattern: str) -> str:
    """What is wrong with a regular expression; "" where nothing is."""
    try:
        regex.compile(pattern)
    except regex.error as error:
        return str(error)
    return ""


def has_pattern(pattern: str, text: str) -> bool | None:
    """Whether `pattern` is found anywhere in `text`; None where looking for it took too long."""
    try:
        return regex.search(pattern, text, timeout=SECONDS) is not None
    except TimeoutError:
        return None


def has_shape(pattern: str, text: str) -> bool | None:
    """Whether `pattern` is all of `text`, in which a dot is any character, line ends too; None as above."""
    try:
        return regex.fullmatch(pattern, text, regex.DOTALL, timeout=SECONDS) is not None
    except TimeoutError:
        return None


def has_length(text: str, unit: Unit, least: int | None, most: int | None) -> bool:
    """Whether `text` has so many characters, or words (what white space separates); null is no bound."""
    length = len(text) if unit == "characters" else len(text.split())
    return (least is None or least <= length) and (most is None or length <= most)
