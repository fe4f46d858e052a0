"""What steps are worth by where they lead: the share of right answers among completions that go on from each.

    soft label of step k = right completions of the prompt and its first k steps / completions
    hard label           = 1 if any is right: 1 - (1 - p)^N of the time where each is right with probability p

The last step ends the response, and is right or wrong itself.

Source: Math-Shepherd (Wang et al. 2024, arXiv 2312.08935), section 3.3.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megarlhf.batch.base import cat
from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.data.rows import pad_right
from megarlhf.data.solutions import Solution, SolutionSet
from megarlhf.judges.texts import Reader, Response, Scorer
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import SamplingConfig


class Beginning(NamedTuple):
    """A prompt with some of a solution's steps: of all solutions that begin so, and have one answer."""

    tokens: tuple[int, ...]
    answer: str


@dataclass(frozen=True)
class Beginnings:
    """Those of some solutions, each once."""

    solutions: SolutionSet
    chosen: Sequence[int]
    """Places of the solutions in their set."""
    of: dict[Beginning, int]
    """Each with the place of the first solution that has it, those that begin one another next to one another."""

    @classmethod
    def among(cls, solutions: SolutionSet, chosen: Sequence[int]) -> Beginnings:
        """Of the chosen solutions."""
        found: dict[Beginning, int] = {}
        for place in chosen:
            for beginning in beginnings(solutions.solutions[place]):
                found.setdefault(beginning, place)
        return cls(solutions, chosen, dict(sorted(found.items())))

    @property
    def prompts(self) -> Prompts:
        """To go on from: by its id each has random numbers of its own, whatever solutions are labelled beside it."""
        tokens, lengths = pad_right([each.tokens for each in self.of], self.solutions.pad_id)
        ids = torch.tensor([_name(each) for each in self.of], dtype=torch.int64)
        return Prompts(tokens, lengths, ids, tuple(each.answer for each in self.of))

    def whole(self, completed: Rollout, count: int) -> Rollout:
        """Completions, `count` of each beginning, as responses to the problems: the steps before them are theirs."""
        places = [place for place in self.of.values() for _ in range(count)]
        lengths, ids = self._of_prompts(places)
        return replace(completed, prompt_lengths=lengths.to(completed.tokens.device), prompt_ids=ids)

    def given(self) -> Rollout:
        """The solutions themselves."""
        chosen = [self.solutions.solutions[place] for place in self.chosen]
        tokens, lengths = pad_right([[*each.prompt, *each.response] for each in chosen], self.solutions.pad_id)
        prompt_lengths, ids = self._of_prompts(self.chosen)
        unknown = torch.zeros(len(chosen), tokens.shape[1] - 1)
        ended = torch.ones(len(chosen), dtype=torch.bool)
        answers = tuple(each.answer for each in chosen)
        return Rollout(tokens, prompt_lengths, lengths, ended, unknown, ids, answers)

    def _of_prompts(self, places: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Lengths of the prompts of solutions, and the ids by which readers find their rows."""
        lengths = [len(self.solutions.solutions[place].prompt) for place in places]
        return torch.tensor(lengths), torch.tensor([self.solutions.rows[place].place for place in places])


def beginnings(solution: Solution) -> list[Beginning]:
    """Of one solution."""
    return [Beginning(tokens, solution.answer) for tokens in solution.beginnings()]


def _name(beginning: Beginning) -> int:
    """A number for it, the same on every machine, so that it is gone on with by the same random numbers."""
    digest = hashlib.sha256(np.asarray(beginning.tokens, dtype="<i8").tobytes() + beginning.answer.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def complete(
    engine: RolloutEngine, of: Beginnings, sampling: SamplingConfig, *, completions: int, seed: int
) -> Rollout:
    """So many completions of each beginning, of which there must be one. Collective."""
    return engine.generate(of.prompts, sampling, seed=seed, group_size=completions)


def shares(
    of: Beginnings, completed: Sequence[Rollout], reader: Reader, scorer: Scorer, *, completions: int
) -> list[list[float]]:
    """The soft label of every step of the chosen solutions, in order. Collective; equal on every rank.

    completed: what `complete` drew; nothing where no solution has more than one step.
    """

    def right(responses: Sequence[Response]) -> list[bool]:
        return [said.correct is True for said in scorer(responses)]

    whole = [of.whole(drawn, completions).to("cpu") for drawn in completed]
    said = reader.spread(cat([*whole, of.given()]), right)
    drawn, ended = said[: len(of.of) * completions], said[len(of.of) * completions :]
    share = {
        beginning: sum(drawn[number * completions : (number + 1) * completions]) / completions
        for number, beginning in enumerate(of.of)
    }
    return [
        [*(share[each] for each in beginnings(of.solutions.solutions[place])), float(last)]
        for place, last in zip(of.chosen, ended, strict=True)
    ]
