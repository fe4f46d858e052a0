"""Prompts to roll out. Columns: `prompt` (text or a conversation [{role, content}, ...]), `answer` (optional: text, or
a number, which is taken as JSON writes it)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megarlhf.batch.rollouts import Prompts
from megarlhf.data.arithmetic import prompt_rows
from megarlhf.data.columns import Columns
from megarlhf.data.reasoning_gym import is_task
from megarlhf.data.row import Row
from megarlhf.data.rows import HERE, DataConfig, Origin, TokenSet, pad_right, read_rows, within_limit
from megarlhf.data.shapes import PROMPTS, as_text
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError, DataError

COLUMNS = Columns("prompts", ("prompt", "answer"), PROMPTS)


@dataclass(frozen=True)
class PromptSet(TokenSet):
    """Tokenised prompts of a data set."""

    tokens: Sequence[Sequence[int]]
    answers: Sequence[str]
    """Expected answers, "" where the data has none."""
    ids: Sequence[int]
    """0-based row in the data set, counted on from one source of a mix to the next; dropped rows leave gaps."""
    pad_id: int
    dropped: int
    """Rows left out because they were over the limit."""
    columns: Sequence[Mapping[str, Any]]
    """The rows as the data has them, `prompt` among them: text, or a conversation."""
    origin: Origin = HERE

    @property
    def example(self) -> dict[str, Sequence[int]]:
        """The parts of the first row, by name."""
        return {"prompt": self.tokens[0]}

    def batch(self, indices: Tensor) -> Prompts:
        """The prompts at `indices` (int64 [P]), padded to the longest of them."""
        chosen: list[int] = indices.tolist()
        tokens, lengths = pad_right([self.tokens[index] for index in chosen], self.pad_id)
        ids = torch.tensor([self.ids[index] for index in chosen], dtype=torch.int64)
        return Prompts(tokens, lengths, ids, tuple(self.answers[index] for index in chosen))

    def columns_in(self, prompt_ids: Tensor) -> list[Mapping[str, Any]]:
        """The rows of rollouts, by the ids that `batch` gave (int64 [B])."""
        return [self._by_id[index] for index in prompt_ids.tolist()]

    @cached_property
    def _by_id(self) -> dict[int, Mapping[str, Any]]:
        return dict(zip(self.ids, self.columns, strict=True))

    @property
    def distinct(self) -> int:
        """Prompts; in a mix some are there more than once."""
        return len(set(self.ids))


def load_prompts(config: DataConfig, tokenizer: Tokenizer) -> PromptSet:
    """Read, check and tokenise prompts.

    Raises:   DataError for a missing or empty source, a bad row (file, row, column), or prompts over the limit.
    """
    tokenizer = tokenizer.taking(config.control_tokens)
    loaded = read_rows(
        config, prompt_rows, COLUMNS, lambda row: (row.prompt_ids(tokenizer, config.rendering), answer_of(row))
    )
    rows, values = loaded.rows, loaded.values
    kept = within_limit(config, loaded, [len(ids) for ids, _ in values])
    return PromptSet(
        [values[i][0] for i in kept.indices],
        [values[i][1] for i in kept.indices],
        [rows[i].place for i in kept.indices],
        tokenizer.pad_id,
        kept.dropped,
        [rows[i].columns for i in kept.indices],
        kept.origin,
    )


def answer_of(row: Row) -> str:
    """The expected answer; "" where the row has none."""
    given = row.columns.get("answer")
    if given is None or (given == "" and is_task(row.source)):
        return ""  # "" is the right one of some of the tasks' problems, which their verifier knows
    return row.text("answer") if as_text(given) is given else as_text(given)


def check_answered(prompts: PromptSet, source: str, why: str) -> None:
    """Raise DataError where a prompt has no answer, with `why` it needs one."""
    if "" in prompts.answers:
        index = list(prompts.answers).index("")
        hint = COLUMNS.hint("answer", prompts.columns[index])
        remedy = f"fill the column 'answer'{f', or {hint}' if hint else ''}"
        raise DataError(f"{source}, row {prompts.ids[index] + 1}: {why}; {remedy}.")


def check_prompt_count(prompts: PromptSet, per_iteration: int) -> None:
    """Check that one iteration need not roll out the same prompt twice.

    Raises:   ConfigError if fewer prompts than `per_iteration` are there.
    """
    if prompts.distinct < per_iteration:
        raise ConfigError(
            f"prompt set is smaller than the rollout batch: {prompts.distinct} prompts, {per_iteration} needed an "
            "iteration; add prompts, or lower rollout_batch (of rollouts: or raise group_size)."
        )
