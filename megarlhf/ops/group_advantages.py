"""Advantages without a critic: a response against the others to its prompt. Scores [B] in, advantages [B] out, pure.

Those to one prompt are adjacent. A group of equal scores has advantages of exactly 0: it moves nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megarlhf.ops.scores import group_moments, normalised


class GroupStd(NamedTuple):
    """What a group's advantages are divided by: its standard deviation + eps."""

    correction: int
    """0 divides the squares by the responses, 1 by one less. Peers differ: a factor of 1.07 at 8 responses."""
    eps: float


def group_advantages(scores: Tensor, group_size: int, std: GroupStd | None) -> Tensor:
    """(score - mean of its group) / (std of its group + eps), or without `std` the difference alone.

    Shapes:   scores [B] fp32. Returns [B].
    Raises:   ValueError if groups have one row, or do not divide B.
    Source:   GRPO (arXiv 2402.03300), section 4.1.2; without std Dr.GRPO (2503.20783), which finds that the division
              favours prompts on which all responses are alike.
    """
    if std is None:
        mean, _ = group_moments(scores, group_size)
        return (scores.double() - mean).to(scores.dtype)
    mean, spread = group_moments(scores, group_size, correction=std.correction)
    return normalised(scores, mean, spread, eps=std.eps)


def leave_one_out(scores: Tensor, group_size: int) -> Tensor:
    """score - mean of the others in its group, which is group_size / (group_size - 1) (score - mean of its group).

    Shapes and errors as in `group_advantages`. Source: RLOO (arXiv 2402.14740), eq. 10.
    """
    return group_advantages(scores, group_size, None) * (group_size / (group_size - 1))


def others_per_token(rewards: Tensor, lengths: Tensor, group_size: int) -> Tensor:
    """What the other responses of a group earned a token: the sum of their rewards / the sum of their tokens.

        b_i = sum over j != i of R_j / sum over j != i of n_j

    Shapes:   rewards [B] fp32, those to one prompt adjacent; lengths [B] int64, response tokens. Returns [B] fp32.
    Raises:   ValueError if groups have one row, or do not divide B.
    Source:   PURE (arXiv 2504.15275; reward_baseline=token in its code, with the reasons in its README): a mean a step
              in its place favours answers of few, long steps.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"group_size: {group_size} for {len(rewards)} rewards; must be at least 2 and divide them.")
    groups, tokens = rewards.double().view(-1, group_size), lengths.view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (tokens.sum(1, keepdim=True) - tokens)
    return others.flatten().to(rewards.dtype)


def equal_groups(scores: Tensor, group_size: int) -> Tensor:
    """[B / group_size] bool: groups whose scores are all the same, from which nothing is learnt."""
    groups = scores.view(-1, group_size)
    return groups.amax(1) == groups.amin(1)


def to_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: each response's advantage at its tokens, exactly 0 elsewhere. advantages [B]; mask [B, T] bool."""
    return torch.where(mask, advantages[:, None], 0.0)
