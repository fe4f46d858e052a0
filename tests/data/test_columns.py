"""Data that name their columns otherwise: a setting takes them, and an error says which one would."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megarlhf.commands import evaluate, generate
from megarlhf.config import load_config
from megarlhf.data.arithmetic import words
from megarlhf.data.preferences import load_labelled, load_preferences
from megarlhf.data.prompts import PromptSet, load_prompts
from megarlhf.data.rows import DataConfig
from megarlhf.data.sft import load_sft
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import ConfigError, DataError
from megarlhf.trainers import grpo, ppo, sft
from megarlhf.trainers.ppo import PPOConfig

TOKENIZER = build_tiny_tokenizer(words())
GSM8K = [
    {"question": "Tom has 5 apples. Tom buys 3.", "answer": "5 + 3 = <<5+3=8>>8 apples.\n#### 8"},
    {"question": "Eva has 7 shells.", "answer": "Eva has 7.\n#### 7"},
]
RUN = (
    *("actor.init=tiny-xs", "critic.init=tiny-xs", "tokenizer=arithmetic", "prompts.template=plain", "run_dir=run"),
    *("prompts.source=rows.jsonl", "rollout_batch=2", "global_batch=2", "micro_batch=1", "sampling.max_new_tokens=8"),
)
ROLLED_OUT = (*(setting for setting in RUN if not setting.startswith("critic")), "group_size=2")
MODEL = ("model=tiny-xs", "tokenizer=arithmetic", "prompts.template=plain", "prompts.source=rows.jsonl")
EVAL = GENERATE = (*MODEL, "sampling.max_new_tokens=8")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(*rows: dict[str, Any]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def loaded(**columns: str) -> PromptSet:
    return load_prompts(DataConfig(source="rows.jsonl", template="plain", columns=columns), TOKENIZER)


def test_a_mapped_column_is_there_under_both_names() -> None:
    write({"question": "Tom has 5.", "solution": "5", "answer": "none", "level": 3})
    prompts = loaded(prompt="question", answer="solution")
    assert TOKENIZER.decode(prompts.tokens[0]) == "Tom has 5."
    assert prompts.answers == ["5"]
    assert prompts.columns == [
        {"question": "Tom has 5.", "prompt": "Tom has 5.", "solution": "5", "answer": "5", "level": 3}
    ]


def test_rows_as_gsm8k_has_them_are_read_by_the_commands_of_the_page() -> None:
    """Those of docs/judges.md; by generate too, which needs no more than eval."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "judges.md").read_text(encoding="utf-8")
    recipe = page.partition("## Data that name their columns otherwise")[2].partition("\n## ")[0]
    shown = re.findall(r"^megarlhf (\w+) \.\.\. (.*)$", recipe, re.MULTILINE)
    assert [command for command, _ in shown] == ["sft", "grpo", "eval"]
    learnt, rolled_out, asked = (re.sub(r"=\w+\.jsonl", "=rows.jsonl", settings).split() for _, settings in shown)
    write(*GSM8K)
    inputs = grpo.TRAINER.prepare(load_config(grpo.GRPOConfig, None, [*ROLLED_OUT, *rolled_out]))
    assert [columns["prompt"] for columns in inputs.prompts.columns] == [row["question"] for row in GSM8K]
    assert list(inputs.prompts.answers) == [row["answer"] for row in GSM8K]
    assert (inputs.verifier, inputs.doubts) == ("gsm8k", "")
    following = grpo.TRAINER.following(load_config(grpo.GRPOConfig, None, [*ROLLED_OUT, *rolled_out]))[0]
    drawn = ["sampling.max_new_tokens=8", "sampling.temperature=0.7"]
    assert shlex.split(following)[3:] == ["prompts.source=FILE", "verifier=gsm8k", *drawn]
    tested = evaluate.prepare(load_config(evaluate.EvalConfig, None, [*EVAL, *asked])).prompts
    drawn = generate.prepare(load_config(generate.GenerateConfig, None, [*GENERATE])).prompts
    assert list(tested.tokens) == list(drawn.tokens) == list(inputs.prompts.tokens)
    data = load_config(sft.SftConfig, None, ["run_dir=run", "model=tiny-xs", *learnt]).data
    write(*({**row, "answer": row["question"]} for row in GSM8K))  # whose words the tokenizer knows
    assert len(load_sft(data.model_copy(update={"template": "plain"}), TOKENIZER)) == len(GSM8K)


