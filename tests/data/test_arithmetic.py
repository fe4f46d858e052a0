from __future__ import annotations

import re
from random import Random

import pydantic
import pytest

from megarlhf.data.arithmetic import (
    LEVELS,
    ArithmeticConfig,
    Level,
    Mixture,
    Problem,
    demonstration,
    is_correct,
    labelled_rows,
    make_pairs,
    preference_rows,
    problems,
    prompt_rows,
    sft_rows,
    words,
)
from megarlhf.errors import ConfigError

ANN = Problem("Ann", "books", 7, (("+", 3, "buys"), ("*", 2, ""), ("-", 5, "sells")))
RIGHT = Mixture(right=1, drop_last_step=0, wrong_operation=0, guess=0)


def equations(response: str) -> list[tuple[int, str, int, int]]:
    found = re.findall(r"(\d+) ([+*-]) (\d+) = (\d+)\.", response)
    return [(int(a), operation, int(b), int(c)) for a, operation, b, c in found]


def test_a_problem_written_out() -> None:
    assert ANN.text == (
        "Ann has 7 books. Ann buys 3. Now Ann has 2 times as many. Ann sells 5. How many books does Ann have?"
    )
    assert ANN.solution() == "7 + 3 = 10. 10 * 2 = 20. 20 - 5 = 15. The answer is 15."
    assert ANN.answer == 15


def test_each_mistake_written_out() -> None:
    rng = Random(0)
    assert demonstration(ANN, "none", rng) == ANN.solution()
    assert demonstration(ANN, "drop_last_step", rng) == "7 + 3 = 10. 10 * 2 = 20. The answer is 20."
    # Every operation that can be exchanged: 7 - 3, 10 + 2, 10 - 2, 20 + 5.
    wrong = {demonstration(ANN, "wrong_operation", rng) for _ in range(100)}
    assert wrong == {
        "7 - 3 = 4. 4 * 2 = 8. 8 - 5 = 3. The answer is 3.",
        "7 + 3 = 10. 10 + 2 = 12. 12 - 5 = 7. The answer is 7.",
        "7 + 3 = 10. 10 - 2 = 8. 8 - 5 = 3. The answer is 3.",
        "7 + 3 = 10. 10 * 2 = 20. 20 + 5 = 25. The answer is 25.",
    }
    guesses = {demonstration(ANN, "guess", rng) for _ in range(2000)}
    assert guesses == {f"The answer is {number}." for number in range(21)}


def test_where_no_operation_can_be_mistaken_a_step_is_dropped() -> None:
    # 2 * 2 = 2 + 2, and 2 - 2 is inside 0..99, so only "- 2" is a mistake; 99 + 1 leaves the range.
    assert demonstration(Problem("Ann", "books", 2, (("*", 2, ""),)), "wrong_operation", Random(0)) == (
        "2 - 2 = 0. The answer is 0."
    )
    stuck = Problem("Ann", "books", 99, (("-", 1, "sells"),))
    assert demonstration(stuck, "wrong_operation", Random(0)) == "The answer is 99."


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_keeps_its_promises(level: int) -> None:
    wanted = LEVELS[level]
    known = set(words())
    for problem in problems(ArithmeticConfig(level=level, rows=1000), "train"):
        working = equations(problem.solution())
        total = problem.start
        for before, operation, operand, after in working:
            assert before == total
            total = {"+": before + operand, "-": before - operand, "*": before * operand}[operation]
            assert after == total
            assert 0 <= total <= wanted.largest
            assert operation in wanted.operations
        assert wanted.steps[0] <= len(working) <= wanted.steps[1]
        assert total == problem.answer
        assert is_correct(problem.solution(), str(total))
        assert set(re.findall(r"\w+|[^\w\s]", problem.text + problem.solution())) <= known


@pytest.mark.parametrize("level", LEVELS)
def test_splits_share_no_chain_of_numbers(level: int) -> None:
    train = problems(ArithmeticConfig(level=level, rows=3000, seed=1), "train")
    heldout = problems(ArithmeticConfig(level=level, rows=1000, seed=2), "heldout")
    assert len({problem.text for problem in heldout}) == 1000
    chains = {(problem.start, problem.chain) for problem in train}
    assert not chains & {(problem.start, problem.chain) for problem in heldout}


def test_the_split_is_a_function_of_the_numbers_alone() -> None:
    # Hence disjoint for any settings: whatever the seed, level, names or verbs, a chain has one split.
    for problem in problems(ArithmeticConfig(rows=300, seed=5), "heldout"):
        verbs = tuple((operation, operand, "finds") for operation, operand in problem.chain)
        assert Problem("Max", "coins", problem.start, verbs).split == "heldout"


def test_an_eighth_of_the_chains_is_held_out() -> None:
    chains = [Problem("Ann", "books", start, (("+", a, "buys"), ("-", b, "sells")))
              for start in range(20) for a in range(1, 20) for b in range(1, 20)]  # fmt: skip
    share = sum(problem.split == "heldout" for problem in chains) / len(chains)
    # 7220 draws at 1/8: standard deviation 0.004; four of them.
    assert share == pytest.approx(1 / 8, abs=0.016)


