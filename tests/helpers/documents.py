"""The fenced blocks of the documents."""

from __future__ import annotations

import re

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, language: str = "") -> list[str]:
    """Those of a language; without one those that name none, which hold what is typed and what is printed."""
    return [body for name, body in _FENCED.findall(text) if name == language]
