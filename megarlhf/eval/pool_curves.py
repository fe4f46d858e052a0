"""From a judged pool: what choosing among n responses is worth, for each way to choose, on average over prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megarlhf.errors import DataError
from megarlhf.eval.best_of import best_of, pass_at
from megarlhf.eval.intervals import Interval, mean
from megarlhf.eval.pool import Pool
from megarlhf.eval.pool_scores import Grid, Scores
from megarlhf.eval.voting import majority
from megarlhf.judges.verifiers import final_answer


@dataclass(frozen=True)
class Curve:
    """One way to choose."""

    way: str
    """By whom or what, for people."""
    points: Sequence[Interval]
    """For each n, over prompts, which are what is independent."""
    error: float = 0.0
    """The largest standard error by which an estimate misses what all choices would give; 0 where it is exact."""


def sizes_of(count: int) -> list[int]:
    """1, 2, 4, ... and `count`."""
    powers = [2**power for power in range(count.bit_length()) if 2**power < count]
    return [*powers, count]


def gold_of(scores: Scores) -> Grid:
    """What a response is worth by the judge we trust: 1 or 0 where it knows what is right, else its score."""
    found = scores.right() if scores.knows else scores.scores()
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found)).sum())
        raise DataError(f"gold={scores.judge}: its score of {bad:,} responses is no number; choose another judge.")
    return found


def ways_of(scores: Scores) -> dict[str, Grid]:
    """What a judge ranks responses by: its score, or each way to take those of its steps together."""
    if not scores.has_steps:
        return {scores.judge: scores.scores()}
    return {f"{scores.judge} ({how})": scores.scores(how) for how in scores.aggregates}


def chosen_by(way: str, proxy: Grid, gold: Grid, sizes: Sequence[int]) -> Curve:
    """The best of n by `proxy`, both [prompts, samples]."""
    rows = [best_of(ranked, worth, sizes) for ranked, worth in zip(proxy, gold, strict=True)]
    return Curve(way, _over_prompts(rows))


def passed(gold: Grid, sizes: Sequence[int]) -> Curve:
    """How often one of n is right."""
    count = gold.shape[1]
    return Curve("pass@n", _over_prompts([pass_at(count, int(row.sum()), sizes) for row in gold]))


def voted(answers: Sequence[Sequence[str]], gold: Grid, sizes: Sequence[int], seed: int) -> Curve:
    """How often the answer of most of n is right. answers: of each response, by prompt."""
    votes = [
        majority(given, right.tolist(), sizes, seed + prompt)
        for prompt, (given, right) in enumerate(zip(answers, gold, strict=True))
    ]
    errors = np.sqrt(sum(vote.errors**2 for vote in votes)) / len(votes)
    return Curve("maj@n", _over_prompts([vote.values for vote in votes]), float(np.max(errors)))


def answers_of(pool: Pool, extract: Callable[[str], str | None] = final_answer) -> list[list[str]]:
    """The answer of every response, by prompt and sample; all of a response that gives none, so that it has a vote."""
    found = [[""] * pool.order.rounds[-1] for _ in range(len(pool.prompts))]
    for response in pool.responses():
        given = extract(response.response)
        found[response.place.prompt][response.place.sample] = response.response if given is None else given
    return found


def _over_prompts(rows: Sequence[NDArray[np.float64]]) -> list[Interval]:
    return [mean(torch.from_numpy(column)) for column in np.stack(rows, axis=1)]
