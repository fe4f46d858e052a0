"""A judge that is a rule: it gives one of two scores, by whether a response gives the answer or has a form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal, get_args

from pydantic import Field, model_validator

from megarlhf.data.prompts import PromptSet, check_answered
from megarlhf.judges.forms import Unit, has_length, has_pattern, has_shape, pattern_fault
from megarlhf.judges.gym import check_gym, gym_score
from megarlhf.judges.judge import UNKNOWN
from megarlhf.judges.texts import Opinion, Reader, Response, RightOrWrongConfig, Scorer, TextJudgeConfig
from megarlhf.judges.verifiers import Decider, Verifier, check_answers, check_verifier, verify

Rule = Literal["arithmetic", "gsm8k", "maths", "exact", "reasoning_gym", "regex", "format", "length"]
"""Those of Verifier, and those of a response's form."""
_ONLY_OF = {
    "ignore_case": ("exact",),
    "pattern": ("regex", "format"),
    "least": ("length",),
    "most": ("length",),
    "unit": ("length",),
}
"""Settings that only some rules use."""
_VERIFIERS: tuple[Verifier, ...] = get_args(Verifier)


class RuleConfig(RightOrWrongConfig):
    """A rule."""

    kind: Literal["rule"]
    """`rule`: one of two scores, by whether a response gives the answer, or has a form."""
    rule: Rule
    """When a response gives the answer: digit for digit as the built-in task has it (`arithmetic`), as a number
    whatever stands around it (`gsm8k`), as mathematics (`maths`), as text, all of it (`exact`), or for problems of
    reasoning-gym as their own verifier says (`reasoning_gym`), which may also give a part. When it has the form asked
    for: `pattern` is somewhere in it (`regex`), is all of it (`format`), or it is as long as asked (`length`)."""
    ignore_case: bool = False
    """For `exact`: large letters are small ones."""
    pattern: str = ""
    """For `regex` and `format`: a regular expression, as the package regex reads it. For `format` a dot is any
    character, line ends too. A response for which it takes more than a second is wrong, and counted as
    judge/NAME_failures."""
    least: int | None = Field(default=None, ge=0)
    """For `length`: how long the response must be; null is no bound."""
    most: int | None = Field(default=None, ge=0)
    """For `length`: how long the response may be; null is no bound."""
    unit: Unit = "characters"
    """For `length`: what is counted; words are what white space separates."""

    @model_validator(mode="after")
    def _goes_together(self) -> RuleConfig:
        for name, rules in _ONLY_OF.items():
            if self.rule not in rules and dict(self)[name] != type(self).model_fields[name].default:
                of = f"the rule{'s' * (len(rules) > 1)} {' and '.join(rules)}"
                raise ValueError(f"{name} is a setting of {of}, not of rule={self.rule}; remove it.")
        if self.rule in ("regex", "format"):
            if not self.pattern:
                raise ValueError(f"rule={self.rule} needs a pattern; set pattern to a regular expression.")
            if fault := pattern_fault(self.pattern):
                raise ValueError(f"pattern={self.pattern!r} is no regular expression: {fault}; correct it.")
        if self.rule == "length":
            if self.least is None and self.most is None:
                raise ValueError("rule=length needs a bound; set least, most or both.")
            if self.least is not None and self.most is not None and self.least > self.most:
                raise ValueError(
                    f"least={self.least} is more than most={self.most}, and no response is so long; change one of them."
                )
        return self

    @property
    def verifier(self) -> Verifier | None:
        """The rule where it compares with the answer; None where it says nothing of that."""
        return next((name for name in _VERIFIERS if name == self.rule), None)

    @property
    def wrong_score(self) -> float:
        """What is set for wrong answers; nobody knows what form they have, or what part they get."""
        return UNKNOWN if self.verifier in (None, "reasoning_gym") else self.wrong

    def check(self, setting: str, prompts: PromptSet, source: str) -> str:
        """How many answers can be right for no response.

        Raises:   a MegarlhfError where a prompt has no answer, or none can be right, or a package is missing.
        """
        if self.verifier is None:
            return ""
        check_verifier(self.verifier, f"{setting}.rule")
        if self.verifier != "reasoning_gym":
            check_answered(prompts, source, f"{setting} judges by the answer")
        return check_verified(prompts, self.verifier, source, f"{setting}.rule")

    def scorer(self, setting: str, reader: Reader) -> Scorer:
        """What judges responses."""
        return partial(judged, self)


def check_verified(prompts: PromptSet, verifier: Verifier, source: str, setting: str = "verifier") -> str:
    """What is to be said of answers that are right for no response.

    Raises:   ConfigError where all are, or the prompts are not of the verifier's kind.
    """
    if verifier == "reasoning_gym":
        return check_gym(prompts, source, setting)
    return check_answers(prompts.answers, verifier, source, setting)


def doubts_of(
    judges: Mapping[str, TextJudgeConfig], verifier: Decider | None, prompts: PromptSet, source: str
) -> list[str]:
    """What is to be said, before any model is built, of how the judges, and the verifier, can judge these prompts.

    judges: by name. Raises: a MegarlhfError where one of them cannot.
    """
    found = [judge.check(f"judges.{name}", prompts, source) for name, judge in judges.items()]
    asked = [judge.verifier for judge in judges.values()]
    if verifier is not None and verifier != "code_tests" and verifier not in asked:
        found.append(check_verified(prompts, verifier, source))
    return [doubt for doubt in found if doubt]


def judged(rule: RuleConfig, responses: Sequence[Response]) -> list[Opinion]:
    """One opinion a response."""
    return [_opinion(rule, each) for each in responses]


def _opinion(rule: RuleConfig, of: Response) -> Opinion:
    held = _holds(rule, of)
    part = float(held or 0)
    knows = rule.verifier is not None and (bool(of.answer) or rule.verifier == "reasoning_gym")
    score = rule.wrong + (rule.right - rule.wrong) * part if 0 < part < 1 else rule.right if part else rule.wrong
    return Opinion(score, correct=part == 1 if knows else None, failed=held is None)


def _holds(rule: RuleConfig, of: Response) -> float | None:
    """How far a response is as the rule asks, 0 to 1; None where that took too long to find out."""
    match rule.rule:
        case "regex":
            return has_pattern(rule.pattern, of.response)
        case "format":
            return has_shape(rule.pattern, of.response)
        case "length":
            return has_length(of.response, rule.unit, rule.least, rule.most)
        case "reasoning_gym":
            return gym_score(of.response, of.columns)
        case verifier:
            same = str.casefold if rule.ignore_case else str
            return bool(of.answer) and verify(same(of.response), same(of.answer), verifier)