def test_same_seed_same_rows_another_seed_others_and_fewer_are_a_prefix() -> None:
    one, again, other = (sft_rows(ArithmeticConfig(rows=300, seed=seed), "train") for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert sft_rows(ArithmeticConfig(rows=100, seed=1), "train") == one[:100]
    # Pinned: data made on another machine or Python must be this data.
    assert one[0]["prompt"] == "Eva has 6 coins. Eva drops 6. Eva gets 7. How many coins does Eva have?"


def test_mixture_shares() -> None:
    rows = labelled_rows(ArithmeticConfig(rows=4000), "train")
    steps = {row["prompt"]: row["prompt"].count(".") - 1 for row in rows}
    guesses = sum(not equations(row["response"]) for row in rows) / len(rows)
    dropped = sum(0 < len(equations(row["response"])) < steps[row["prompt"]] for row in rows) / len(rows)
    correct = sum(row["correct"] for row in rows) / len(rows)
    # Standard deviation of a share of 4000 at most 0.008; four of them, and what chance adds to `right`.
    assert guesses == pytest.approx(0.15, abs=0.03)
    assert dropped == pytest.approx(0.35, abs=0.04)
    assert 0.35 - 0.03 < correct < 0.35 + 0.15 * 0.15 + 0.03
    assert all(is_correct(row["response"], str(ANSWERS(row["prompt"]))) == bool(row["correct"]) for row in rows)


def ANSWERS(prompt: str) -> int:  # noqa: N802
    """The answer worked out from the prompt's words alone."""
    total = int(re.findall(r"has (\d+) \w+\.", prompt)[0])
    for verb, operand in re.findall(r"(buys|finds|gets|loses|sells|drops) (\d+)\.", prompt):
        total += int(operand) if verb in ("buys", "finds", "gets") else -int(operand)
    return total


def test_all_right_mixture_is_all_right() -> None:
    config = ArithmeticConfig(rows=500, mixture=RIGHT)
    assert all(row["correct"] == 1 for row in labelled_rows(config, "train"))
    assert preference_rows(config, "train") == []


def test_prompt_rows_carry_the_answer() -> None:
    rows = prompt_rows(ArithmeticConfig(rows=500), "heldout")
    assert all(row["answer"] == str(ANSWERS(row["prompt"])) for row in rows)


def test_preference_rows_put_right_over_wrong() -> None:
    config = ArithmeticConfig(rows=1000, responses=4)
    rows = preference_rows(config, "train")
    for row in rows:
        answer = str(ANSWERS(row["prompt"]))
        assert is_correct(row["chosen"], answer)
        assert not is_correct(row["rejected"], answer)
    # A prompt gives none only if its 4 responses are all right (p^4) or all wrong ((1-p)^4): with p about 0.36, 0.18.
    assert len({row["prompt"] for row in rows}) / 1000 == pytest.approx(1 - 0.36**4 - 0.64**4, abs=0.05)


def test_make_pairs_uses_no_response_twice() -> None:
    judged = {
        "p": [("a", True), ("x", False), ("a", True), ("b", True), ("y", False), ("c", True)],
        "q": [("a", True), ("b", True)],
        "r": [],
    }
    assert make_pairs(judged) == [
        {"prompt": "p", "chosen": "a", "rejected": "x"},
        {"prompt": "p", "chosen": "b", "rejected": "y"},
    ]


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("7 + 5 = 12. The answer is 12.", True),
        ("The answer is 12. \n", True),
        ("The answer is 3. The answer is 12.", True),
        ("The answer is 12. The answer is 3.", False),
        ("The answer is 12. Or is it?", False),
        ("The answer is 12", False),
        ("The answer is 012.", False),
        ("The answer is -12.", False),
        ("The answer is 12.0.", False),
        ("The answer is 112.", False),
        ("The answer is 1 2.", False),
        ("the answer is 12.", False),
        ("The answer is 6 + 6.", False),
        ("12.", False),
        ("", False),
        ("The answer is １２.", False),
    ],
)
def test_verifier(response: str, right: bool) -> None:
    assert is_correct(response, "12") is right


def test_more_problems_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    # From 2, up to 2, one step: 2 - 1 and 2 - 2, each with 6 names, 6 items and 3 verbs; neither is held out.
    monkeypatch.setitem(LEVELS, 1, Level((1, 1), 2, "+-"))
    assert len(problems(ArithmeticConfig(level=1, rows=216), "train")) == 216
    with pytest.raises(ConfigError, match="level 1 has about 216 distinct train problems, 217 were asked for"):
        problems(ArithmeticConfig(level=1, rows=217), "train")


@pytest.mark.parametrize("settings", [{"level": 0}, {"level": 5}, {"rows": 0}, {"mixture": {"right": 0.9}}])
def test_bad_settings(settings: dict) -> None:
    with pytest.raises(pydantic.ValidationError):
        ArithmeticConfig(**settings)
