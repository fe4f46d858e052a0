"""The vote of n, from a pool: what every choice of n responses gives."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from megarlhf.data.arithmetic import is_correct, prompt_rows
from megarlhf.eval.pool import open_pool
from megarlhf.eval.pool_curves import answers_of, voted
from tests.helpers.pools import DATA, said, write_pool

SAMPLES = 8


def test_the_vote_is_that_of_every_choice_of_n(tmp_path: Path) -> None:
    """Over all subsets; responses that give no answer vote for their own text."""
    write_pool(tmp_path, SAMPLES)
    opened, sizes = open_pool(tmp_path), [2, 3, SAMPLES]
    answers = answers_of(opened)
    assert answers == [[text.rpartition("answer is ")[2].strip(".") for text in of] for of in said(SAMPLES)]
    assert answers_of(opened, lambda _: None) == said(SAMPLES)
    expected = [row["answer"] for row in prompt_rows(DATA.arithmetic, "train")]
    right = [[is_correct(text, answer) for text in of] for of, answer in zip(said(SAMPLES), expected, strict=True)]
    curve = voted(answers, np.array(right, dtype=float), sizes, seed=1)
    for size, point in zip(sizes, curve.points, strict=True):
        wins = [
            np.mean([_winners(given, verdicts, chosen) for chosen in combinations(range(SAMPLES), size)])
            for given, verdicts in zip(answers, right, strict=True)
        ]
        assert point.mean == pytest.approx(np.mean(wins), abs=1e-12)
    assert 0 < curve.points[-1].mean < 1


def _winners(given: list[str], verdicts: list[bool], chosen: tuple[int, ...]) -> float:
    """How much of the vote of the chosen responses is right: answers of equally many share it."""
    votes = Counter(given[at] for at in chosen)
    first = [answer for answer, count in votes.items() if count == max(votes.values())]
    return float(np.mean([verdicts[given.index(answer)] for answer in first]))
