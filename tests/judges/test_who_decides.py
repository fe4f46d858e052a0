"""Programs that pass their tests are right: for a run's log, where a judge runs them, and in eval."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from megarlhf.commands import evaluate
from megarlhf.config import load_config
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import ConfigError, DataError
from megarlhf.judges.code_tests import CodeTestsConfig
from megarlhf.judges.panel import Court, build_panel
from megarlhf.judges.rules import RuleConfig
from megarlhf.judges.texts import Opinion, Reader, Response
from megarlhf.judges.verifiers import verifier_remark
from megarlhf.trainers import grpo
from megarlhf.trainers.grpo import GRPOConfig
from tests.judges.test_panel import RESPONSES, prompt_set, rollout_of

SHARED = ("tokenizer=arithmetic", "prompts.template=plain", "prompts.source=rows.jsonl")
RUN = (
    *("actor.init=tiny-xs", "run_dir=run", "rollout_batch=2", "group_size=2", "global_batch=2", "micro_batch=1"),
    *("sampling.max_new_tokens=8", *SHARED),
)
EVAL = ("model=tiny-xs", "sampling.max_new_tokens=8", *SHARED)
WORKS = ("judges.works.kind=code_tests", "judges.works.isolation=none", "judges.works.weight=0")
ANSWER = ("judges.answer.kind=rule", "judges.answer.rule=gsm8k")
TESTS = [{"stdin": "", "stdout": "5"}]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(json.dumps({"prompt": "How many?", "answer": 5, "tests": TESTS}) + "\n")


@pytest.mark.parametrize(
    ("settings", "verifier"),
    [
        ([*WORKS, *ANSWER], "code_tests"),
        ([*ANSWER, *WORKS], "gsm8k"),
        ([*WORKS, *ANSWER, "verifier=gsm8k"], "gsm8k"),
        ([*WORKS, *ANSWER, "verifier=none"], None),
    ],
)
def test_the_first_judge_that_knows_decides_unless_a_setting_does(settings: list[str], verifier: str | None) -> None:
    inputs = grpo.TRAINER.prepare(load_config(GRPOConfig, None, [*RUN, *settings]))
    assert inputs.verifier == verifier
    assert inputs.doubts == "judges.works runs generated programs unguarded, as you"
    if verifier == "code_tests":
        assert verifier_remark(verifier, inputs.prompts) == "verifier: code_tests, of all 1 prompts"


class _Alone:
    """A mesh of one rank."""

    rank = 0

    def size(self, axis: str) -> int:
        return 1


def test_a_panel_takes_what_its_judge_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def scorer(self: CodeTestsConfig, setting: str, reader: Reader) -> Any:
        def judge(responses: Sequence[Response]) -> list[Opinion]:
            asked.extend(each.response for each in responses)
            return [Opinion(0.0, correct=each.response == "5") for each in responses]

        return judge

    monkeypatch.setattr(CodeTestsConfig, "scorer", scorer)
    monkeypatch.setattr("megarlhf.judges.texts.gather_objects", lambda said, mesh, axis: [said])
    prompts, rows = prompt_set()
    reader = Reader(prompts, build_tiny_tokenizer(words()), cast("Any", _Alone()), 60.0)
    judges = {"answer": RuleConfig(kind="rule", rule="arithmetic"), "works": CodeTestsConfig(kind="code_tests")}
    panel = build_panel(judges, "code_tests", Court({}, reader, cast("Any", None)))
    judgement = panel.judge(rollout_of(prompts, rows))
    assert list(judgement.correct) == [False, False, True, False, False]
    assert asked == list(RESPONSES)  # each row once


def prepared(*settings: str) -> evaluate.EvalInputs:
    return evaluate.prepare(load_config(evaluate.EvalConfig, None, [*EVAL, *settings]))


def test_eval_runs_all_tests_of_a_row_by_its_own_settings() -> None:
    inputs = prepared("verifier=code_tests", "code_tests.isolation=none", "code_tests.wall_s=3")
    assert inputs.judge == CodeTestsConfig(kind="code_tests", reward="all", isolation="none", wall_s=3)
    assert (inputs.verifier, inputs.doubts) == ("code_tests", "code_tests runs generated programs unguarded, as you")
    Path("rows.jsonl").write_text(json.dumps({"prompt": "How many?", "checks": TESTS}) + "\n")
    assert prepared("verifier=code_tests", "code_tests.isolation=none", "code_tests.column=checks").prompts.answers == [
        ""
    ]


def test_eval_says_by_its_own_settings_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"there is none by default .* or verifier=code_tests \(programs that pass"):
        prepared()
    with pytest.raises(DataError, match=r"row 1, column 'checks': no tests; code_tests needs a list of \{\"stdin\""):
        prepared("verifier=code_tests", "code_tests.column=checks")
    monkeypatch.setattr("megarlhf.judges.sandbox._trouble", lambda sandbox: "not here")
    with pytest.raises(ConfigError) as error:
        prepared("verifier=code_tests", "code_tests.wall_s=4")
    assert str(error.value).startswith("code_tests.isolation=auto: generated programs cannot be run apart here (")
    assert str(error.value).endswith("as you: code_tests.isolation=none.")


def test_the_rules_are_not_asked_for_tests() -> None:
    assert prepared("verifier=gsm8k").judge == RuleConfig(kind="rule", rule="gsm8k")
