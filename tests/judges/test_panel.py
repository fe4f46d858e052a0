"""Several judges as one: a weighted sum by hand, each row judged once in every layout, and faults that are named."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from megarlhf.batch.rollouts import Rollout
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.data.arithmetic import words
from megarlhf.data.prompts import PromptSet
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import ConfigError, JudgeError
from megarlhf.judges.function import FunctionConfig
from megarlhf.judges.judge import Verdict, joined_verdicts, outcome
from megarlhf.judges.panel import Court, Judgement, Panel, _metrics_of, build_panel, joined
from megarlhf.judges.texts import Reader, Response
from megarlhf.observe.metrics import check
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runtime.checks import Model
from megarlhf.trainers.ppo import PPOConfig
from tests.helpers.models import name_of, score_model
from tests.helpers.ranks import run_ranks

RESPONSES = ("The answer is 5.", "The answer is 6.", "5", "The answer is 5. The answer is 6.", "The answer is 5.")
ANSWERS = ("5", "5", "5", "6", "")
FUNCTION = """
import os
import math
from dataclasses import dataclass
from pathlib import Path

def longer(prompt, response, answer, columns):
    with (Path(__file__).parent / f"seen_{os.getpid()}").open("a") as file:
        file.write(f"{columns['number']} {prompt} {answer}\\n")
    return {"length": len(response) / 8, "number": columns["number"]}
