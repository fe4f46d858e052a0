"""Where scores and penalties land."""

from __future__ import annotations

import math

import pytest
import torch

from megarlhf.ops.rewards import add_kl_penalty, where_earned


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


def test_what_was_earned_before_the_last_token_stays_there():
    """By hand: 5 became of 1 + 2 + 4, so that the last token, which said 4, gets 5 - 3."""
    mask = torch.tensor([[False, True, True, True, False], [True, True, False, False, False]])
    said = torch.tensor([[9.0, 1.0, 2.0, 4.0, math.nan], [0.0, 0.3, 9.0, 9.0, 9.0]])
    earned = where_earned(torch.tensor([5.0, 0.7]), said, mask)
    assert earned.earlier is not None
    assert earned.earlier.tolist() == [[0.0, 1.0, 2.0, 0.0, 0.0], [0.0] * 5]
    assert torch.equal(earned.last, torch.tensor([2.0, 0.7]))  # of one step: all of it, to the bit
    rewards = add_kl_penalty(earned.last, torch.ones(2, 5), mask, kl_coef=0.5, earlier=earned.earlier)
    assert rewards[0].tolist() == [0.0, 0.5, 1.5, 1.5, 0.0]
    with pytest.raises(ValueError, match=r"scores: got \[3\], token_scores are \[2, 5\]; one a row"):
        where_earned(torch.zeros(3), said, mask)


def test_empty_batch_and_errors():
    assert add_kl_penalty(torch.zeros(0), torch.zeros(0, 4), torch.zeros(0, 4).bool(), kl_coef=1.0).shape == (0, 4)
    with pytest.raises(ValueError, match=r"scores: got \[2\], kl is \[3, 4\]"):
        add_kl_penalty(torch.zeros(2), torch.zeros(3, 4), torch.zeros(3, 4).bool(), kl_coef=1.0)
    with pytest.raises(ValueError, match=r"kl: got \[3, 5\], mask is \[3, 4\]"):
        add_kl_penalty(torch.zeros(3), torch.zeros(3, 5), torch.zeros(3, 4).bool(), kl_coef=1.0)
