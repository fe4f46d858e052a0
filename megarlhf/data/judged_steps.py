"""What process reward models learn from: responses whose steps are judged one by one.

Rows have the columns `prompt` (text or a conversation), `steps` (texts) and `labels` (a number from 0 to 1 for each
step, soft labels allowed, or null for one that nobody judged). The steps are joined by a separator, and a step's label
belongs to the token that data/steps.py says it ends with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pydantic
import torch
from torch import Tensor

from megarlhf.batch.supervised import JudgedSteps
from megarlhf.data.arithmetic import step_rows
from megarlhf.data.columns import Columns
from megarlhf.data.row import Row
from megarlhf.data.rows import HERE, DataConfig, Origin, TokenSet, pad_right, read_rows, within_limit
from megarlhf.data.step_shapes import step_shapes
from megarlhf.data.steps import check_own_ends, stepped, usual_separator
from megarlhf.data.tokenizer import Tokenizer

WRONG_BELOW = 0.5
"""A step whose label is less is an error."""
_NEUTRAL = {"right": 1.0, "wrong": 0.0, "unlabelled": None}


class StepData(DataConfig):
    """Where judged steps come from, how they become tokens, and what their labels are."""

    separator: str | None = pydantic.Field(default=None, min_length=1)
    """What joins the steps; null for what the model was taught, or else an empty line, or for the built-in task's steps
    a full stop and a space. The model remembers it: responses that it judges later are parted by it."""
    labels: Literal["soft", "hard"] = "soft"
    """As the data have them (`soft`), or 1 from `threshold` on and 0 below it (`hard`). Source: soft leaves data of 0
    and 1 alone; Math-Shepherd (arXiv 2312.08935) found hard and soft estimates alike."""
    threshold: float = pydantic.Field(default=0.5, gt=0, le=1)
    """The least label that is 1 where `labels` is hard. A small one counts a step as right from which any sampled
    solution arrived, as Math-Shepherd's and Qwen's hard estimates do (arXiv 2501.07301)."""
    until: Literal["first_error", "all"] = "first_error"
    """Which labels count: those up to the first error (a label below 1/2), or all. Source: Lightman et al. 2023 (arXiv
    2305.20050) label up to the first error; what a step is worth after one is ill defined."""
    neutral: Literal["right", "wrong", "unlabelled"] = "right"
    """What a step is that PRM800K rates 0: not wrong, but no progress. Source: right for Qwen (arXiv 2501.07301) and
    PURE (2504.15275); TRL's converter took it for wrong."""

    @property
    def joint(self) -> str:
        """What joins the steps."""
        sources = {part.source for part in self.mix.values()} or {self.source}
        return self.separator or usual_separator(sources)


@dataclass(frozen=True)
class StepSet(TokenSet):
    """Tokenised responses, each with its prompt and EOS, where their steps end, and what those are worth."""

    tokens: Sequence[Sequence[int]]
    ends: Sequence[Sequence[int]]
    """The last token of each step, in `tokens`."""
    labels: Sequence[Sequence[float | None]]
    """Of each step, 0 to 1; None where nobody said, or where labels after the first error do not count."""
    pad_id: int
    dropped: int
    """Rows left out because they were over the limit."""
    origin: Origin = HERE

    @property
    def example(self) -> dict[str, Sequence[int]]:
        """The parts of the first row, by name: its prompt with the first step, and each further step, as they end."""
        starts = [0, *(end + 1 for end in self.ends[0][:-1])]
        names = [f"step {number}" for number in range(1, len(self.ends[0]) + 1)]
        parts = zip(names, starts, self.ends[0], self.labels[0], strict=True)
        return {
            f"{'prompt and ' if name == 'step 1' else ''}{name} "
            f"({'unlabelled' if label is None else f'label {label:g}'})": self.tokens[0][start : end + 1]
            for name, start, end, label in parts
        }

    def batch(self, indices: Tensor) -> JudgedSteps:
        """The responses at `indices` (int64 [B]), padded to the longest of them, weight 1 for each labelled step."""
        chosen: list[int] = indices.tolist()
        tokens, lengths = pad_right([self.tokens[index] for index in chosen], self.pad_id)
        ends = torch.zeros(tokens.shape, dtype=torch.bool)
        labels, weight = torch.zeros(tokens.shape), torch.zeros(tokens.shape)
        for row, index in enumerate(chosen):
            for end, label in zip(self.ends[index], self.labels[index], strict=True):
                ends[row, end] = True
                if label is not None:
                    labels[row, end], weight[row, end] = label, 1.0
        return JudgedSteps(tokens, lengths, ends, labels, weight)


def load_steps(config: StepData, tokenizer: Tokenizer, setting: str = "steps") -> StepSet:
    """Read, check and tokenise judged steps, of the setting that is named.

    Raises:   DataError for a missing or empty source, a bad row (file, row, column), or rows over the limit.
    """
    kind = Columns(setting, ("prompt", "steps", "labels"), step_shapes(_NEUTRAL[config.neutral]))
    tokenizer = tokenizer.taking(config.control_tokens)
    loaded = read_rows(config, step_rows, kind, lambda row: _judged(row, config, tokenizer))
    kept = within_limit(config, loaded, [len(judged.tokens) for judged in loaded.values])
    judged = [loaded.values[index] for index in kept.indices]
    return StepSet(
        [each.tokens for each in judged],
        [each.ends for each in judged],
        [each.labels for each in judged],
        tokenizer.pad_id,
        dropped=kept.dropped,
        origin=kept.origin,
    )


class _Judged(NamedTuple):
    tokens: list[int]
    ends: list[int]
    labels: list[float | None]


def _judged(row: Row, config: StepData, tokenizer: Tokenizer) -> _Judged:
    steps, labels = row.texts("steps"), _labels(row, config)
    if len(labels) != len(steps):
        raise row.fault("labels", f"{len(labels)} labels of {len(steps)} steps; give one each, null where unknown")
    ids, ends = stepped(row, steps, config.joint, tokenizer)
    check_own_ends(row, ids, ends, [at for at, label in enumerate(labels) if label is not None], tokenizer)
    prompt = row.prompt_ids(tokenizer, config.rendering)
    return _Judged([*prompt, *ids], [len(prompt) + end for end in ends], labels)


def _labels(row: Row, config: StepData) -> list[float | None]:
    """As the settings want them: made hard, and none after the first error."""
    labels = row.numbers_in("labels", 0, 1)
    if config.labels == "hard":
        labels = [None if label is None else float(label >= config.threshold) for label in labels]
    if all(label is None for label in labels):
        raise row.fault("labels", "no step has a label; give one or remove the row")
    first = _first_error(labels)
    counted = len(labels) if config.until == "all" or first < 0 else first + 1
    return [*labels[:counted], *[None] * (len(labels) - counted)]


def _first_error(labels: Sequence[float | None]) -> int:
    wrong = (index for index, label in enumerate(labels) if label is not None and label < WRONG_BELOW)
    return next(wrong, -1)
