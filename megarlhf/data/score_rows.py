"""Rows to score: text with a given response, or token ids. Columns, the first of these that a row has:

    messages            a conversation [{role, content}, ...] that ends with the assistant: its last turn is predicted
    response, prompt    text, and text or a conversation: the response is predicted
    tokens              a list of at least two token ids: all but the first are predicted

EOS ends a response and is predicted too, alone where the response is empty; token ids are taken as they are. One file
may mix the three kinds; a column that is null counts as absent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megarlhf.batch.supervised import TokenBatch
from megarlhf.data.arithmetic import sft_rows
from megarlhf.data.dialogue import Dialogue
from megarlhf.data.row import Row
from megarlhf.data.rows import DataConfig, load_rows
from megarlhf.data.sft import SftSet, encode_demonstration
from megarlhf.data.tokenizer import Template, Tokenizer

_PADDING = 0
"""Id of padding. Any will do, since no mask reads it, and rows of token ids need no tokenizer to name one."""


@dataclass(frozen=True)
class ScoreSet:
    """Rows to score. They are tokenised when asked for: the ids of a whole file would take many times its bytes."""

    rows: Sequence[Row]
    tokenizer: Callable[[], Tokenizer]
    """Gives the tokenizer; asked only if a row has text."""
    template: Template

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> TokenBatch:
        """The rows at `indices`, padded to the longest of them; what is predicted is what the loss mask marks."""
        rows = [self._encoded(self.rows[index]) for index in indices]
        return SftSet(rows, _PADDING, dropped=0).batch(torch.arange(len(rows)))

    def check(self, vocab_size: int, context: int, added: Sequence[str]) -> int:
        """Tokenise every row once, to find what a model of this vocabulary and context (tokens) could not read.

        added: fields that the output adds to each row, which no row may have. Returns the tokens of the longest row.
        Raises:   DataError naming file, row and column of the first bad row.
        """
        longest = 0
        for row in self.rows:
            row.check_free(added)
            ((read, _),), ids = self._encoded(row)
            if not 0 < read < len(ids):
                counts = f"it has {read} and {len(ids) - read}"
                raise row.fault(_kind(row), f"a row needs a token to read and one to predict, {counts}; lengthen it")
            if len(ids) > context:
                raise row.fault(_kind(row), f"{len(ids)} tokens, but the model's context is {context}; shorten the row")
            foreign = next((number for number in ids if not 0 <= number < vocab_size), None)
            if foreign is not None:
                raise row.fault(_kind(row), f"the model has no token {foreign}; use ids of 0 to {vocab_size - 1}")
            longest = max(longest, len(ids))
        return longest

    def _encoded(self, row: Row) -> Dialogue:
        """What is read, and where in it what is predicted is."""
        if _kind(row) == "tokens":
            ids = _token_ids(row)
            return Dialogue([(min(1, len(ids)), len(ids))], ids)
        given = Row(row.source, row.number, {name: value for name, value in row.columns.items() if value is not None})
        tokenizer = self.tokenizer()
        if given.columns.get("response") == "":  # a model may end at once, and `generate` writes what it said
            prompt, ended = given.prompt_ids(tokenizer, self.template), tokenizer.encode_response("")
            return Dialogue([(len(prompt), len(prompt) + len(ended))], [*prompt, *ended])
        return encode_demonstration(given, tokenizer, self.template)


def load_score_rows(path: Path, tokenizer: Callable[[], Tokenizer], template: Template) -> ScoreSet:
    """Read the JSON lines of `path`.

    Raises:   DataError if the file is missing or empty, or a line is not a JSON object (file and row).
    """
    return ScoreSet(load_rows(DataConfig(source=str(path)), sft_rows), tokenizer, template)


def _kind(row: Row) -> str:
    """The column that holds what is predicted."""
    for column in ("messages", "response", "tokens"):
        if row.columns.get(column) is not None:
            return column
    there = sorted(row.columns)
    raise row.fault("response", f"missing; the row has {there}, it needs prompt and response, messages, or tokens")


def _token_ids(row: Row) -> list[int]:
    ids = row.columns["tokens"]
    if not isinstance(ids, list):
        raise row.fault("tokens", f"{type(ids).__name__} is not a list; write token ids as [1, 2, ...]")
    for number in ids:
        if type(number) is not int:  # true is an int to isinstance
            raise row.fault("tokens", f"{number!r} is not a token id; write whole numbers without quotes")
    return ids
