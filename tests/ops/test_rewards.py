"""Where scores and penalties land."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf.ops.rewards import add_kl_penalty, shape_scores


def test_score_once_at_the_last_response_token_and_kl_everywhere():
    generator = torch.Generator().manual_seed(0)
    kl = torch.randn(5, 8, generator=generator)
    scores = torch.randn(5, generator=generator)
    mask = torch.zeros(5, 8, dtype=torch.bool)
    spans = [(2, 5), (0, 8), (7, 8), (3, 4), (4, 4)]  # the last row has no response
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = True
    rewards = add_kl_penalty(scores, torch.where(mask, kl, math.nan), mask, kl_coef=0.3)
    for row, (start, stop) in enumerate(spans):
        expected = [-0.3 * kl[row, t].item() if start <= t < stop else 0.0 for t in range(8)]
        if start < stop:
            expected[stop - 1] += scores[row].item()
        assert rewards[row].tolist() == pytest.approx(expected, abs=1e-7)
    assert rewards[~mask].abs().max() == 0.0


def test_equal_policies_leave_the_score_alone():
    mask = torch.tensor([[False, True, True]])
    rewards = add_kl_penalty(torch.tensor([2.5]), torch.zeros(1, 3), mask, kl_coef=0.05)
    assert rewards.tolist() == [[0.0, 0.0, 2.5]]


def test_shape_scores_clips_then_marks_unfinished_responses():
    scores, terminated = torch.tensor([7.0, -7.0, 0.5, 9.0]), torch.tensor([True, True, True, False])
    assert shape_scores(scores, terminated, missing_eos_score=-1.0, clip=5.0).tolist() == [5.0, -5.0, 0.5, -1.0]
    assert torch.equal(shape_scores(scores, terminated), scores)
    with pytest.raises(ValueError, match="clip: 0"):
        shape_scores(scores, terminated, clip=0.0)


def test_being_cut_never_pays_more_than_being_wrong():
    """Whatever offset and scale the reward model's scores have: the rule moves with them."""
    generator = torch.Generator().manual_seed(1)
    scores, right = torch.randn(64, generator=generator), torch.rand(64, generator=generator) < 0.3
    terminated = torch.rand(64, generator=generator) < 0.7
    scores[right] += 3.0
    wrong_score = float(scores[~right].mean())
    shaped = shape_scores(scores, terminated, missing_eos_score="auto", wrong_score=wrong_score)
    assert torch.equal(shaped[terminated], scores[terminated])
    assert shaped[~terminated].max() <= min(wrong_score, float(scores[terminated].min()))
    assert shaped[~terminated].max() < shaped[terminated & ~right].mean() - 1  # -1 itself would be higher
    for offset, scale in ((5.0, 1.0), (-20.0, 1.0), (0.0, 7.0), (3.0, 0.1)):
        moved = shape_scores(
            scores * scale + offset, terminated, missing_eos_score="auto", wrong_score=wrong_score * scale + offset
        )
        torch.testing.assert_close(moved, shaped * scale + offset, rtol=0, atol=1e-5)


def test_a_cut_response_among_right_ones_gets_what_a_wrong_one_would():
    scores, terminated = torch.tensor([1.3, 1.2, 1.4, -9.0]), torch.tensor([True, True, False, False])
    known = shape_scores(scores, terminated, missing_eos_score="auto", wrong_score=-0.75)
    assert known.tolist() == torch.tensor([1.3, 1.2, -0.75, -9.0]).tolist()
    unknown = shape_scores(scores, terminated, missing_eos_score="auto")
    assert unknown.tolist() == torch.tensor([1.3, 1.2, 1.2, -9.0]).tolist()
    # Nothing ended and nothing is known: there is nothing to hold them against.
    assert torch.equal(shape_scores(scores, torch.zeros(4).bool(), missing_eos_score="auto"), scores)
    clipped = shape_scores(scores, terminated, missing_eos_score="auto", wrong_score=-8.0, clip=1.0)
    assert clipped.tolist() == [1.0, 1.0, -1.0, -1.0]


def test_empty_batch_and_errors():
    assert add_kl_penalty(torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, 4).bool(), kl_coef=1.0).shape == (0, 4)
    with pytest.raises(ValueError, match=r"scores: got \[2\], kl is \[3, 4\]"):
        add_kl_penalty(torch.zeros(2), torch.zeros(3, 4), torch.zeros(3, 4).bool(), kl_coef=1.0)
    with pytest.raises(ValueError, match=r"kl: got \[3, 5\], mask is \[3, 4\]"):
        add_kl_penalty(torch.zeros(3), torch.zeros(3, 5), torch.zeros(3, 4).bool(), kl_coef=1.0)
