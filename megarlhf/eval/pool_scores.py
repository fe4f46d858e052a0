"""What judges say of a pool: one line of JSON a distinct response, and from it what every response is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from megarlhf.errors import ConfigError, DataError
from megarlhf.eval.pool import Pool, score_file
from megarlhf.observe.files import json_lines
from megarlhf.ops.step_scores import Aggregate, aggregated

ADDED = ("score", "parts", "steps", "correct", "failed")
"""Fields of such a line beside the prompt's row and the sample: the score, null where it is no number; what it is made
of, by name; what each step is worth; whether the response is right, null where the judge cannot say; whether it could
not be judged as meant."""
AGGREGATES: tuple[Aggregate, ...] = get_args(Aggregate)
Grid = NDArray[np.float64]
"""[prompts, samples]."""


@dataclass(frozen=True)
class Scores:
    """What one judge says of every response of a pool."""

    judge: str
    lines: Sequence[Mapping[str, Any]]
    """Of each distinct response."""
    places: NDArray[np.int64]
    """[prompts, samples]: which of them each response is."""

    @cached_property
    def has_steps(self) -> bool:
        """Whether it judges steps."""
        return all(line["steps"] for line in self.lines)

    @cached_property
    def aggregates(self) -> tuple[Aggregate, ...]:
        """In what ways the scores of steps are taken together: no product of negative ones, two of which would make a
        good response."""
        signed = any(value is None or value < 0 for line in self.lines for value in line["steps"])
        return tuple(how for how in AGGREGATES if how != "product" or not signed)

    @cached_property
    def knows(self) -> bool:
        """Whether it says of every response that it is right, or is not."""
        return all(line["correct"] is not None for line in self.lines)

    def scores(self, steps: Aggregate | None = None) -> Grid:
        """The score of every response; with `steps`, of its steps so taken together. -inf where it is no number."""
        if steps is None:
            return self._spread([line["score"] for line in self.lines])
        values = [torch.tensor(_numbers(line["steps"]), dtype=torch.float64) for line in self.lines]
        ends = pad_sequence([torch.ones(len(each), dtype=torch.bool) for each in values], batch_first=True)
        return self._spread(aggregated(pad_sequence(values, batch_first=True), ends, steps).tolist())

    def right(self) -> Grid:
        """1 where a response is right, 0 where it is not; of a judge that knows."""
        return self._spread([float(line["correct"]) for line in self.lines])

    def _spread(self, values: Sequence[float | None]) -> Grid:
        return np.array(_numbers(values))[self.places]


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [-math.inf if value is None else float(value) for value in values]


def check_judged(pool: Pool, judge: str, setting: str) -> None:
    """Raise ConfigError where the judge that `setting` names has not judged the pool."""
    if judge not in pool.judges:
        has = f"it has {', '.join(pool.judges)}" if pool.judges else "nobody has judged it"
        raise ConfigError(
            f"{setting}={judge}: no such judge of pool={pool.directory} ({has}); name one, or run megarlhf judge "
            f"pool={pool.directory} judges.{judge}.kind=..."
        )


def read_scores(pool: Pool, judge: str) -> Scores:
    """What a judge says of the pool.

    Raises:   ConfigError where it has not judged all of it, DataError where the file is damaged.
    """
    file = score_file(pool.directory, judge)
    lines: list[Mapping[str, Any]] = []
    for number, (line, of) in enumerate(zip(json_lines(file), pool.distinct, strict=False), start=1):
        asked = {"row": pool.prompts.ids[of.place.prompt], "sample": of.place.sample}
        if (
            line is None
            or not set(ADDED) <= line.keys()
            or {name: line[name] for name in asked if name in line} != asked
        ):
            raise DataError(f"{file}, row {number}: damaged; remove the file and run megarlhf judge again.")
        lines.append(line)
    if len(lines) != len(pool.distinct):
        raise ConfigError(
            f"{file} has {len(lines):,} of {len(pool.distinct):,} rows; run the megarlhf judge that began it again."
        )
    return Scores(judge, lines, pool.places)
