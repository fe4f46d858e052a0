"""Conversations as tokens, and which of them the assistant is taught to write."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter
from typing import Literal, NamedTuple

from megarlhf.data.tokenizer import Message, Rendered, Template, Tokenizer
from megarlhf.errors import DataError

Supervise = Literal["last", "all"]
Span = tuple[int, int]


class Dialogue(NamedTuple):
    """A conversation."""

    spans: list[Span]
    """What is taught: tokens from, and up to; in order, at least one."""
    ids: list[int]
    """All of its tokens."""


def encode_dialogue(
    tokenizer: Tokenizer, messages: Sequence[Message], template: Template, supervise: Supervise = "last"
) -> Dialogue:
    """The tokens of the chat template for a conversation that ends with the assistant, and those to be taught.

    A turn is what the template writes after the prompt that the turns before it make, up to the token that ends it. For
    all turns what the template itself marks by {% generation %} goes first.
    Raises:   DataError where the template does not tell turns apart, or there is no template.
    """
    if template != "chat":
        raise DataError("a conversation has no plain form: its turns would run together; set template=chat.")
    whole = tokenizer.rendered(messages, add_generation_prompt=False)
    ids, offsets = tokenizer.encode_rendered(whole)
    if supervise == "all" and whole.generated:
        marked = [_tokens(offsets, span) for span in whole.generated if span[0] < span[1]]
        if not marked:
            raise DataError(f"the chat template of {tokenizer.source} marks nothing that the assistant wrote; mend it.")
        return Dialogue(marked, ids)
    spoken = [at for at, turn in enumerate(messages) if turn["role"] == "assistant"]
    taught = spoken if supervise == "all" else spoken[-1:]
    spans = [_ended(_tokens(offsets, _turn(tokenizer, messages, at, whole)), ids, tokenizer) for at in taught]
    if any(ids[end - 1] != tokenizer.eos_id for _, end in spans[:-1]):
        raise DataError(
            f"the chat template of {tokenizer.source} ends not every turn of the assistant with "
            f"{tokenizer.decode_all([tokenizer.eos_id])!r}, so that such turns teach no stop; set supervise=last."
        )
    start, end = spans[-1]
    # What a sampler ends with, where the template leaves it to it; what comes after the end, nobody reads.
    ids = ids[:end] if ids[end - 1] == tokenizer.eos_id else [*ids[:end], tokenizer.eos_id]
    return Dialogue([*spans[:-1], (start, len(ids))], ids)


def _turn(tokenizer: Tokenizer, messages: Sequence[Message], at: int, whole: Rendered) -> Span:
    """The characters of a turn in the whole conversation."""
    if not at:
        raise DataError("the assistant speaks first, after no prompt; remove that turn, or set supervise=last.")
    before = tokenizer.rendered(messages[:at], add_generation_prompt=True).text
    through = whole.text if at + 1 == len(messages) else tokenizer.rendered(messages[: at + 1], False).text
    if not (whole.text.startswith(through) and through.startswith(before)):
        remedy = "give prompt and response instead" if at + 1 == len(messages) else "set supervise=last"
        raise DataError(
            f"the chat template of {tokenizer.source} writes the turns before turn {at + 1} otherwise once it is "
            f"there, or turn {at + 1} once others follow, so that it cannot be told from them; mark what the assistant "
            f"writes by {{% generation %}} in the template, or {remedy}."
        )
    return len(before), len(through)


def _tokens(offsets: Sequence[Span], characters: Span) -> Span:
    """The tokens that have some of the characters."""
    first, last = characters
    start = bisect_right(offsets, first, key=itemgetter(1))
    return start, bisect_left(offsets, last, start, key=itemgetter(0))


def _ended(span: Span, ids: Sequence[int], tokenizer: Tokenizer) -> Span:
    """A turn up to the token that ends it, if it has one: some templates write a line break after it."""
    start, end = span
    last = next((at for at in range(end - 1, start - 1, -1) if ids[at] == tokenizer.eos_id), None)
    return span if last is None else (start, last + 1)
