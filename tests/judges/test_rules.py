from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from megarlhf.errors import ConfigError
from megarlhf.judges import verifiers
from megarlhf.judges.rules import RuleConfig
from megarlhf.judges.texts import Opinion, Response
from megarlhf.judges.verifiers import check_answers, verify
from tests.judges.shapes import MATHS, school

GSM8K = "16 - 3 - 4 = <<16-3-4=9>>9 eggs are left.\nThey are worth 9 * 2 = $<<9*2=18>>18.\n#### 18"


def test_arithmetic_is_digit_for_digit() -> None:
    responses = ["5 + 3 = 8. The answer is 8.", "The answer is 8.0.", "The answer is 9.", "8"]
    assert [verify(response, "8", "arithmetic") for response in responses] == [True, False, False, False]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so it is \boxed{\frac{1}{2}}.", "0.5"),
        (r"\boxed{3}, no: \boxed{12}", "12"),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}"),
        (r"Hence $x^2 + 1 = \boxed{1 + y^{2}}$", "y^2+1"),
        ("The answer is 1/2.", r"\frac{1}{2}"),
        ("The final answer is: $(1, 2)$.", "(1,2)"),
        ("First the answer is 3. Then the answer is 12", "12"),
        ("Answer: 1,234", "1234"),
        ("The answer is 12.\nThat was easy", "12"),
        ("The answer is -3.", "$-3$"),
        ("**Answer:** 18", GSM8K),
        ("The answer is **18**.", GSM8K),
        ("The answer is 18 dollars.", "18"),
        ("#### 18", "$18"),
        ("**Answer**: 18", "18"),
        ("The answer is 18. I'm confident the answer is correct.", "18"),
        (r"\boxed{2x}", "2 x"),
        (r"\boxed{18}", "18 duck eggs"),
        (GSM8K, GSM8K),
    ],
)
def test_maths_right(response: str, answer: str) -> None:
    pytest.importorskip("math_verify")
    assert verify(response, answer, "maths")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{12}", "13"),
        (r"\boxed{12}, no: \boxed{3}", "12"),
        (r"\boxed{12", "12"),
        ("12", "12"),
        ("", "12"),
        ("I will not give an answer.", "12"),
        ("The answer is 0.333.", "1/3"),
        ("The answer is 3.", "-3"),
        ("The answer is between 1 and 12.", "12"),
        ("The answer is 12.", ""),
        ("The answer is 2.", "2 x"),
        ("The answer is " + "1 + " * 100 + "1.", "101"),
        (r"\boxed{9^{9^{9^9}}}", "12"),
        ("The answer is 9.", GSM8K),
        ("The answer is 18 + 1 dollars.", "18"),
    ],
)
def test_maths_wrong(response: str, answer: str) -> None:
    pytest.importorskip("math_verify")
    assert not verify(response, answer, "maths")


def test_an_answer_that_takes_too_long_is_wrong_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower of powers, of which sympy would never make an end."""
    pytest.importorskip("math_verify")
    monkeypatch.setattr(verifiers, "_SECONDS", 1)
    nobody: Any = None
    judge = RuleConfig(kind="rule", rule="maths", wrong=-1.0).scorer("judges.answer", nobody)
    given = [Response("?", rf"\boxed{{{said}}}", "12", {}, 1) for said in ("9^{9^{9^9}}", "12", "13", "9^{")]
    assert judge(given) == [
        Opinion(-1.0, correct=False, failed=True),
        Opinion(1.0, correct=True),
        Opinion(-1.0, correct=False),
        Opinion(-1.0, correct=False),
    ]


def test_gold_answers_of_gsm8k_are_right_and_altered_ones_wrong() -> None:
    rows = list(school())
    for verifier in ("gsm8k", "maths"):
        missed = [(right, gold) for gold, right, _ in rows if not verify(right, gold, verifier)]
        # Mathematics without a final answer is none: two of the ten ways only end in a number.
        assert len(missed) == (0 if verifier == "gsm8k" else 20), missed
        assert not [(wrong, gold) for gold, _, wrong in rows if verify(wrong, gold, verifier)]
    assert len(rows) == 100


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("-$1,234.50", "#### -1234.5", True),
        ("3 - 5 = -2", "#### -2", True),
        ("The answer is 5 because 3 + 2 is.", "#### 5", True),
        ("The answer is 2 + 3 = 5.", "#### 5", True),
        ("It is .5 of them", "0.5", True),
        ("20%", "#### 20", True),
        ("1 2 3", "#### 2", False),
        ("no number", "#### 2", False),
        ("2", "no number", False),
        ("#### 2.0000001", "#### 2", False),
        ("#### 12", "#### 2", False),
        ("The answer is 2/3.", "#### 2", False),
        (r"\boxed{\frac{18}{2}}", "#### 18", False),
        ("The answer is 2^10.", "#### 2", False),
        ("The answer is 1e3.", "#### 1", False),
        ("3/2", "#### 2", False),
        (r"\boxed{1{,}000}", "#### 1,000", True),
        (r"\boxed{1\,000}", "#### 1", False),
        ("Answer:\n- 18", "#### 18", True),
        ("Tom's total - $18", "#### 18", True),
        ("The answer is \N{MINUS SIGN}5", "#### -5", True),
        ("The answer is \N{MINUS SIGN}5", "#### 5", False),
        ("The answer is 18. I'm confident the answer is correct.", "#### 18", True),
        ("**Answer**: 18", "#### 18", True),
    ],
)
def test_gsm8k_is_a_number_whatever_stands_around_it(response: str, answer: str, right: bool) -> None:
    assert verify(response, answer, "gsm8k") is right


def test_gold_answers_of_math_are_right_and_altered_ones_wrong() -> None:
    pytest.importorskip("math_verify")
    missed = [gold for gold, _ in MATHS if not verify(rf"Hence it is $\boxed{{{gold}}}$.", gold, "maths")]
    taken = [(wrong, gold) for gold, wrong in MATHS if verify(rf"Hence it is $\boxed{{{wrong}}}$.", gold, "maths")]
    assert (missed, taken) == ([], [])
    assert len(dict(MATHS)) == 100


def test_answers_that_no_response_can_give_are_said_before_a_run_is_judged_by_them() -> None:
    pytest.importorskip("math_verify")
    assert check_answers(["18", "", GSM8K, "yes"], "maths", "x.jsonl") == ""
    assert check_answers([], "maths", "x.jsonl") == check_answers([""], "arithmetic", "x.jsonl") == ""
    said = check_answers(["18", r"\text{}", "5"], "maths", "x.jsonl")
    assert said == r"1 of 3 answers can be right for no response, for example '\\text{}'"
    many = check_answers(["18", "eighteen"] * 1000, "arithmetic", "x.jsonl")
    assert re.match(r"2\d\d of 512 answers can be right for no response, for example 'eighteen'", many)
    with pytest.raises(ConfigError, match=r"of x.jsonl no answer can be right, for example .*#### 18"):
        check_answers([GSM8K, GSM8K], "arithmetic", "x.jsonl")


def test_nothing_a_model_wrote_is_run(tmp_path: Path) -> None:
    pytest.importorskip("math_verify")
    proof = tmp_path / "ran"
    code = f"__import__('pathlib').Path({str(proof)!r}).touch()"
    for response in (
        f"The answer is {code}",
        f"\\boxed{{{code}}}",
        f"The answer is ${code}$",
        f"The answer is 1 + {code}",
    ):
        assert not verify(response, "12", "maths")
    assert not proof.exists()


def test_maths_without_the_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match="pip install math-verify"):
        verify("The answer is 12.", "12", "maths")
