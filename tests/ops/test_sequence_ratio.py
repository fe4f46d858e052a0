"""GSPO's ratio: a response's geometric mean, with its gradient, through the same surrogate as a token's."""

from __future__ import annotations

import pytest
import torch

from megarlhf.ops.policy_loss import sequence_logprobs
from megarlhf_kernels import Clip
from tests.helpers.losses import clipped_policy_loss

ROW = torch.tensor([0, 0, 0, 1, 2, 2])
LENGTHS = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
ADVANTAGES = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def by_hand(new: torch.Tensor, old: torch.Tensor, clip: Clip) -> torch.Tensor:
    """The paper's: one ratio a response, one term a response."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        own = row == ROW
        ratio = (new[own] - old[own]).mean().exp()
        advantage = ADVANTAGES[row]
        total = total + torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip.low, 1 + clip.high))
    return total


@pytest.mark.parametrize("clip", [Clip(3e-4, 4e-4), Clip(0.2, 0.2), Clip(0.9, 50.0)])
def test_equals_the_paper_with_its_gradient(clip: Clip) -> None:
    generator = torch.Generator().manual_seed(2)
    old, noise = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    new = (old + 0.3 * noise).requires_grad_()
    moved = sequence_logprobs(new.detach(), old, ROW, 3)
    # The mean over a response's tokens is a weight on its advantage.
    loss, metrics = clipped_policy_loss(new, moved, ADVANTAGES[ROW] / LENGTHS[ROW], clip=clip)
    expected = by_hand(new, old, clip)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(x, new, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert (metrics["clip_fraction"] == 0) == (clip.high == 50.0)


def test_on_rows_just_scored_every_ratio_is_one_to_the_bit() -> None:
    old = torch.randn(6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sequence_logprobs(old, old, ROW, 3), old)


def test_one_token_is_its_own_response() -> None:
    new, old = torch.tensor([-1.0, -3.0]), torch.tensor([-1.5, -2.0])
    torch.testing.assert_close(sequence_logprobs(new, old, torch.tensor([0, 1]), 2), old)
