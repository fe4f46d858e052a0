"""Supervised text. Columns: `prompt` (text or a conversation) and `response` (text), or `messages`.

`messages` is a conversation [{role, content}, ...] that ends with the assistant: that last turn is the response, and
it alone is supervised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megarlhf.batch.supervised import TokenBatch
from megarlhf.data.arithmetic import sft_rows
from megarlhf.data.columns import Columns
from megarlhf.data.rows import DataConfig, Row, load_rows, pad_right, within_limit
from megarlhf.data.tokenizer import Template, Tokenizer


@dataclass(frozen=True)
class SftSet:
    """Tokenised prompts with their responses (EOS included)."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[Sequence[int]]
    pad_id: int
    dropped: int
    """Rows left out because they were over the limit."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(prompt) + len(response) for prompt, response in zip(self.prompts, self.responses, strict=True))

    @property
    def count(self) -> int:
        """Tokens of all rows, prompts too."""
        return sum(map(len, [*self.prompts, *self.responses]))

    @property
    def example(self) -> dict[str, Sequence[int]]:
        """The parts of the first row, by name."""
        return {"prompt": self.prompts[0], "response": self.responses[0]}

    def batch(self, indices: Tensor) -> TokenBatch:
        """The rows at `indices` (int64 [B]), padded to the longest of them; responses are supervised, EOS in."""
        chosen: list[int] = indices.tolist()
        tokens, lengths = pad_right([[*self.prompts[i], *self.responses[i]] for i in chosen], self.pad_id)
        starts = torch.tensor([len(self.prompts[i]) for i in chosen], dtype=torch.int64)
        label = torch.arange(1, tokens.shape[1])
        return TokenBatch(tokens, lengths, (label >= starts[:, None]) & (label < lengths[:, None]))


def load_sft(config: DataConfig, tokenizer: Tokenizer) -> SftSet:
    """Read, check and tokenise demonstrations.

    Raises:   DataError for a missing or empty source, a bad row (file, row, column), or rows over the limit.
    """
    rows = load_rows(config, sft_rows, Columns("data", ("prompt", "response", "messages")))
    tokenizer = tokenizer.taking(config.control_tokens)
    encoded = [encode_demonstration(row, tokenizer, config.rendering) for row in rows]
    kept = within_limit(config, rows, [len(prompt) + len(response) for prompt, response in encoded])
    prompts, responses = zip(*(encoded[i] for i in kept), strict=True)
    return SftSet(prompts, responses, tokenizer.pad_id, len(rows) - len(kept))


def encode_demonstration(row: Row, tokenizer: Tokenizer, template: Template) -> tuple[list[int], list[int]]:
    """The ids of a row's prompt and of its response, EOS included. Raises DataError naming row and column."""
    if "messages" not in row.columns:
        return row.prompt_ids(tokenizer, template), row.response_ids("response", tokenizer)
    messages = row.messages("messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise row.fault("messages", "the conversation must end with the assistant, after at least one other turn")
    # Stripped as chat templates strip it: the headers end in a line break, and models read on from there.
    response = messages[-1]["content"].strip()
    return (
        row.encoded("messages", lambda: tokenizer.encode_prompt(messages[:-1], template)),
        row.encoded("messages", lambda: tokenizer.encode_response(response)),
    )
