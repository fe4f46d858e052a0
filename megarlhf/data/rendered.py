"""What a chat template wrote, with what in it is to be told apart."""

from __future__ import annotations

import re
from typing import NamedTuple


class Rendered(NamedTuple):
    """A conversation as the chat template writes it."""

    pieces: list[str]
    """The text in order; every second piece is a control token that a turn has, which controls nothing."""
    generated: list[tuple[int, int]]
    """Where the template says that the assistant wrote it ({% generation %}): characters from, and up to."""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


def between(text: str, opens: str, closes: str) -> list[tuple[int, int]]:
    """What is between two characters, as characters of the text without any of them."""
    spans: list[tuple[int, int]] = []
    length = start = 0
    for piece in re.split(f"([{opens}{closes}])", text):
        if piece == opens:
            start = length
        elif piece == closes:
            spans.append((start, length))
        else:
            length += len(piece)
    return spans
