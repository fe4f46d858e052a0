"""Where the steps of a response end, in tokens.

Steps are parted by a separator. A step ends with the token that has the separator's first character: that token may
have more of it, or what was written before it, for tokenizers merge them (588 of Llama 3's tokens contain an empty
line). So ends are found by what the tokens up to one say, never by an id. The last step ends with the response's last
token, EOS or where it was cut.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from itertools import accumulate, pairwise

from megarlhf.batch.rollouts import Rollout
from megarlhf.data.arithmetic import STEP_SEPARATOR
from megarlhf.data.row import Row
from megarlhf.data.rows import BUILT_IN
from megarlhf.data.tokenizer import Tokenizer

PARAGRAPH = "\n\n"
"""What parts steps in most public data."""


def usual_separator(sources: Collection[str]) -> str:
    """What parts the steps of rows from these sources, where nobody says otherwise."""
    return STEP_SEPARATOR if set(sources) == {BUILT_IN} else PARAGRAPH


def step_ends(ids: Sequence[int], separator: str, tokenizer: Tokenizer) -> list[int]:
    """The last token of every step of a response that was written freely, ascending; the last is len(ids) - 1.

    Separators with nothing but white space between them part two steps only, and one with nothing after it ends none:
    a response earns no steps by empty lines.

    ids: of the response, at least one, its EOS among them.
    """
    text = tokenizer.decode(ids)
    *closed, last = text.split(separator)
    starts = accumulate((len(step) + len(separator) for step in closed), initial=0)
    ends = [start + len(step) for start, step in zip(starts, closed, strict=False) if step.strip()]
    if not last.strip():
        ends = ends[:-1]
    return list(dict.fromkeys([*tokens_at(ids, ends, tokenizer), len(ids) - 1]))


def ends_in(rollout: Rollout, separator: str, tokenizer: Tokenizer) -> list[list[int]]:
    """The last token of every step of each response, by its place in the row's tokens."""
    places = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    return [[start + at for at in step_ends(row[start:end], separator, tokenizer)] for row, start, end in places]


def stepped(row: Row, steps: Sequence[str], separator: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of a row's steps joined by the separator, EOS in, and the last token of each step in them.

    Raises:   DataError naming file, row and column where the row has its response too, and that is another text; or
              where the tokenizer changes the text: ends are counted in its characters.
    """
    text, whole = separator.join(steps), row.columns.get("response")
    apart = row.kind.said("steps") != row.kind.said("response")  # steps that a form marks inside of its response
    if apart and isinstance(whole, str) and whole != text and parted(whole, separator) != list(steps):
        raise row.fault(
            "steps",
            f"joined by separator={separator!r} they are not the row's response {whole!r:.60}, and that is what a "
            "model would read later; set the separator that the steps were parted by, or remove the column response",
        )
    ids = row.encoded("steps", lambda: tokenizer.encode_response(text))
    if tokenizer.decode(ids) != text:
        raise row.fault(
            "steps",
            f"the tokenizer does not give the text back as it is, its steps joined by {separator!r}; set a separator "
            "that it knows, remove white space, or remove the row",
        )
    return ids, given_ends(ids, steps, separator, tokenizer)


def parted(response: str, separator: str) -> list[str]:
    """The steps of a response; a piece of white space alone is none."""
    return [piece for piece in response.split(separator) if piece.strip()]


def check_own_ends(
    row: Row, ids: Sequence[int], ends: Sequence[int], which: Sequence[int], tokenizer: Tokenizer
) -> None:
    """Raise DataError where two steps, of those at the places `which`, end with one token of `ids`."""
    for one, other in pairwise(which):
        if ends[one] == ends[other]:
            shared = tokenizer.decode_all([ids[ends[one]]])
            raise row.fault(
                "steps", f"steps {one + 1} and {other + 1} end with one token, {shared!r}; join them, or remove the row"
            )


def given_ends(ids: Sequence[int], steps: Sequence[str], separator: str, tokenizer: Tokenizer) -> list[int]:
    """The last token of each of `steps`, of which `ids` are the text joined by the separator, and EOS.

    Two steps may end with one token, where a tokenizer merges all of the second.
    """
    starts = accumulate((len(step) + len(separator) for step in steps[:-1]), initial=0)
    ends = [start + len(step) for start, step in zip(starts, steps[:-1], strict=False)]
    return [*tokens_at(ids, ends, tokenizer), len(ids) - 1]


def tokens_at(ids: Sequence[int], places: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The token that has the character at each of the ascending places in the text of `ids`."""
    alone = {token: tokenizer.decode([token]) for token in set(ids)}
    if "".join(alone[token] for token in ids) != tokenizer.decode(ids):
        return tokens_at_ref(ids, places, tokenizer)
    # All tokens say among others what they say alone, so that what is said up to one is as long as a sum.
    said = list(accumulate(len(alone[token]) for token in ids))
    return [min(bisect_right(said, place), len(ids) - 1) for place in places]


def tokens_at_ref(ids: Sequence[int], places: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The slow twin, of any tokenizer: where tokens are words, or several are one letter."""
    text = tokenizer.decode(ids)
    found: list[int] = []
    for place in places:
        wanted = text[: place + 1]
        first = found[-1] if found else 0
        # Of ever more tokens the text only grows, so that halving finds the first that say all that is wanted.
        found.append(
            first
            + bisect_left(range(first + 1, len(ids)), True, key=lambda n: tokenizer.decode(ids[:n]).startswith(wanted))
        )
    return found
