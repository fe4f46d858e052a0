"""From a judged pool the rows that other stages learn from: demonstrations, preference pairs, judged responses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megarlhf.errors import DataError
from megarlhf.eval.pool import Pool
from megarlhf.eval.pool_scores import Grid


@dataclass(frozen=True)
class Candidate:
    """One response that may become of a row."""

    columns: Mapping[str, Any]
    """Of the prompt's row, the prompt among them: text, or a conversation."""
    response: str
    value: float
    """By the judge."""
    terminated: bool

    @property
    def usable(self) -> bool:
        """Rows hold texts, which end: one that was cut would be taught to end there, and one without text is none. Nor
        is one of use whose score is no number."""
        return self.terminated and bool(self.response.strip()) and math.isfinite(self.value)


def candidates(
    pool: Pool, values: Grid, prompts: int | None, responses: int | None, seed: int
) -> Mapping[int, Sequence[Candidate]]:
    """The responses that are used, by prompt: the first so many of an order that `seed` draws, or all.

    So the rows of fewer prompts, or of fewer responses, are among those of more. Prompts and responses are in the order
    of the pool, however many are used.

    values: [prompts, samples].
    """
    count, samples = values.shape
    used = set(np.random.default_rng([seed, 0]).permutation(count)[:prompts].tolist())
    taken = {
        prompt: set(
            np.random.default_rng([seed, 1, pool.prompts.ids[prompt]]).permutation(samples)[:responses].tolist()
        )
        for prompt in sorted(used)
    }
    found: dict[int, list[Candidate]] = {prompt: [] for prompt in taken}
    for each in pool.responses():
        prompt, sample = each.place
        if sample in taken.get(prompt, ()):
            asked = pool.prompts.columns[prompt]
            found[prompt].append(Candidate(asked, each.response, float(values[prompt, sample]), each.terminated))
    return found


def demonstrations(of: Sequence[Candidate], most: int | None, least: float | None) -> list[dict[str, Any]]:
    """Rows {prompt, response} of one prompt: up to `most` distinct responses, or all, the best first.

    least: the value that a response needs; None takes the best whatever they are worth.
    """
    fitting = [each for each in _best_first(of) if least is None or each.value >= least]
    return [{"prompt": each.columns["prompt"], "response": each.response} for each in fitting[:most]]


def pairs(of: Sequence[Candidate], most: int | None, margin: float) -> list[dict[str, Any]]:
    """Rows {prompt, chosen, rejected} of one prompt: its best response and its worst, the second best and the second
    worst, and so on, up to `most`, or all; each better by `margin` at least, and by something. No response is in
    two."""
    ranked = _best_first(of)
    couples = list(zip(ranked[: len(ranked) // 2], reversed(ranked), strict=False))[:most]
    return [
        {"prompt": good.columns["prompt"], "chosen": good.response, "rejected": bad.response}
        for good, bad in couples
        if good.value > bad.value and good.value - bad.value >= margin
    ]


def labelled(of: Sequence[Candidate], judge: str) -> list[dict[str, Any]]:
    """Rows of every response: the prompt's with all its columns, response, and correct.

    Raises:   DataError where a value is not in 0..1.
    """
    for each in of:
        if not 0 <= each.value <= 1:
            raise DataError(
                f"by={judge}: its scores go beyond 0 to 1, as {each.value:g} does, and a label says how right a "
                "response is; name a judge that knows what is right, or make pairs."
            )
    return [{**each.columns, "response": each.response, "correct": each.value} for each in of]


def _best_first(of: Sequence[Candidate]) -> list[Candidate]:
    """Every text once, the best first; of equal ones the first of the pool."""
    distinct: dict[str, Candidate] = {}
    for each in of:
        distinct.setdefault(each.response, each)
    return sorted(distinct.values(), key=lambda each: -each.value)
