"""A judge that is a rule: it gives one of two scores, by whether a response gives the answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from megarlhf.data.prompts import PromptSet
from megarlhf.errors import DataError
from megarlhf.judges.texts import Opinion, Reader, Response, Scorer, TextJudgeConfig
from megarlhf.judges.verifiers import Verifier, check_answers, check_verifier, verify


class RuleConfig(TextJudgeConfig):
    """A rule."""

    kind: Literal["rule"]
    """`rule`: one of two scores, by whether a response gives the answer."""
    rule: Verifier
    """When a response gives the answer: digit for digit as the built-in task has it (`arithmetic`),
    as a number whatever stands around it (`gsm8k`), or as mathematics (`maths`)."""
    right: float = 1.0
    """Score where it holds."""
    wrong: float = 0.0
    """Score where it does not."""

    @property
    def wrong_score(self) -> float:
        """What is set for it."""
        return self.wrong

    def check(self, name: str, prompts: PromptSet, source: str) -> str:
        """How many answers can be right for no response.

        Raises:   a MegarlhfError where a prompt has no answer, or none can be right, or a package is missing.
        """
        check_verifier(self.rule, f"judges.{name}.rule")
        if "" in prompts.answers:
            row = prompts.ids[list(prompts.answers).index("")] + 1
            raise DataError(f"{source}, row {row}: judges.{name} judges by the answer; fill the column 'answer'.")
        return check_answers(prompts.answers, self.rule, source, f"judges.{name}.rule")

    def scorer(self, name: str, reader: Reader) -> Scorer:
        """What judges responses."""
        return partial(_judged, self)


def _judged(rule: RuleConfig, responses: Sequence[Response]) -> list[Opinion]:
    return [_opinion(rule, each) for each in responses]


def _opinion(rule: RuleConfig, of: Response) -> Opinion:
    if not of.answer:
        return Opinion(rule.wrong)
    right = verify(of.response, of.answer, rule.rule)
    return Opinion(rule.right if right else rule.wrong, correct=bool(right), failed=right is None)
