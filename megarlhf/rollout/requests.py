"""What is prefilled together: a prompt for all of its samples, and for prompts that it begins with."""

from __future__ import annotations

from typing import NamedTuple

from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.errors import DataError


class Request(NamedTuple):
    """Neighbouring rows that are prefilled together."""

    row: int
    """The first."""
    tokens: list[int]
    """Of the longest of their prompts, which the others begin."""
    lengths: list[int]
    """Tokens of each row's own prompt."""


def requests_of(rows: Prompts, most: int) -> list[Request]:
    """Runs of adjacent prompts that begin the longest of them, of at most `most` rows. Equal ones begin each other."""
    requests: list[Request] = []
    for row, (padded, length) in enumerate(zip(rows.tokens.tolist(), rows.lengths.tolist(), strict=True)):
        prompt = padded[:length]
        first, tokens, lengths = requests[-1] if requests else Request(row, prompt, [])
        shorter, longer = sorted((prompt, tokens), key=len)
        if requests and len(lengths) < most and _begins(shorter, longer):
            requests[-1] = Request(first, longer, [*lengths, length])
        else:
            requests.append(Request(row, prompt, [length]))
    return requests


def none(prompts: Prompts) -> Rollout:
    """No responses, to no prompts: of a data rank that has none."""
    numbers = prompts.lengths
    tokens = prompts.tokens[:, :1]
    return Rollout(tokens, numbers, numbers, numbers > 0, numbers.new_zeros(0, 0).float(), numbers, ())


def check_room(prompts: Prompts, limit: int) -> None:
    """Raise DataError where a prompt leaves no room for a response in `limit` tokens."""
    for row, (length, prompt) in enumerate(zip(prompts.lengths.tolist(), prompts.ids.tolist(), strict=True)):
        if length >= limit:
            raise DataError(
                f"prompt row {row} (data set row {prompt}) has {length} tokens and max_sequence_length is {limit}; "
                "drop the prompt or raise the limit."
            )


def _begins(prompt: list[int], other: list[int]) -> bool:
    """Whether a row of `prompt` can be made of what is prefilled of `other`: a cache cannot be cut to no token."""
    return other[: len(prompt)] == prompt and (len(prompt) == len(other) or len(prompt) > 1)
