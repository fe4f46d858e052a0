"""Supervised text. Columns: `prompt` (text or a conversation) and `response` (text or a turn), or `messages`.

`messages` is a conversation [{role, content}, ...] that ends with the assistant. Its last turn is supervised, or with
`supervise: all` every turn of the assistant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlhf.batch.supervised import TokenBatch
from megarlhf.data.arithmetic import sft_rows
from megarlhf.data.columns import Columns
from megarlhf.data.dialogue import Dialogue, Supervise
from megarlhf.data.row import Row
from megarlhf.data.rows import HERE, DataConfig, Origin, pad_right, read_rows, within_limit
from megarlhf.data.shapes import DEMONSTRATIONS
from megarlhf.data.tokenizer import Template, Tokenizer

COLUMNS = Columns("data", ("prompt", "response", "messages"), DEMONSTRATIONS)


class SftData(DataConfig):
    """Where demonstrations come from and how they become tokens."""

    supervise: Supervise = "last"
    """Turns of a conversation (`messages`) that are learnt from: the `last`, or `all` of the assistant's, which are
    what the chat template marks by {% generation %}, or else what it writes for them."""


@dataclass(frozen=True)
class SftSet:
    """Tokenised demonstrations, EOS included."""

    rows: Sequence[Dialogue]
    pad_id: int
    dropped: int
    """Rows left out because they were over the limit."""
    origin: Origin = HERE

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> list[Sequence[int]]:
        """Tokens of every row."""
        return [row.ids for row in self.rows]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.rows)

    @property
    def count(self) -> int:
        """Tokens of all rows, prompts too."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def example(self) -> dict[str, Sequence[int]]:
        """The parts of the first row, by name."""
        row, read = self.rows[0], 0
        parts: dict[str, Sequence[int]] = {}
        for turn, (start, end) in enumerate(row.spans, start=1):
            number = f" {turn}" if len(row.spans) > 1 else ""
            parts |= {f"prompt{number}": row.ids[read:start], f"response{number}": row.ids[start:end]}
            read = end
        return parts

    def batch(self, indices: Tensor) -> TokenBatch:
        """The rows at `indices` (int64 [B]), padded to the longest of them; responses are supervised, EOS in."""
        chosen = [self.rows[index] for index in indices.tolist()]
        tokens, lengths = pad_right([row.ids for row in chosen], self.pad_id)
        taught = torch.zeros_like(tokens, dtype=torch.bool)
        for at, row in enumerate(chosen):
            for start, end in row.spans:
                taught[at, start:end] = True
        return TokenBatch(tokens, lengths, taught[:, 1:])


def load_sft(config: DataConfig, tokenizer: Tokenizer, supervise: Supervise = "last") -> SftSet:
    """Read, check and tokenise demonstrations.

    Raises:   DataError for a missing or empty source, a bad row (file, row, column), or rows over the limit.
    """
    tokenizer = tokenizer.taking(config.control_tokens)
    loaded = read_rows(
        config,
        sft_rows,
        COLUMNS,
        lambda row: encode_demonstration(row, tokenizer, config.rendering, supervise),
    )
    kept = within_limit(config, loaded, [len(row.ids) for row in loaded.values])
    return SftSet([loaded.values[index] for index in kept.indices], tokenizer.pad_id, kept.dropped, kept.origin)


def encode_demonstration(row: Row, tokenizer: Tokenizer, template: Template, supervise: Supervise = "last") -> Dialogue:
    """The ids of a row, EOS included, and where its responses are. Raises DataError naming row and column."""
    if row.columns.get("tools"):
        raise row.fault("tools", "definitions of tools are not rendered; remove the row, or the column")
    if "messages" in row.columns:
        return row.dialogue("messages", row.messages("messages"), tokenizer, template, supervise)
    prompt, response = row.answered_ids("response", tokenizer, template)
    return Dialogue([(len(prompt), len(prompt) + len(response))], [*prompt, *response])
