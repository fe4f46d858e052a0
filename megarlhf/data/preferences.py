"""What reward models and direct preference optimisation learn from.

Pairs have the columns `prompt` (text or a conversation), `chosen`, `rejected` (text or a turn) and, optionally,
`margin` (a number > 0: how much better the chosen response is; it weighs the pair in the loss, and 1 is assumed without
it).
Judged responses have `prompt`, `response` and `correct` (a number from 0 to 1, or to `scale`; soft labels allowed).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pydantic
import torch
from torch import Tensor

from megarlhf.batch.supervised import LabelledResponses, PreferencePairs
from megarlhf.data.arithmetic import labelled_rows, preference_rows
from megarlhf.data.columns import Columns
from megarlhf.data.row import Row
from megarlhf.data.rows import HERE, DataConfig, Origin, TokenSet, pad_right, read_rows, within_limit
from megarlhf.data.shapes import JUDGED, PAIRS
from megarlhf.data.tokenizer import Template, Tokenizer


class LabelledData(DataConfig):
    """Where judged responses come from and how they become tokens."""

    scale: float = pydantic.Field(default=1.0, gt=0)
    """The best grade that `correct` can be, where 0 is the worst: 4 for HelpSteer2's helpfulness. Grades are divided by
    it."""


@dataclass(frozen=True)
class PreferenceSet:
    """Tokenised pairs: each entry of `chosen` and `rejected` is the prompt with that response, EOS included."""

    prompt_lengths: Sequence[int]
    """How many tokens of both are the prompt."""
    chosen: Sequence[Sequence[int]]
    rejected: Sequence[Sequence[int]]
    margins: Sequence[float]
    pad_id: int
    dropped: int
    """Rows left out because they were over the limit."""
    origin: Origin = HERE

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, [*self.chosen, *self.rejected]))

    @property
    def longest_pair(self) -> int:
        """Tokens of both sequences of the longest pair."""
        return max(map(len, self.sides))

    @property
    def count(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, [*self.chosen, *self.rejected]))

    @property
    def sides(self) -> Iterator[Sequence[int]]:
        """Both sequences of each pair in one."""
        return ([*chosen, *rejected] for chosen, rejected in zip(self.chosen, self.rejected, strict=True))

    @property
    def example(self) -> dict[str, Sequence[int]]:
        """The parts of the first row, by name."""
        return {"chosen": self.chosen[0], "rejected": self.rejected[0]}

    def batch(self, indices: Tensor) -> PreferencePairs:
        """The pairs at `indices` (int64 [P]), chosen and rejected interleaved, padded to the longest of them."""
        chosen: list[int] = indices.tolist()
        sequences = [sequence for index in chosen for sequence in (self.chosen[index], self.rejected[index])]
        tokens, lengths = pad_right(sequences, self.pad_id)
        prompts = torch.tensor([self.prompt_lengths[index] for index in chosen], dtype=torch.int64)
        weight = torch.tensor([self.margins[index] for index in chosen], dtype=torch.float32)
        return PreferencePairs(tokens, prompts.repeat_interleave(2), lengths, weight)


@dataclass(frozen=True)
class LabelledSet(TokenSet):
    """Tokenised responses, each with its prompt and EOS, and how correct they are."""

    prompt_lengths: Sequence[int]
    """How many tokens of each are the prompt."""
    tokens: Sequence[Sequence[int]]
    correct: Sequence[float]
    pad_id: int
    dropped: int
    """Rows left out because they were over the limit."""
    origin: Origin = HERE

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


def load_preferences(config: DataConfig, tokenizer: Tokenizer, setting: str = "pairs") -> PreferenceSet:
    """Read, check and tokenise preference pairs, of the setting that is named; a pair is as long as its longer side.

    Raises:   DataError for a missing or empty source, a bad row (file, row, column), or rows over the limit.
    """
    kind = Columns(setting, ("prompt", "chosen", "rejected", "margin"), PAIRS)
    tokenizer = tokenizer.taking(config.control_tokens)
    loaded = read_rows(config, preference_rows, kind, lambda row: _pair(row, tokenizer, config.rendering))
    kept = within_limit(config, loaded, [max(len(pair.chosen), len(pair.rejected)) for pair in loaded.values])
    pairs = [loaded.values[index] for index in kept.indices]
    return PreferenceSet(
        [pair.prompt_length for pair in pairs],
        [pair.chosen for pair in pairs],
        [pair.rejected for pair in pairs],
        [pair.margin for pair in pairs],
        tokenizer.pad_id,
        dropped=kept.dropped,
        origin=kept.origin,
    )


def load_labelled(
    config: DataConfig, tokenizer: Tokenizer, setting: str = "labelled", scale: float = 1.0
) -> LabelledSet:
    """Read, check and tokenise judged responses, of the setting that is named, whose best grade is `scale`.

    Raises:   DataError for a missing or empty source, a bad row (file, row, column), or rows over the limit.
    """
    kind = Columns(setting, ("prompt", "response", "correct"), JUDGED)
    tokenizer = tokenizer.taking(config.control_tokens)

    def read(row: Row) -> _Judged:
        correct = row.number_in("correct", 0, scale, f", or set {setting}.scale") / scale
        prompt, response = row.answered_ids("response", tokenizer, config.rendering)
        return _Judged(len(prompt), [*prompt, *response], correct)

    loaded = read_rows(config, labelled_rows, kind, read)
    kept = within_limit(config, loaded, [len(judged.tokens) for judged in loaded.values])
    judged = [loaded.values[index] for index in kept.indices]
    return LabelledSet(
        [each.prompt_length for each in judged],
        [each.tokens for each in judged],
        [each.correct for each in judged],
        tokenizer.pad_id,
        dropped=kept.dropped,
        origin=kept.origin,
    )


class _Judged(NamedTuple):
    prompt_length: int
    tokens: list[int]
    correct: float


class _Pair(NamedTuple):
    prompt_length: int
    chosen: list[int]
    rejected: list[int]
    margin: float


def _pair(row: Row, tokenizer: Tokenizer, template: Template) -> _Pair:
    margin = _margin(row)
    prompt, chosen = row.answered_ids("chosen", tokenizer, template)
    _, rejected = row.answered_ids("rejected", tokenizer, template)
    if chosen == rejected:
        raise row.fault("rejected", "the same text as chosen; a pair must differ")
    return _Pair(len(prompt), [*prompt, *chosen], [*prompt, *rejected], margin)


def _margin(row: Row) -> float:
    if row.columns.get("margin") is None:
        return 1.0
    margin = row.number_in("margin", 0, float("inf"))
    if margin in (0.0, float("inf")):
        raise row.fault("margin", f"{margin:g} is out of range; use a finite number above 0")
    return margin