"""


def prompt_set() -> tuple[PromptSet, list[list[int]]]:
    """One prompt a response, and each with its response as tokens."""
    tokenizer = build_tiny_tokenizer(words())
    prompts = [tokenizer.encode_prompt(f"How many? {number}", "plain") for number in range(len(RESPONSES))]
    columns = [{"prompt": f"How many? {n}", "answer": ANSWERS[n], "number": n} for n in range(len(RESPONSES))]
    found = PromptSet(prompts, ANSWERS, range(len(prompts)), tokenizer.pad_id, dropped=0, columns=columns)
    return found, [ids + tokenizer.encode_response(said) for ids, said in zip(prompts, RESPONSES, strict=True)]


def rollout_of(prompts: PromptSet, rows: list[list[int]]) -> Rollout:
    width = max(map(len, rows))
    return Rollout(
        tokens=torch.tensor([row + [prompts.pad_id] * (width - len(row)) for row in rows]),
        prompt_lengths=torch.tensor([len(tokens) for tokens in prompts.tokens]),
        lengths=torch.tensor([len(row) for row in rows]),
        terminated=torch.ones(len(rows), dtype=torch.bool),
        sampler_logprobs=torch.zeros(len(rows), width - 1),
        prompt_ids=torch.arange(len(rows)),
        answers=tuple(prompts.answers),
    )


def settings(layout: ParallelLayout, folder: str, judges: dict[str, Any]) -> PPOConfig:
    return PPOConfig.model_validate({"run_dir": Path(folder) / "run", "layout": layout, "judges": judges})


def judged(layout: ParallelLayout, folder: str, judges: dict[str, Any], verifier: Any = None) -> dict[str, Any]:
    """What a panel says on this rank, and what each model says alone."""
    mesh = start(layout, seed=1)
    cfg = settings(layout, folder, judges)
    models = {
        name: Model(name, judge.init, describe_model(judge.init))
        for name, judge in cfg.panel.items()
        if judge.kind == "model"
    }
    prompts, rows = prompt_set()
    rollout = rollout_of(prompts, rows)
    panel = build_panel(
        cfg.panel, verifier, Court(models, Reader(prompts, build_tiny_tokenizer(words()), mesh, 60.0), cfg)
    )
    said = panel.judge(rollout)
    return {
        "token_scores": said.token_scores,
        "scores": said.scores,
        "each": {name: verdict.scores for name, verdict in said.verdicts.items()},
        "alone": [role.score(rollout) for role in panel.roles],
        "correct": list(said.correct),
        "metrics": said.metrics,
        "wrong": panel.wrong_score,
        "mask": rollout.response_mask,
    }


RIGHT = [1.0, 0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "layout", [ParallelLayout(), ParallelLayout(tensor=2), ParallelLayout(pipeline=2, data=2)], ids=name_of
)
def test_scores_are_the_weighted_sum_and_each_row_is_judged_once(layout: ParallelLayout, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FUNCTION)
    score_model(tmp_path / "judge", seed=5, vocab_size=161)
    judges = {
        "taste": {"kind": "model", "init": str(tmp_path / "judge"), "weight": 0.5},
        "answer": {"kind": "rule", "rule": "arithmetic", "right": 2.0, "wrong": -1.0, "weight": -3.0},
        "own": {"kind": "function", "function": f"{tmp_path / 'own.py'}:longer", "weight": 0.25},
    }
    for rank in run_ranks(judged, layout.world_size, layout, str(tmp_path), judges, "arithmetic"):
        rule = torch.tensor([3 * right - 1 for right in RIGHT])
        length = torch.tensor([len(text) / 8 for text in RESPONSES])
        number = torch.arange(5.0)
        (model,) = rank["alone"]
        assert model.std() > 0
        torch.testing.assert_close(rank["each"], {"taste": model, "answer": rule, "own": length + number})
        torch.testing.assert_close(rank["scores"], 0.5 * model - 3 * rule + 0.25 * (length + number))
        # One number a row, at its last response token.
        last = rank["mask"] & (rank["mask"].flip(1).cumsum(1).flip(1) == 1)
        torch.testing.assert_close(rank["token_scores"][last], rank["scores"])
        assert not rank["token_scores"][~last].any()
        assert rank["correct"] == [True, False, False, True, None]
        metrics = rank["metrics"]
        assert metrics["judge/answer_mean"] == pytest.approx(rule.mean())
        assert metrics["judge/answer_std"] == pytest.approx(rule.std(correction=0))
        assert metrics["judge/own_mean"] == pytest.approx((length + number).mean())
        assert metrics["judge/own.length_mean"] == pytest.approx(length.mean())
        assert metrics["judge/own.number_mean"] == 2
        assert metrics["time/judge_taste_s"] >= 0
        # A model judges every response.
        assert {name: value for name, value in metrics.items() if name.endswith("_failures")} == {
            "judge/answer_failures": 0,
            "judge/own_failures": 0,
        }
        assert rank["wrong"] == float("inf")  # nobody knows what the function gives wrong responses
    seen = [line for file in tmp_path.glob("seen_*") for line in file.read_text().splitlines()]
    assert sorted(seen) == [
        f"{n} How many? {n} {ANSWERS[n]}".rstrip() if ANSWERS[n] else f"{n} How many? {n} " for n in range(5)
    ]
    assert len(list(tmp_path.glob("seen_*"))) == min(layout.world_size, 5)


def test_a_rule_says_what_wrong_responses_get() -> None:
    judges = {"answer": {"kind": "rule", "rule": "arithmetic", "wrong": -1.0, "weight": 2.0}}
    (rank,) = run_ranks(judged, 1, ParallelLayout(), "nowhere", judges)
    assert rank["wrong"] == -2.0
    assert rank["correct"] == [None] * 5  # nobody was named to say it


@dataclass(frozen=True)
class Fixed:
    """A judge that gives every response one score."""

    name: str
    score: float
    weight: float
    wrong_score: float = 0.0

    def judge(self, rollout: Rollout) -> Verdict:
        return Verdict(outcome(torch.full((len(rollout),), self.score), rollout))


@pytest.mark.parametrize("score", [math.nan, math.inf, 7.0])
def test_a_judge_without_weight_is_heard_and_not_counted(score: float) -> None:
    """Whatever it says: 0 times what is not finite would be no number."""
    panel = Panel((Fixed("quiet", score, 0.0, math.inf), Fixed("loud", 3.0, 2.0, -1.0)))
    judgement = panel.judge(rollout_of(*prompt_set()))
    assert judgement.scores.tolist() == [6.0] * 5
    assert judgement.metrics["judge/quiet_mean"] == pytest.approx(score, nan_ok=True)
    assert judgement.metrics["judge/quiet_weight"] == 0.0
    assert panel.wrong_score == -2.0  # what the quiet one gives wrong responses nobody needs to know


def test_what_is_said_of_several_batches_is_joined_and_cut_whole() -> None:
    """Every field of a verdict: scores of other widths, parts that one of them lacks, verdicts, failures."""
    wide, narrow = torch.arange(6.0).view(2, 3), torch.tensor([[7.0], [8.0]])
    first = Verdict(wide, {"a": torch.tensor([1.0, 2.0])}, [True, None], [False, True])
    second = Verdict(narrow, {"b": torch.tensor([3.0, 4.0])}, [False, True], [True, False])
    both = joined_verdicts([first, second])
    assert both.token_scores.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [7.0, 0.0, 0.0], [8.0, 0.0, 0.0]]
    cut = both.rows([3, 0])
    assert cut.scores.tolist() == [8.0, 3.0]
    assert {name: part.tolist() for name, part in cut.parts.items()} == {"a": [0.0, 1.0], "b": [4.0, 0.0]}
    assert (cut.correct, cut.failed) == ([True, True], [False, False])
    assert (both.correct, both.failed) == ([True, None, False, True], [False, True, True, False])
    metrics = _metrics_of("taste", 0.5, first, 1.5) | {"judge/taste_weight": 0.5}
    parts = [Judgement(0.5 * each.token_scores, {"taste": each}, each.correct, metrics) for each in (first, second)]
    judgement = joined(parts)
    assert judgement.metrics["judge/taste_mean"] == both.scores.mean()
    assert judgement.metrics["time/judge_taste_s"] == 3.0
    assert judgement.rows([1, 2]).scores.tolist() == [6.0, 3.5]


def test_responses_that_could_not_be_judged_are_counted() -> None:
    scores = outcome(torch.arange(5.0), rollout_of(*prompt_set()))
    verdict = Verdict(scores, failed=[True, False, True, False, False])
    metrics = _metrics_of("taste", 1.0, verdict, 0.5)
    assert metrics["judge/taste_failures"] == 2
    check(metrics)


BAD = {
    "raise ValueError('no')": "own.py:own raised ValueError: no for the response 'The answer is 5.' to the prompt",
    "return 10**400": "own.py:own returned 1000",
    "return 1e31": "own.py:own returned 1e+31 for",
    "return {'a': 1e12, 'b': 1e12}": "own.py:own returned {'a': 1000000000000.0",
    "return True": "own.py:own returned True for",
    "raise SystemExit": "own.py:own raised SystemExit: ",
    "return float('nan')": "own.py:own returned nan for the response 'The answer is 5.' to the prompt of row 1",
    "return {'a': 1, 'b': 'x'}": "own.py:own returned {'a': 1, 'b': 'x'} for",
    "return None": "own.py:own returned None for",
}


@pytest.mark.parametrize("body", BAD)
def test_a_function_that_fails_is_named_with_the_row_on_every_rank(body: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(f"def own(prompt, response, answer, columns):\n    {body}\n")
    judges = {"mine": {"kind": "function", "function": f"{tmp_path / 'own.py'}:own"}}
    for rank in run_ranks(raised, 2, ParallelLayout(data=2), str(tmp_path), judges):
        assert f"judges.mine: {tmp_path}/{BAD[body]}" in rank


def test_one_rank_s_fault_is_every_rank_s(tmp_path: Path) -> None:
    """Row 2 is of the second rank; the first would wait for it for ever."""
    (tmp_path / "own.py").write_text(
        "def own(prompt, response, answer, columns):\n    return 1 / (columns['number'] - 1)\n"
    )
    judges = {"mine": {"kind": "function", "function": f"{tmp_path / 'own.py'}:own"}}
    for rank in run_ranks(raised, 2, ParallelLayout(data=2), str(tmp_path), judges):
        assert rank.startswith(f"judges.mine: {tmp_path}/own.py:own raised ZeroDivisionError")
        assert "row 2 ('How many? 1')" in rank


def raised(*args: Any) -> str:
    with pytest.raises(JudgeError) as error:
        judged(*args)
    return str(error.value)


@pytest.mark.parametrize(
    ("written", "function", "says"),
    [
        ("", "nowhere.py:own", "no such file, or not of the form FILE.py:NAME"),
        ("own = 1", "own.py", "no such file, or not of the form FILE.py:NAME"),
        ("own = 1", "own.py:own", "defines no function own; write def NAME(prompt, response, answer, columns)"),
        ("def own(text): return 1", "own.py:own", "cannot be called (too many positional arguments); write def NAME("),
        (
            "import nothing_at_all",
            "own.py:own",
            "own.py raised ModuleNotFoundError: No module named 'nothing_at_all' when",
        ),
    ],
)
def test_a_function_that_cannot_be_had_is_refused(
    written: str, function: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(written)
    with pytest.raises(ConfigError) as error:
        FunctionConfig(kind="function", function=function).check("judges.mine", prompt_set()[0], "rows.jsonl")
    assert says in str(error.value)
    assert str(error.value).startswith(f"judges.mine.function={function}")


def test_a_file_is_run_once_whatever_is_taken_from_it(tmp_path: Path) -> None:
    """And dataclasses work in it, which look for their module."""
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom pathlib import Path\n"
        "with (Path(__file__).parent / 'runs').open('a') as file:\n    file.write('x')\n"
        "@dataclass\nclass Part:\n    value: float = 2.0\n"
        "def one(prompt, response, answer, columns): return Part().value\n"
        "def two(prompt, response, answer, columns): return {'a': Part().value, 'b': 1}\n"
    )
    given, nobody = Response("?", "!", "", {}, 1), cast("Any", None)
    for name, score in (("one", 2.0), ("two", 3.0)):
        cfg = FunctionConfig(kind="function", function=f"{tmp_path / 'own.py'}:{name}")
        cfg.check(f"judges.{name}", prompt_set()[0], "")
        (opinion,) = cfg.scorer(f"judges.{name}", nobody)([given])
        assert opinion.score == score
    assert (tmp_path / "runs").read_text() == "x"
