"""The built-in programs: what a demonstration does is worked out here from its text, and again in the sandbox."""

from __future__ import annotations

import re
from typing import Any

import pydantic
import pytest

from megarlhf.commands import evaluate
from megarlhf.config import load_config
from megarlhf.data.preferences import load_labelled, load_preferences
from megarlhf.data.programs import UNSEEN, ProgramsConfig, Task, program_rows, words
from megarlhf.data.prompts import load_prompts
from megarlhf.data.rows import DataConfig
from megarlhf.data.sft import load_sft
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import ConfigError, DataError
from megarlhf.models.spec import preset
from megarlhf.trainers import grpo
from tests.judges.test_code_tests import judged

TASK = Task((("+", 3), ("*", 2), ("-", 5)), 4)
TOKENIZER = build_tiny_tokenizer(words())
STEPS = [("+", 3), ("+", 6), ("-", 3), ("*", 2), ("*", 3)]
STEP = re.compile(r"n=n([-+*])(\d+);")


def printed(program: str, stdin: str) -> int:
    """What a program of the demonstrations' kind prints, however it is spaced, worked out from its text."""
    text = program.replace(" ", "")
    if constant := re.fullmatch(r"print\((\d+)\)", text):
        return int(constant[1])
    steps = re.fullmatch(rf"n=int\(input\(\)\);((?:{STEP.pattern})*)print\(n\)", text)
    assert steps is not None, program
    total = int(stdin)
    for operation, operand in STEP.findall(steps[1]):
        total = {"+": total + int(operand), "-": total - int(operand), "*": total * int(operand)}[operation]
    return total


def passed(row: dict[str, Any]) -> list[bool]:
    return [f"{printed(row['response'], test['stdin'])}\n" == test["stdout"] for test in row["tests"]]


def test_a_problem_written_out() -> None:
    assert TASK.prompt == "Read a number, add 3, multiply by 2, subtract 5 and print it. 4 gives 9."
    assert TASK.program("right") == "n = int(input()); n = n + 3; n = n * 2; n = n - 5; print(n)"
    assert TASK.program("unfinished") == "n = int(input()); n = n + 3; n = n * 2; print(n)"
    assert TASK.program("hard_coded") == "print(9)"
    assert TASK.tests == [{"stdin": "4\n", "stdout": "9\n"}, {"stdin": f"{UNSEEN}\n", "stdout": "201\n"}]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_right_demonstrations_pass_their_tests_and_others_fail(split: Any) -> None:
    every = program_rows(ProgramsConfig(rows=2000, right=1.0), split)
    assert all(passed(row) == [True, True] for row in every)
    wrong = program_rows(ProgramsConfig(rows=2000, right=0.0), split)
    # A constant passes the example; so does what lacks a multiplication of 0, and neither passes the other test.
    assert not any(passed(row)[1] for row in wrong)
    assert all(passed(row)[0] for row in wrong if row["response"].startswith("print"))


def test_the_judge_says_the_same_in_the_sandbox() -> None:
    spelt = TOKENIZER.decode(TOKENIZER.encode(TASK.program("right")))
    assert spelt.startswith("n = int ( input ( ) ) ; n = n + 3")
    programs = [*map(TASK.program, ("right", "unfinished", "hard_coded")), spelt, spelt.replace("3", "2")]
    assert [each.score for each in judged(programs, TASK.tests)] == [1.0, 0.0, 0.5, 1.0, 0.0]


def test_two_tests_tell_any_two_of_these_programs_apart() -> None:
    """Straight lines that meet in the example's number and in another are one line."""
    tasks = [Task((first, second), 4) for first in STEPS for second in STEPS]
    results = {tuple(test["stdout"] for test in task.tests) for task in tasks}
    lines = {(task.totals(0)[-1], task.totals(1)[-1]) for task in tasks}
    assert len(results) == len(lines)


