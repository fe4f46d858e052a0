"""From scores to what is learnt from: each step by hand, their order, and what a run remembers of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.errors import CheckpointError, ConfigError
from megarlhf.judges.shaping import RunningMoments, Shaper, ShapingConfig
from megarlhf.ops.scores import group_moments, marked_down, normalised, overlong_penalty, shrunk
from megarlhf.trainers.ppo import PPOConfig


def rollout_of(terminated: list[bool], lengths: list[int] | None = None) -> Rollout:
    """Responses of so many tokens to a prompt of one."""
    own = torch.tensor(lengths or [1] * len(terminated)) + 1
    count, width = len(terminated), int(own.max())
    return Rollout(
        tokens=torch.ones(count, width, dtype=torch.int64),
        prompt_lengths=torch.ones(count, dtype=torch.int64),
        lengths=own,
        terminated=torch.tensor(terminated),
        sampler_logprobs=torch.zeros(count, width - 1),
        prompt_ids=torch.arange(count),
        answers=("",) * count,
    )


def shaper(*, group_size: int = 2, limit: int = 10, wrong_score: float = math.inf, **settings: Any) -> Shaper:
    return Shaper(ShapingConfig.model_validate({"missing_eos": None, **settings}), group_size, limit, wrong_score)


def shaped(scores: list[float], cut: int | None = None, **settings: Any) -> Tensor:
    terminated = [row != cut for row in range(len(scores))]
    return shaper(**settings).shape(torch.tensor(scores), rollout_of(terminated))


def test_nothing_is_done_that_is_not_asked_for() -> None:
    scores = torch.tensor([0.3, -7.0, 1e-30])
    assert torch.equal(shaped(scores.tolist(), cut=0), scores)


def test_each_step_by_hand() -> None:
    close = torch.testing.assert_close
    assert shaped([7.0, -7.0, 0.5, 9.0], clip=5.0).tolist() == [5.0, -5.0, 0.5, 5.0]
    # Two groups: (1, 3) has mean 2 and standard deviation sqrt(2), (5, 5) none.
    root = 1 / (math.sqrt(2) + 1e-6)
    close(shaped([1.0, 3.0, 5.0, 5.0], normalise="group"), torch.tensor([-root, root, 0.0, 0.0]))
    close(shaped([1.0, 3.0, 5.0, 7.0], normalise="batch"), torch.tensor([-3.0, -1.0, 1.0, 3.0]) / (math.sqrt(5) + 1e-6))
    close(shaped([2.0, -2.0, 0.0], positive=0.5, negative=0.1), torch.tensor([1.0, -0.2, 0.0]))
    assert shaped([1.0, 2.0, 3.0], cut=1, missing_eos=-1.0).tolist() == [1.0, -1.0, 3.0]
    # A limit of 10 and a buffer of 4: free up to 6, then a quarter a token.
    lengths = [1, 6, 7, 9, 10]
    given = shaper(overlong_buffer=4, overlong_penalty=2.0).shape(torch.ones(5), rollout_of([True] * 5, lengths))
    assert given.tolist() == [1.0, 1.0, 0.5, -0.5, -1.0]


def test_steps_are_taken_in_their_order() -> None:
    """Clipped first (9 is 4), then centred (mean 1, deviation 3), then shrunk, then marked down, then too long."""
    scores, rollout = torch.tensor([4.0, 9.0, -2.0, -2.0]), rollout_of([True, True, True, False], [1, 10, 1, 1])
    settings = {"clip": 4.0, "normalise": "batch", "positive": 0.5, "negative": 2.0, "missing_eos": -9.0}
    given = shaper(**settings, overlong_buffer=5).shape(scores, rollout)
    torch.testing.assert_close(given, torch.tensor([0.5, 0.5 - 1.0, -2.0, -9.0]), atol=1e-5, rtol=0)


SCORES = torch.tensor([1.3, 1.2, 1.4, -9.0])
WRONG = {
    "none": ({}, -0.75),
    "clip": ({"clip": 0.5}, -0.5),
    "batch": ({"normalise": "batch"}, float((-0.75 - SCORES.mean()) / SCORES.std(correction=0))),
    "running": ({"normalise": "running"}, float((-0.75 - SCORES.mean()) / SCORES.std(correction=0))),
    "shrunk": ({"positive": 0.1, "negative": 3.0}, -2.25),
}
"""What a wrong response, of -0.75, gets in the end."""


@pytest.mark.parametrize("name", WRONG)
def test_being_cut_pays_what_being_wrong_pays_whatever_is_done_to_scores_before(name: str) -> None:
    """Of two that were cut, one scores above wrong ones; the two that ended are right."""
    settings, wrong = WRONG[name]
    rollout = rollout_of([True, True, False, False])
    given = shaper(wrong_score=-0.75, **settings).shape(SCORES, rollout)
    auto = shaper(wrong_score=-0.75, missing_eos="auto", **settings).shape(SCORES, rollout)
    assert auto[[0, 1, 3]].tolist() == given[[0, 1, 3]].tolist()
    assert float(auto[2]) == pytest.approx(wrong, abs=1e-5)
    assert auto[2] < auto[:2].min()


def test_auto_moves_with_the_scores() -> None:
    generator = torch.Generator().manual_seed(1)
    scores, right = torch.randn(64, generator=generator), torch.rand(64, generator=generator) < 0.3
    terminated = torch.rand(64, generator=generator) < 0.7
    scores[right] += 3.0
    wrong = float(scores[~right].mean())
    given = marked_down(scores, terminated, "auto", wrong)
    assert torch.equal(given[terminated], scores[terminated])
    assert given[~terminated].max() <= min(wrong, float(scores[terminated].min()))
    assert given[~terminated].max() < given[terminated & ~right].mean() - 1  # -1 itself would be higher
    for offset, scale in ((5.0, 1.0), (-20.0, 1.0), (0.0, 7.0), (3.0, 0.1)):
        moved = marked_down(scores * scale + offset, terminated, "auto", wrong * scale + offset)
        torch.testing.assert_close(moved, given * scale + offset, rtol=0, atol=1e-5)
    # Nothing ended and nothing is known: there is nothing to hold them against.
    assert torch.equal(marked_down(scores, torch.zeros(64).bool(), "auto", math.inf), scores)


def test_running_moments_are_those_of_all_scores_and_survive_a_stop() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [1e3 + torch.randn(count, generator=generator) for count in (1, 7, 64, 2)]
    moments, seen = RunningMoments(), torch.zeros(0)
    for batch in batches:
        moments.add(batch)
        seen = torch.cat([seen, batch])
        again = RunningMoments()
        again.load_state(json.loads(json.dumps(moments.state())))
        assert again == moments
        assert moments.mean == pytest.approx(float(seen.double().mean()), rel=1e-12)
        assert moments.std == pytest.approx(float(seen.double().std(correction=0)), rel=1e-6, abs=1e-12)
    running = shaper(normalise="running")
    assert list(running.parts) == ["scores"]
    assert not shaper(normalise="batch").parts
    running.shape(batches[1], rollout_of([True] * 7))
    second = running.shape(batches[2], rollout_of([True] * 64))
    both = torch.cat(batches[1:3])
    torch.testing.assert_close(
        second, normalised(batches[2], float(both.mean()), float(both.std(correction=0))), atol=1e-3, rtol=0
    )
    good = running.moments.state()
    for bad in ({"position": 1}, {**good, "mean": 2**64}, {**good, "squares": 0x7FF0 << 48}, {"count": 1, "mean": 0}):
        with pytest.raises(CheckpointError, match="moments of scores are damaged"):
            running.moments.load_state(bad)


@pytest.mark.parametrize("score", [0.1, 11.0000019, 99.99, -3e7])
@pytest.mark.parametrize("size", [2, 3, 5, 6, 12])
def test_equal_scores_become_nothing(score: float, size: int) -> None:
    """Their mean is a rounding away from them in fp32, and 1e-6 would make much of that."""
    for normalise in ("group", "batch", "running"):
        assert shaped([score] * size, group_size=size, normalise=normalise).abs().max() < 1e-6


def test_where_scores_have_no_spread_a_cut_response_gets_what_those_that_ended_get() -> None:
    """Not the million that a wrong score would be away from them."""
    for normalise in ("group", "batch", "running"):
        given = shaped([1.0] * 4, cut=2, group_size=4, wrong_score=0.0, normalise=normalise, missing_eos="auto")
        assert given.tolist() == [0.0] * 4


def test_nobody_knows_what_wrong_responses_get_still_when_good_ones_are_worth_nothing() -> None:
    assert shaped([1.0, 2.0], cut=1, positive=0.0, missing_eos="auto").tolist() == [0.0, 0.0]


def test_a_score_that_is_not_finite_is_not_remembered() -> None:
    moments = RunningMoments()
    for batch in ([1.0, math.nan, 3.0], [math.inf], [5.0]):
        moments.add(torch.tensor(batch))
    assert (moments.count, moments.mean, moments.squares) == (3, 3.0, pytest.approx(8.0))


def test_bounds_of_the_formulas() -> None:
    assert overlong_penalty(torch.tensor([100]), limit=10, buffer=10).tolist() == [-1.0]
    for buffer in (0, 11):
        with pytest.raises(ValueError, match="must be within 1 and the limit"):
            overlong_penalty(torch.ones(1), limit=10, buffer=buffer)
    for size in (1, 3):
        with pytest.raises(ValueError, match="must be at least 2 and divide them"):
            group_moments(torch.ones(4), size)
    assert shrunk(torch.tensor([0.0]), positive=2.0, negative=3.0).tolist() == [0.0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shaping": {"normalise": "group"}}, "shaping.normalise=group with group_size=1"),
        ({"shaping": {"overlong_buffer": 600}}, "shaping.overlong_buffer=600 is more than sampling.max_new_tokens=512"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], says: str) -> None:
    cfg = PPOConfig.model_validate({"run_dir": Path("run"), "reward": {"init": "x"}, **settings})
    with pytest.raises(ConfigError) as error:
        cfg.check_sizes()
    assert str(error.value).startswith(says)
