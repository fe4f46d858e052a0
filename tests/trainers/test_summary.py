"""The last words of a run: numbers with the intervals that their samples allow, and nothing of what was not logged."""

from __future__ import annotations

import pytest

from megarlhf.config import load_config
from megarlhf.eval.intervals import mean_of, share_of
from megarlhf.trainers import dpo, grpo, reward, sft
from megarlhf.trainers.summary import as_mean, as_share, plainly


def within(text: str) -> tuple[float, float, float]:
    """The number and its interval."""
    value, low, high = text.partition(" ")[2].replace("[", "").replace("]", "").replace(",", "").split()
    return float(value), float(low), float(high)


def test_intervals_are_of_what_is_independent() -> None:
    """Of a policy: of its prompts, whatever the responses to each."""
    settings = ["run_dir=x", "rollout_batch=64", "group_size=4", "actor.init=tiny-xs"]
    cfg = load_config(grpo.GRPOConfig, None, settings)
    metrics = {"rollout/score_mean": 0.5, "rollout/score_std": 2.0, "rollout/accuracy": 0.75, "rollout/verified": 64}
    score, accuracy = grpo.TRAINER.summary(cfg, metrics)
    assert score.startswith("rollout/score_mean 0.5 [")
    assert within(score) == pytest.approx(mean_of(0.5, 2.0, 16), rel=1e-3)
    assert within(accuracy) == pytest.approx(share_of(0.75, 16), rel=1e-3)
    assert within(accuracy)[2] - within(accuracy)[1] > share_of(0.75, 64).high - share_of(0.75, 64).low


def test_other_runs_say_theirs() -> None:
    cfg = load_config(reward.RewardConfig, None, ["run_dir=x", "pairs_batch=32"])
    loss, ordered, auc = reward.TRAINER.summary(
        cfg, {"reward/loss": 0.25, "reward/pair_accuracy": 0.875, "reward/auc": 0.99, "reward/auc_stderr": 0.01}
    )
    assert (loss, auc) == ("reward/loss 0.25", "reward/auc 0.99 [0.9704, 1]")
    assert within(ordered) == pytest.approx(share_of(0.875, 32), rel=1e-3)
    of_pairs = load_config(dpo.DPOConfig, None, ["run_dir=x", "model=tiny-xs", "global_batch=16"])
    said = dpo.TRAINER.summary(of_pairs, {"dpo/loss": 0.5, "dpo/accuracy": 1.0})
    assert within(said[1]) == pytest.approx(share_of(1.0, 16), rel=1e-3)
    assert list(sft.TRAINER.summary(load_config(sft.SftConfig, None, ["run_dir=x"]), {"sft/loss": 1.25})) == [
        "sft/loss 1.25"
    ]


def test_what_was_not_logged_is_not_said() -> None:
    assert plainly({"sft/loss": 1.0}, "reward/loss") == []
    assert as_share({}, "rollout/accuracy", 5) == []
    assert as_share({"rollout/accuracy": 1.0}, "rollout/accuracy", 0) == []
    assert as_mean({}, "rollout/score_mean", "rollout/score_std", 8) == []
    # One value has no spread to judge by, nor have many that are all alike.
    alike = {"rollout/score_mean": 0.0, "rollout/score_std": 0.0}
    assert as_mean(alike, "rollout/score_mean", "rollout/score_std", 8) == ["rollout/score_mean 0"]
    assert as_share({"rollout/accuracy": 0.0}, "rollout/accuracy", 8)[0].startswith("rollout/accuracy 0 [0, ")
    assert as_mean(
        {"rollout/score_mean": 2.0, "rollout/score_std": 0.0}, "rollout/score_mean", "rollout/score_std", 1
    ) == ["rollout/score_mean 2"]