def test_numbers_are_answers_as_json_writes_them() -> None:
    write({"prompt": "Tom", "answer": 18}, {"prompt": "Eva", "answer": 18.0}, {"prompt": "Max", "answer": None})
    assert loaded().answers == ["18", "18.0", ""]
    for bad, said in ((True, "True is not text"), (float("nan"), "nan is not text"), ([18], r"\[18\] is not text")):
        write({"prompt": "Tom", "answer": bad})
        with pytest.raises(DataError, match=f"column 'answer': {said}"):
            loaded()


@pytest.mark.parametrize("usual", ["problem", "query", "messages"])
def test_the_setting_that_takes_a_usual_name_is_said_and_works(usual: str) -> None:
    write({usual: "Tom has 5.", "answer": "5"})
    with pytest.raises(DataError) as error:
        loaded()
    assert str(error.value) == (
        f"bad row: rows.jsonl, row 1, column 'prompt': missing; the row has {sorted((usual, 'answer'))}; "
        f"set prompts.columns.prompt={usual}."
    )
    assert loaded(prompt=usual).answers == ["5"]


@pytest.mark.parametrize("usual", ["solution", "label", "target", "final_answer"])
def test_so_it_is_for_an_answer_that_something_needs(usual: str) -> None:
    write({"prompt": "Tom has 5.", usual: "5"}, {"prompt": "Eva has 7.", usual: "7"})
    remedy = f"fill the column 'answer', or set prompts.columns.answer={usual}."
    for prepare, says in (
        (
            lambda *more: ppo.TRAINER.prepare(
                load_config(PPOConfig, None, [*RUN, "judges.a.kind=rule", "judges.a.rule=exact", *more])
            ),
            "judges.a judges by the answer",
        ),
        (
            lambda *more: evaluate.prepare(load_config(evaluate.EvalConfig, None, [*EVAL, "verifier=exact", *more])),
            "no answer to check against",
        ),
    ):
        with pytest.raises(DataError) as error:
            prepare()
        assert str(error.value) == f"rows.jsonl, row 1: {says}; {remedy}"
        assert list(prepare(f"prompts.columns.answer={usual}").prompts.answers) == ["5", "7"]


def test_a_column_that_is_not_there_is_named() -> None:
    write({"question": "Tom has 5."}, {"prompt": "Eva has 7."})
    with pytest.raises(DataError) as error:
        loaded(prompt="question")
    assert str(error.value) == (
        "bad row: rows.jsonl, row 2, column 'question' (prompts.columns.prompt): not there; the row has ['prompt'], "
        "name one of them. Or leave such rows out: prompts.bad_rows=drop."
    )
    write({"question": 5})
    with pytest.raises(DataError, match=r"column 'question' \(prompts\.columns\.prompt\): 5 is not text; put it in q"):
        loaded(prompt="question")
    with pytest.raises(ConfigError) as refused:
        loaded(ask="question")
    assert str(refused.value) == (
        "prompts.columns.ask=question: these rows have no such column; they have prompt, answer."
    )


def test_other_kinds_of_rows_take_it_too() -> None:
    write({"question": "Tom has 5.", "good": "5", "bad": "6", "right": 1})

    def config(**columns: str) -> DataConfig:
        return DataConfig(source="rows.jsonl", template="plain", columns={"prompt": "question", **columns})

    pairs = load_preferences(config(chosen="good", rejected="bad"), TOKENIZER)
    assert [TOKENIZER.decode(row) for row in (*pairs.chosen, *pairs.rejected)] == ["Tom has 5. 5", "Tom has 5. 6"]
    assert load_labelled(config(response="good", correct="right"), TOKENIZER).correct == [1.0]
    assert [TOKENIZER.decode(row.ids) for row in load_sft(config(response="good"), TOKENIZER).rows] == ["Tom has 5. 5"]
    with pytest.raises(ConfigError, match=r"^heldout\.columns\.answer=good: these rows have no such column"):
        load_labelled(config(answer="good"), TOKENIZER, "heldout")