def test_splits_share_no_steps_and_an_eighth_is_held_out() -> None:
    train = {row["response"] for row in program_rows(ProgramsConfig(rows=20_000, right=1.0), "train")}
    heldout = {row["response"] for row in program_rows(ProgramsConfig(rows=2000, right=1.0, seed=2), "heldout")}
    assert not train & heldout
    chains = [Task(((a, x), (b, y)), 1) for a in "+-*" for b in "+-*" for x in range(1, 10) for y in range(1, 10)]
    # 729 draws at 1/8: standard deviation 0.012; four of them.
    assert sum(task.split == "heldout" for task in chains) / len(chains) == pytest.approx(1 / 8, abs=0.05)
    assert Task(TASK.steps, 7).split == TASK.split


def test_same_seed_same_rows_another_seed_others_and_fewer_are_a_prefix() -> None:
    one, again, other = (program_rows(ProgramsConfig(rows=300, seed=seed), "train") for seed in (1, 1, 2))
    assert one == again
    assert one != other
    assert program_rows(ProgramsConfig(rows=100), "train") == one[:100]
    assert len({row["prompt"] for row in one}) == 300
    # Pinned: data made on another machine or Python must be this data.
    assert one[0]["prompt"] == "Read a number, subtract 1, multiply by 5, add 7 and print it. 5 gives 27."


def test_shares_of_demonstrations() -> None:
    rows = program_rows(ProgramsConfig(rows=4000), "train")
    right = sum(all(passed(row)) for row in rows) / len(rows)
    constant = sum(row["response"].startswith("print") for row in rows) / len(rows)
    # Standard deviation of a share of 4000 at most 0.008; four of them.
    assert (right, constant) == (pytest.approx(0.3, abs=0.032), pytest.approx(0.35, abs=0.032))


def test_prompts_and_demonstrations_are_tokens_of_the_tiny_models() -> None:
    data = DataConfig(source="programs", template="plain", max_tokens=64, programs=ProgramsConfig(rows=2000))
    prompts, demonstrations = load_prompts(data, TOKENIZER), load_sft(data, TOKENIZER)
    assert prompts.columns[0]["tests"] == program_rows(data.programs, "train")[0]["tests"]
    assert list(prompts.tokens) == [row.ids[: row.spans[0][0]] for row in demonstrations.rows]
    # Three steps: 8 tokens read, 6 a step, 4 print, 4 semicolons and EOS.
    assert max(len(row.ids) - row.spans[0][0] for row in demonstrations.rows) == 8 + 3 * 5 + 4 + 4 + 1
    assert TOKENIZER.vocab_size <= preset("tiny-xs").vocab_size


def test_what_they_are_not_is_named() -> None:
    data = DataConfig(source="programs", template="plain")
    with pytest.raises(DataError, match=r"programs, row 1, column 'chosen': missing; the row has \['prompt', 'resp"):
        load_preferences(data, TOKENIZER)
    with pytest.raises(DataError, match="programs, row 1, column 'correct': missing"):
        load_labelled(data, TOKENIZER)
    with pytest.raises(ConfigError, match=r"programs\.rows=60000: there are 56607 train problems; ask for fewer"):
        program_rows(ProgramsConfig(rows=60000), "train")
    for settings in ({"rows": 0}, {"right": 1.1}, {"seed": -1}):
        with pytest.raises(pydantic.ValidationError):
            ProgramsConfig.model_validate(settings)


def test_a_run_names_them_for_its_evaluation() -> None:
    judge = ("judges.works.kind=code_tests", "judges.works.isolation=none", "sampling.max_new_tokens=40")
    cfg = load_config(grpo.GRPOConfig, None, ["run_dir=run", "actor.init=tiny-xs", "prompts.source=programs", *judge])
    asked = "prompts.source=programs sampling.max_new_tokens=40 sampling.temperature=0.7"
    assert grpo.TRAINER.following(cfg)[0] == f"megarlhf eval model=run/model {asked}"


def test_eval_runs_the_tests_of_held_out_ones() -> None:
    settings = ("model=tiny-xs", "tokenizer=programs", "prompts.source=programs", "prompts.template=plain")
    sizes = ("prompts.programs.rows=4", "sampling.max_new_tokens=8", "code_tests.isolation=none")
    inputs = evaluate.prepare(load_config(evaluate.EvalConfig, None, [*settings, *sizes]))
    assert (inputs.verifier, inputs.data.split) == ("code_tests", "heldout")
    assert inputs.prompts.columns == program_rows(ProgramsConfig(rows=4), "heldout")
