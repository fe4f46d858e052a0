"""What reward models learn from.

Pairs have the columns `prompt` (text or a conversation), `chosen`, `rejected` (text) and, optionally, `margin` (a
number > 0: how much better the chosen response is; it weighs the pair in the loss, and 1 is assumed without it).
Judged responses have `prompt`, `response` and `correct` (a number from 0 to 1; soft labels allowed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlhf.batch.supervised import LabelledResponses, PreferencePairs
from megarlhf.data.arithmetic import labelled_rows, preference_rows
from megarlhf.data.columns import Columns
from megarlhf.data.rows import DataConfig, Row, load_rows, pad_right, within_limit
from megarlhf.data.tokenizer import Template, Tokenizer


@dataclass(frozen=True)
class PreferenceSet:
    """Tokenised pairs: each entry of `chosen` and `rejected` is the prompt with that response, EOS included."""

    chosen: Sequence[Sequence[int]]
    rejected: Sequence[Sequence[int]]
    margins: Sequence[float]
    pad_id: int
    dropped: int
    """Rows left out because they were over the limit."""

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, [*self.chosen, *self.rejected]))

    @property
    def count(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, [*self.chosen, *self.rejected]))

    @property
    def example(self) -> dict[str, Sequence[int]]:
        """The parts of the first row, by name."""
        return {"chosen": self.chosen[0], "rejected": self.rejected[0]}

    def batch(self, indices: Tensor) -> PreferencePairs:
        """The pairs at `indices` (int64 [P]), chosen and rejected interleaved, padded to the longest of them."""
        chosen: list[int] = indices.tolist()
        sequences = [sequence for index in chosen for sequence in (self.chosen[index], self.rejected[index])]
        weight = torch.tensor([self.margins[index] for index in chosen], dtype=torch.float32)
        return PreferencePairs(*pad_right(sequences, self.pad_id), weight)


@dataclass(frozen=True)
class LabelledSet:
    """Tokenised responses, each with its prompt and EOS, and how correct they are."""

    tokens: Sequence[Sequence[int]]
    correct: Sequence[float]
    pad_id: int
    dropped: int
    """Rows left out because they were over the limit."""

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.tokens))

    @property
    def count(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.tokens))

    @property
    def example(self) -> dict[str, Sequence[int]]:
        """The parts of the first row, by name."""
        return {"prompt and response": self.tokens[0]}

    def batch(self, indices: Tensor) -> LabelledResponses:
        """The responses at `indices` (int64 [B]), padded to the longest of them, weight 1 each."""
        chosen: list[int] = indices.tolist()
        tokens, lengths = pad_right([self.tokens[index] for index in chosen], self.pad_id)
        correct = torch.tensor([self.correct[index] for index in chosen], dtype=torch.float32)
        return LabelledResponses(tokens, lengths, correct, torch.ones_like(correct))


def load_preferences(config: DataConfig, tokenizer: Tokenizer) -> PreferenceSet:
    """Read, check and tokenise preference pairs; a pair counts as long as its longer side.

    Raises:   DataError for a missing or empty source, a bad row (file, row, column), or rows over the limit.
    """
    rows = load_rows(config, preference_rows, Columns("pairs", ("prompt", "chosen", "rejected", "margin")))
    tokenizer = tokenizer.taking(config.control_tokens)
    margins = [_margin(row) for row in rows]
    chosen = [_encode(row, "chosen", tokenizer, config.rendering) for row in rows]
    rejected = [_encode(row, "rejected", tokenizer, config.rendering) for row in rows]
    for row in rows:
        if row.columns["chosen"] == row.columns["rejected"]:
            raise row.fault("rejected", "the same text as chosen; a pair must differ")
    kept = within_limit(config, rows, [max(len(c), len(r)) for c, r in zip(chosen, rejected, strict=True)])
    chosen, rejected, margins = zip(*((chosen[i], rejected[i], margins[i]) for i in kept), strict=True)
    return PreferenceSet(chosen, rejected, margins, tokenizer.pad_id, len(rows) - len(kept))


def load_labelled(config: DataConfig, tokenizer: Tokenizer, setting: str = "labelled") -> LabelledSet:
    """Read, check and tokenise judged responses, of the setting that is named.

    Raises:   DataError for a missing or empty source, a bad row (file, row, column), or rows over the limit.
    """
    rows = load_rows(config, labelled_rows, Columns(setting, ("prompt", "response", "correct")))
    tokenizer = tokenizer.taking(config.control_tokens)
    correct = [row.number_in("correct", 0, 1) for row in rows]
    tokens = [_encode(row, "response", tokenizer, config.rendering) for row in rows]
    kept = within_limit(config, rows, [len(ids) for ids in tokens])
    return LabelledSet([tokens[i] for i in kept], [correct[i] for i in kept], tokenizer.pad_id, len(rows) - len(kept))


def _encode(row: Row, column: str, tokenizer: Tokenizer, template: Template) -> list[int]:
    return [*row.prompt_ids(tokenizer, template), *row.response_ids(column, tokenizer)]


def _margin(row: Row) -> float:
    if row.columns.get("margin") is None:
        return 1.0
    margin = row.number_in("margin", 0, float("inf"))
    if margin in (0.0, float("inf")):
        raise row.fault("margin", f"{margin:g} is out of range; use a finite number above 0")
    return margin
