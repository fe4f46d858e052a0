"""Judges of texts: rows are spread over all ranks, whatever the layout, and each is judged once."""

from __future__ import annotations

import traceback
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from megarlhf.batch.rollouts import Rollout
from megarlhf.data.prompts import PromptSet
from megarlhf.data.texts import response_texts
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import JudgeError, MegarlhfError
from megarlhf.judges.judge import UNKNOWN, JudgeConfig, Verdict, outcome
from megarlhf.judges.verifiers import Decider
from megarlhf.parallel.collectives import gather_objects
from megarlhf.parallel.mesh import Mesh

T = TypeVar("T")
MOST = 1e12
"""Of a score, as of any number in the settings."""


class Response(NamedTuple):
    """One rollout as text."""

    prompt: Any
    """As the data has it: text, or a conversation."""
    response: str
    answer: str
    """The expected one, "" where the data has none."""
    columns: Mapping[str, Any]
    """The prompt's whole row."""
    row: int
    """Which row of the data that is, from 1."""


class Opinion(NamedTuple):
    """What is said of one response."""

    score: float
    parts: Mapping[str, float] = {}
    """What the score is made of, by name; one that is not named counts as 0."""
    correct: bool | None = None
    failed: bool = False
    """It could not be judged as meant, for example in the time that it may take."""


Scorer = Callable[[Sequence[Response]], Sequence[Opinion]]
"""Of some responses, one opinion each, in order. It may raise a MegarlhfError, which every rank then raises."""


class TextJudgeConfig(JudgeConfig):
    """A judge that reads texts."""

    @property
    def wrong_score(self) -> float:
        """Mean score that it gives to wrong responses; inf where nobody knows."""
        return UNKNOWN

    @property
    def verifier(self) -> Decider | None:
        """How it knows whether a response is right; None where it does not."""
        return None

    @abstractmethod
    def check(self, setting: str, prompts: PromptSet, source: str) -> str:
        """What is to be said, before any model is built, of how it can judge these prompts; "" for nothing.

        setting: where this judge is configured, such as judges.answer.
        Raises:   a MegarlhfError where it cannot.
        """

    def ranks(self, world: int) -> int:
        """How many of all ranks judge; the first ones."""
        return world

    @abstractmethod
    def scorer(self, setting: str, reader: Reader) -> Scorer:
        """What judges responses, on this rank, whoever's prompts they are to; `setting` as above."""


class RightOrWrongConfig(TextJudgeConfig):
    """A judge that says of a response that it is right, or is not."""

    right: float = 1.0
    """Score of a response that is right, or has the form asked for."""
    wrong: float = 0.0
    """Score of one that is not."""

    @property
    def wrong_score(self) -> float:
        """What is set for it."""
        return self.wrong


@dataclass(frozen=True)
class Reader:
    """Reads rollouts as text, each rank its share of them."""

    prompts: PromptSet
    tokenizer: Tokenizer
    mesh: Mesh
    patience_s: float
    """Seconds that the other ranks wait for one that judges."""

    def spread(
        self, rollout: Rollout, judge: Callable[[Sequence[Response]], Sequence[T]], ranks: int | None = None
    ) -> list[T]:
        """`judge` of all responses in order, equal on every rank; each goes to one of the first ranks. Collective.

        Raises:   as `spread_rows`.
        """
        return self.spread_rows(rollout, lambda rows: judge(self._responses(rows)), ranks)

    def spread_rows(
        self, rollout: Rollout, judge: Callable[[Rollout], Sequence[T]], ranks: int | None = None
    ) -> list[T]:
        """`judge` of all rows in order, equal on every rank; each goes to one of the first ranks, on the CPU.

        Ranks:    collective.
        Raises:   the MegarlhfError of the first rank that raised one, on every rank.
        """
        ranks, rank = ranks or self.mesh.size("world"), self.mesh.rank
        own = torch.arange(len(rollout))[rank::ranks] if rank < ranks else torch.arange(0)
        try:
            said: Sequence[T] | MegarlhfError = judge(rollout.to("cpu").rows(own)) if len(own) else ()
        except MegarlhfError as error:
            said = error
        except Exception as error:  # noqa: BLE001 (whatever it is, the others must hear of it, who wait)
            trace = "".join(traceback.format_exception(error)).rstrip()
            said = JudgeError(f"rank {rank} failed to judge its responses:\n{trace}")
        every = gather_objects(said, self.mesh, "world")
        for each in every:
            if isinstance(each, MegarlhfError):
                raise each
        parts = [each for each in every if not isinstance(each, MegarlhfError)]
        return [parts[row % ranks][row // ranks] for row in range(len(rollout))]

    def _responses(self, rollout: Rollout) -> list[Response]:
        texts, columns = response_texts(rollout, self.tokenizer), self.prompts.columns_in(rollout.prompt_ids)
        return [
            Response(
                prompt=columns[index]["prompt"],
                response=texts[index],
                answer=rollout.answers[index],
                columns=columns[index],
                row=int(rollout.prompt_ids[index]) + 1,
            )
            for index in range(len(rollout))
        ]


@dataclass(frozen=True)
class TextJudge:
    """A judge that reads texts."""

    name: str
    weight: float
    wrong_score: float
    scorer: Scorer
    reader: Reader
    ranks: int
    """How many ranks judge, the first ones."""

    def judge(self, rollout: Rollout) -> Verdict:
        """Judge every row, on one rank each. Collective."""
        said = self.reader.spread(rollout, self.scorer, self.ranks)
        device = rollout.tokens.device
        scores = torch.tensor([each.score for each in said], dtype=torch.float32, device=device)
        return Verdict(
            outcome(scores, rollout),
            parts={name: torch.tensor([each.parts.get(name, 0.0) for each in said]) for name in _names(said)},
            correct=[each.correct for each in said],
            failed=[each.failed for each in said],
        )


def text_judge(name: str, cfg: TextJudgeConfig, reader: Reader) -> TextJudge:
    """Ready to judge, on this rank."""
    world, scorer = reader.mesh.size("world"), cfg.scorer(f"judges.{name}", reader)
    return TextJudge(name, cfg.weight, cfg.wrong_score, scorer, reader, cfg.ranks(world))


def is_score(value: object) -> bool:
    """Whether it is a number that fp32 keeps, with room for sums and squares."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST <= value <= MOST


def _names(said: Sequence[Opinion]) -> list[str]:
    """Of all parts, in order."""
    return sorted({name for each in said for name in each.parts})
