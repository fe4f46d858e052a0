"""Problems of reasoning-gym: the same in every process, held out by their text, judged within bounds."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megarlhf.commands import evaluate
from megarlhf.config import load_config
from megarlhf.data import reasoning_gym
from megarlhf.data.reasoning_gym import REFUSED, VERSION, ReasoningGymConfig, task_rows
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import ConfigError
from megarlhf.judges import gym
from megarlhf.judges.gym import given_answer, gym_score
from megarlhf.judges.rules import RuleConfig
from megarlhf.judges.texts import Opinion, Response
from megarlhf.trainers import sft

pytest.importorskip("reasoning_gym", reason="the package reasoning-gym is not installed: pip install -e '.[tasks]'")

LEGS = "reasoning_gym:leg_counting"
EVAL = (
    "model=tiny-xs",
    "tokenizer=arithmetic",
    "prompts.template=plain",
    "sampling.max_new_tokens=4",
    "prompts.max_tokens=250",
)


def rows(source: str = LEGS, split: Any = "train", **settings: Any) -> list[dict[str, Any]]:
    return task_rows(source, ReasoningGymConfig.model_validate({"rows": 20, **settings}), split)


def test_no_problem_is_in_both_splits_whatever_the_seed() -> None:
    parts = [rows(split=split, seed=seed) for split in ("train", "heldout") for seed in (1, 2)]
    questions = [{row["question"] for row in part} for part in parts]
    assert [len(part) for part in questions] == [20] * 4
    assert not (questions[0] | questions[1]) & (questions[2] | questions[3])
    assert not questions[0] & questions[1], "another seed draws others"
    assert rows(rows=5) == rows(rows=20)[:5]
    assert (
        parts[0][0]["prompt"] == f"{parts[0][0]['question']}\n\nWrite the final answer between <answer> and </answer>."
    )
    assert rows(rows=1, instruction="")[0]["prompt"] == parts[0][0]["question"]


def test_another_process_makes_the_same_problems() -> None:
    """Although it hashes text otherwise, by which the sets of some refused tasks are ordered."""
    program = (
        "import json\nfrom megarlhf.data.reasoning_gym import ReasoningGymConfig, task_rows\n"
        f"print(json.dumps([row['question'] for row in task_rows({LEGS!r}, ReasoningGymConfig(rows=20), 'train')]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [row["question"] for row in rows()]


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<answer>3</answer> no: <answer>\n4 5\n6 7 </answer>", "4 5\n6 7"),
        ("Hence the answer is 12.", "12"),
        (r"\boxed{12}", "12"),
        (" 12\n", "12"),
        ("<answer>12", "<answer>12"),
    ],
)
def test_which_part_of_a_response_is_the_answer(response: str, answer: str) -> None:
    assert given_answer(response) == answer


def test_the_score_is_the_verifier_s_between_wrong_and_right() -> None:
    (row,) = rows("reasoning_gym:word_sorting", rows=1)
    words = row["answer"].split(", ")
    nobody: Any = None
    judge = RuleConfig(kind="rule", rule="reasoning_gym", right=3.0, wrong=1.0).scorer("judges.gym", nobody)
    half = ", ".join([*words[:2], *["?"] * (len(words) - 2)])
    said = judge([Response("?", text, row["answer"], row, 1) for text in (row["answer"], half, "none")])
    assert [opinion.score for opinion in said] == pytest.approx([3.0, 1 + 2 * 2 / len(words), 1.0])
    assert [(opinion.correct, opinion.failed) for opinion in said] == [(True, False), (False, False), (False, False)]


def test_a_verifier_that_fails_or_takes_too_long_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    row = rows(rows=1)[0]

    def endless(answer: str, entry: Any) -> float:
        while answer == "long":
            with suppress(Exception):  # as some verifiers have it
                sum(range(10_000))
        raise ValueError

    monkeypatch.setattr(gym, "SECONDS", 0.05)
    monkeypatch.setattr(gym, "_verifier", lambda name, parameters: endless)
    assert gym_score("long", row) is None
    assert gym_score("short", row) is None
    nobody: Any = None
    (said,) = RuleConfig(kind="rule", rule="reasoning_gym").scorer("judges.gym", nobody)(
        [Response("?", "long", "", row, 1)]
    )
    assert said == Opinion(0.0, correct=False, failed=True)


EVALUATING = {"eval", "exec", "parse_expr", "sympify", "compile"}


def test_no_task_on_offer_evaluates_an_answer() -> None:
    """Of every verifier's own lines, as the installed package has them."""
    factory: Any = __import__("reasoning_gym.factory", fromlist=["DATASETS"])
    found = set()
    for name, (cls, _) in factory.DATASETS.items():
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.score_answer)))
        called = {ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)}
        if called & EVALUATING:
            found.add(name)
    # number_sorting evaluates its own answer, and is refused for another reason.
    assert found - {"number_sorting"} == {name for name, why in REFUSED.items() if "evaluates" in why}
    assert REFUSED.keys() <= factory.DATASETS.keys()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_was_refused_is_refused_by_name_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        rows(f"reasoning_gym:{name}")
    assert str(error.value) == f"source=reasoning_gym:{name}: {REFUSED[name]}; choose another task."


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"reasoning_gym:leg_count: reasoning-gym has no such task; did you mean leg_"
    ):
        rows("reasoning_gym:leg_count")
    with pytest.raises(
        ConfigError, match=r"reasoning_gym\.parameters=\{'legs': 3\}: leg_counting refuses them \(.*leg"
    ):
        rows(parameters={"legs": 3})
    with pytest.raises(ConfigError, match=r"scores answers to that package's problems, and x\.jsonl has others; set "):
        gym.check_gym(None, "x.jsonl", "judges.a.rule")  # pyright: ignore[reportArgumentType]
    data = ("model=tiny-xs", "tokenizer=arithmetic", f"data.source={LEGS}", "run_dir=run")
    with pytest.raises(ConfigError, match=r"data\.source=reasoning_gym:leg_counting makes prompts alone"):
        sft.TRAINER.prepare(load_config(sft.SftConfig, None, data))
    monkeypatch.setattr(reasoning_gym, "VERSION", "0")
    with pytest.raises(ConfigError, match=f"reasoning-gym {VERSION} is installed, .*; pip install reasoning-gym==0"):
        rows()


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match=r"needs the package reasoning-gym; pip install 'megarlhf\[tasks\]'"):
        rows()


def test_it_is_the_version_that_is_pinned() -> None:
    pins = (Path(__file__).resolve().parents[2] / "constraints.txt").read_text(encoding="utf-8")
    assert f"reasoning-gym=={VERSION}\n" in pins
    assert importlib.metadata.version("reasoning-gym") == VERSION


def test_eval_takes_the_held_out_problems_and_their_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = rows(split="heldout", rows=8)
    tokenizer = build_tiny_tokenizer(
        sorted(set(re.findall(r"\w+|[^\w\s]", " ".join(row["prompt"] for row in held_out))))
    )
    monkeypatch.setattr(evaluate, "resolve_tokenizer", lambda *_: tokenizer)
    cfg = load_config(evaluate.EvalConfig, None, [*EVAL, f"prompts.source={LEGS}", "prompts.reasoning_gym.rows=8"])
    inputs = evaluate.prepare(cfg)
    assert (inputs.verifier, inputs.doubts, inputs.data.split) == ("reasoning_gym", "", "heldout")
    assert inputs.prompts.columns == held_out
