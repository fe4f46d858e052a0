"""From what judges say of whole responses to what is learnt from: scores [B] to scores [B]."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megarlhf.ops.masked import check_mask

EPS = 1e-6
"""Added to a standard deviation that is divided by. Source: verl, slime, ROLL."""


def normalised(scores: Tensor, mean: Tensor | float, std: Tensor | float, *, eps: float = EPS) -> Tensor:
    """(scores - mean) / (std + eps): a set of equal scores becomes 0.

    Shapes:   scores [B] fp32; mean and std numbers, or fp64 [B]. Returns [B] fp32.
    """
    # In fp64: the mean of equal numbers can be a rounding away from them, which 1e-6 would make a score of.
    return ((scores.double() - mean) / (std + eps)).to(scores.dtype)


def group_moments(scores: Tensor, group_size: int, *, correction: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (divided by group_size - correction) of the responses to each one's prompt.

    Shapes:   scores [B] fp32, those to one prompt adjacent. Returns (mean, std) [B] fp64.
    Raises:   ValueError if groups have one row, or do not divide B.
    """
    if group_size < 2 or len(scores) % group_size:
        raise ValueError(f"group_size: {group_size} for {len(scores)} scores; must be at least 2 and divide them.")
    groups = scores.double().view(-1, group_size)
    mean, std = groups.mean(1), groups.std(1, correction=correction)
    return mean.repeat_interleave(group_size), std.repeat_interleave(group_size)


def shrunk(scores: Tensor, *, positive: float, negative: float) -> Tensor:
    """positive * score where it is above 0, else negative * score.

    Shapes:   scores of any shape; returns it.
    Source:   arXiv 2412.06000 shrinks the two signs differently and does not say by how much.
    """
    return scores * torch.where(scores > 0, positive, negative)


def marked_down(
    scores: Tensor, terminated: Tensor, missing_eos: float | Literal["auto"] | None, wrong_score: float
) -> Tensor:
    """Scores in which those of responses without EOS are lowered (None: not at all).

    `auto` caps the score of a cut response at the lowest of `wrong_score`, the mean score of wrong responses where it
    is known, and the scores of this batch's responses that ended. So being cut never pays more than being wrong,
    whatever the offset and the scale of the scores are. A number replaces the score.

    Shapes:   scores [B] fp32; terminated [B] bool. Returns [B].
    Units:    reward.
    Raises:   ValueError if shapes differ or terminated is not bool.
    Source:   Huang et al. 2024, detail "EOS trick": a fixed -1, so that the policy learns to stop. Differs: -1 means
              something only where scores have been normalised, and even then it can lie above those of wrong responses.
    """
    check_mask(terminated, scores=scores)
    if missing_eos is None:
        return scores
    if missing_eos != "auto":
        return scores.masked_fill(~terminated, missing_eos)
    most = torch.cat([scores[terminated], scores.new_tensor([wrong_score])]).amin()
    return torch.where(terminated, scores, scores.minimum(most))


def overlong_penalty(lengths: Tensor, *, limit: int, buffer: int) -> Tensor:
    """What a response loses by nearing the limit: nothing before the last `buffer` tokens, then a line down to -1.

        0 where L <= limit - buffer, else max(-1, (limit - buffer - L) / buffer)

    Shapes:   lengths [B] int64, response tokens. Returns [B] fp32.
    Raises:   ValueError unless 0 < buffer <= limit.
    Source:   DAPO (arXiv 2503.14476), eq. 13: limit 20480, buffer 4096.
    """
    if not 0 < buffer <= limit:
        raise ValueError(f"buffer: {buffer}, limit {limit}; must be within 1 and the limit.")
    return ((limit - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)
