"""A reward of one's own and no reward model, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarlhf.config import load_config
from megarlhf.errors import ConfigError
from megarlhf.observe.curves import curves
from megarlhf.observe.writers import read_metrics
from megarlhf.trainers.ppo import TRAINER, PPOConfig
from tests.test_cli_runs import megarlhf

PPO = (
    *("ppo", "run_dir=run", "actor.init=tiny-xs", "critic.init=tiny-xs", "tokenizer=arithmetic"),
    *("prompts.source=arithmetic", "prompts.template=plain", "prompts.arithmetic.rows=16", "rollout_batch=8"),
    *("global_batch=8", "micro_batch=4", "iterations=2", "ppo_epochs=1", "sampling.max_new_tokens=6", "samples=3"),
    *("judges.answer.kind=rule", "judges.answer.rule=arithmetic", "judges.answer.weight=2"),
    *("judges.brief.kind=function", "judges.brief.function=own.py:brief"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("own")
    (place / "own.py").write_text(
        "def brief(prompt, response, answer, columns):\n"
        "    assert columns['answer'] == answer and columns['prompt'] == prompt\n"
        "    return -len(response) / 100\n"
    )
    done = megarlhf(*PPO, directory=place)
    assert done.returncode == 0, done.stderr
    return place


def test_the_score_is_the_weighted_sum_of_what_is_logged(place: Path) -> None:
    log = read_metrics(place / "run")
    assert [row["step"] for row in log.rows] == [1, 2]
    for row in log.rows:
        said = 2 * row["judge/answer_mean"] + row["judge/brief_mean"]
        assert row["rollout/score_mean"] == pytest.approx(said, abs=1e-6)
        assert row["rollout/accuracy"] == row["judge/answer_mean"]
        assert row["judge/brief_mean"] < 0
        assert row["time/judge_brief_s"] > 0
    assert "judge/brief_mean" in curves("PPO", log)


def test_samples_show_what_each_judge_said(place: Path) -> None:
    samples = [json.loads(line) for line in (place / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3
    for row in samples:
        assert row["scores"] == {
            "answer": float(row["correct"]),
            "brief": pytest.approx(-len(row["response"]) / 100, abs=1e-6),
        }
        assert row["score"] == pytest.approx(2 * row["scores"]["answer"] + row["scores"]["brief"], abs=1e-6)


def test_ppo_without_a_model_judge_says_what_its_critic_needs(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(ConfigError, match=r"critic\.init is empty"):
        TRAINER.prepare(load_config(PPOConfig, None, [*PPO[1:], "run_dir=other", "critic.init=''"]))


def test_a_function_that_fails_loses_nothing_of_the_run(place: Path) -> None:
    """At the first response of the second iteration; the first would not have been saved yet."""
    (place / "failing.py").write_text(
        "CALLS = []\n"
        "def brief(prompt, response, answer, columns):\n"
        "    CALLS.append(response)\n"
        "    return 1 / (9 - len(CALLS))\n"
    )
    done = megarlhf(*PPO, "run_dir=failing", "judges.brief.function=failing.py:brief", directory=place)
    assert done.returncode == 1, done.stderr
    first, last = done.stderr.splitlines()[-2:]
    assert first.startswith(
        "judges.brief: failing.py:brief raised ZeroDivisionError: division by zero for the response"
    )
    assert last == "the state after step 1 is in failing/checkpoints, and the same command goes on from there."
    assert (place / "failing" / "checkpoints" / "latest").read_text().strip() == "step_00000001"
