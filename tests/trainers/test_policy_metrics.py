"""What an iteration reports of its rollouts, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf.batch.rollouts import Rollout
from megarlhf.judges.judge import Verdict
from megarlhf.judges.panel import Judgement
from megarlhf.observe.metrics import check
from megarlhf.trainers.policy_metrics import reference_metrics, step_metrics
from megarlhf_kernels.linear_ppo import Estimator


@pytest.mark.parametrize(
    ("estimator", "paid"),
    [("k1", 3 * math.log(2)), ("k2", 5 * math.log(2) ** 2 / 2), ("k3", 0.75 - 2 + 3 * math.log(2))],
)
def test_the_distance_to_the_reference_by_hand(estimator: Estimator, paid: float) -> None:
    """Two responses: tokens twice and four times as likely as by the reference; and one as likely, with padding."""
    gap = math.log(2) * torch.tensor([[1.0, 2.0], [0.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    found = reference_metrics(gap - 3.0, torch.full_like(gap, -3.0), mask, kl_coef=0.1, estimator=estimator)
    assert found == pytest.approx(
        {
            "kl/reference_mean": 3 * math.log(2) / 2,
            # e^-x - 1 + x at log 2 and log 4
            "kl/reference_k3_mean": (0.5 - 1 + 0.25 - 1 + 3 * math.log(2)) / 2,
            "kl/reference_per_token": 3 * math.log(2) / 3,
            "kl/penalty_mean": 0.1 * paid / 2,
            "kl/coef": 0.1,
        }
    )


def test_steps_are_counted_and_their_scores_placed() -> None:
    """By hand: five steps and one, of 12 and 4 tokens; earned 1, 2, 3, 4, 5 and 5 in size, of 20 in all."""
    rollout = Rollout(
        tokens=torch.ones(2, 15, dtype=torch.int64),
        prompt_lengths=torch.tensor([3, 2]),
        lengths=torch.tensor([15, 6]),
        terminated=torch.ones(2).bool(),
        sampler_logprobs=torch.zeros(2, 14),
        prompt_ids=torch.arange(2),
        answers=("", ""),
    )
    nothing = torch.zeros(2, 14)
    earned = [[-1.0, 2.0, 3.0, -4.0, 5.0], [5.0]]
    steps = Verdict(nothing, steps=[[9.0] * 5, [9.0]], earned=earned)
    judgement = Judgement(nothing, {"steps": steps, "rule": Verdict(nothing)}, (None, None), {})
    found = step_metrics(judgement, rollout)
    check(found)
    assert found == pytest.approx(
        {
            "steps/steps_per_response": 3.0,
            "steps/steps_tokens": 16 / 6,
            "steps/steps_share_1": 0.3,
            "steps/steps_share_2": 0.1,
            "steps/steps_share_3": 0.15,
            "steps/steps_share_4": 0.2,
            "steps/steps_share_later": 0.25,
        }
    )
    worthless = Judgement(
        nothing, {"a": Verdict(nothing, steps=[[0.0], [0.0]], earned=[[0.0], [0.0]])}, (None, None), {}
    )
    assert step_metrics(worthless, rollout)["steps/a_share_1"] == 0.0


def test_where_nothing_was_said_there_is_no_distance() -> None:
    nothing = torch.zeros(2, 3)
    found = reference_metrics(nothing - 1.0, nothing, nothing.bool(), kl_coef=0.1)
    assert found == {**dict.fromkeys(found, 0.0), "kl/coef": 0.1}
