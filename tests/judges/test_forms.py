"""Rules about text: each by hand, settings that go together or are refused, and patterns that would take for ever."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from megarlhf.config import load_config
from megarlhf.errors import ConfigError
from megarlhf.judges import forms
from megarlhf.judges.rules import RuleConfig
from megarlhf.judges.texts import Response
from megarlhf.trainers.ppo import PPOConfig

SHAPE = r"<think>.*?</think>\s*<answer>.*?</answer>\s*"


def rule(**settings: Any) -> RuleConfig:
    return RuleConfig.model_validate({"kind": "rule", "right": 2.0, "wrong": -1.0, **settings})


def judged(cfg: RuleConfig, *responses: str, answer: str = "Blue") -> list[tuple[float, bool | None, bool]]:
    nobody: Any = None
    said = cfg.scorer("judges.form", nobody)([Response("?", response, answer, {}, 1) for response in responses])
    return [(opinion.score, opinion.correct, opinion.failed) for opinion in said]


def held(cfg: RuleConfig, *responses: str) -> list[bool]:
    """Which responses have the form; a form says nothing of their answers, and none failed."""
    said = judged(cfg, *responses)
    assert {(correct, failed) for _, correct, failed in said} == {(None, False)}
    return [score == 2.0 for score, _, _ in said]


def test_exact_is_all_of_the_text() -> None:
    right, wrong, unknown = (2.0, True, False), (-1.0, False, False), (-1.0, None, False)
    responses = ("Blue", " Blue\n", "blue", "Blue.", "The answer is Blue", "")
    assert judged(rule(rule="exact"), *responses) == [right, right, *[wrong] * 4]
    assert judged(rule(rule="exact", ignore_case=True), *responses) == [right, right, right, *[wrong] * 3]
    assert judged(rule(rule="exact", ignore_case=True), "STRASSE", answer="Straße") == [right]
    assert judged(rule(rule="exact"), "", "Blue", answer="") == [unknown, unknown]  # of no answer nobody knows


def test_a_regular_expression_is_found_anywhere() -> None:
    assert held(rule(rule="regex", pattern=r"\bwait\b"), "wait", "so, wait.", "waiting", "Wait", "") == [
        *(True, True, False, False, False)
    ]
    # Flags are written into it; a dot is no line end here.
    assert held(rule(rule="regex", pattern="(?i)a.b"), "xA-Bx", "a\nb") == [True, False]


def test_a_shape_is_all_of_the_response() -> None:
    good = "<think>\n2 + 2\n</think>\n<answer>4</answer>"
    assert held(rule(rule="format", pattern=SHAPE), good, good + "\n", f"So: {good}", good + "!", "4") == [
        *(True, True, False, False, False)
    ]


def test_a_length_is_of_characters_or_words_and_its_bounds_count() -> None:
    assert held(rule(rule="length", least=2, most=4), "a", "ab", "abcd", "abcde") == [False, True, True, False]
    assert held(rule(rule="length", most=0), "", " ") == [True, False]
    assert held(rule(rule="length", least=2, unit="words"), "one-word", " two \n words ", "") == [False, True, False]


@pytest.mark.parametrize("name", ["regex", "format"])
def test_a_pattern_that_would_take_for_ever_is_stopped_and_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each letter more doubles the time."""
    monkeypatch.setattr(forms, "SECONDS", 0.05)
    begun = time.monotonic()
    assert judged(rule(rule=name, pattern="(a|aa)+c"), "a" * 200 + "b", "ac") == [
        (-1.0, None, True),
        (2.0, None, False),
    ]
    assert time.monotonic() - begun < 5


def test_only_rules_that_compare_with_the_answer_know_what_wrong_ones_get() -> None:
    forms = (rule(rule="regex", pattern="x"), rule(rule="format", pattern="x"), rule(rule="length", most=5))
    assert [(cfg.verifier, cfg.wrong_score) for cfg in forms] == [(None, math.inf)] * 3
    assert [(rule(rule=name).verifier, rule(rule=name).wrong_score) for name in ("exact", "maths")] == [
        *(("exact", -1.0), ("maths", -1.0))
    ]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("rule=regex", "rule=regex needs a pattern; set pattern to a regular expression."),
        ("rule=format pattern=''", "rule=format needs a pattern; set pattern to a regular expression."),
        ("rule=regex pattern=a(b", "pattern='a(b' is no regular expression: missing ) at position 3; correct it."),
        ("rule=maths pattern=x", "pattern is a setting of the rules regex and format, not of rule=maths; remove it."),
        ("rule=regex pattern=x ignore_case=true", "ignore_case is a setting of the rule exact, not of rule=regex; re"),
        ("rule=exact most=5", "most is a setting of the rule length, not of rule=exact; remove it."),
        ("rule=maths unit=words", "unit is a setting of the rule length, not of rule=maths; remove it."),
        ("rule=length", "rule=length needs a bound; set least, most or both."),
        ("rule=length least=5 most=4", "least=5 is more than most=4, and no response is so long; change one of them."),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: str, says: str) -> None:
    given = [f"judges.form.{setting}" for setting in ("kind=rule", *settings.split())]
    with pytest.raises(ConfigError) as error:
        load_config(PPOConfig, None, ["run_dir=run", *given])
    assert str(error.value).startswith(f"setting judges.form: {says}")


def test_what_is_written_to_a_run_s_directory_is_read_again() -> None:
    for cfg in (rule(rule="regex", pattern="x"), rule(rule="length", most=5, unit="words"), rule(rule="maths")):
        assert RuleConfig.model_validate_json(cfg.model_dump_json()) == cfg
