"""Rollouts as text."""

from __future__ import annotations

from megarlhf.batch.rollouts import Rollout
from megarlhf.data.tokenizer import Tokenizer


def response_texts(rollout: Rollout, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The responses, EOS and other special tokens left out."""
    rows = zip(rollout.tokens.tolist(), rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)
    return tuple(tokenizer.decode(row[start:end]) for row, start, end in rows)
