"""Where a solution goes wrong first: as a process reward model has it, and as its labels have it."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf.ops.masked import check_mask


def first_errors(values: Tensor, ends: Tensor) -> Tensor:
    """Where the first step stands whose value is below 1/2; -1 where none is.

    Shapes:   values [B, N] of any float dtype, the probability that a step is right, or its label; ends [B, N] bool:
              where a step's value stands. Returns [B] int64, an index along N.
    Raises:   ValueError if shapes differ or ends is not bool.
    Source:   ProcessBench (Zheng et al. 2024, arXiv 2412.06559), whose index of the first error counts steps.
    """
    check_mask(ends, values=values)
    wrong = ends & (values < 0.5)
    return torch.where(wrong.any(1), wrong.int().argmax(1), -1)


def labelled_up_to(ends: Tensor, labelled: Tensor, first: Tensor) -> Tensor:
    """Whether every step up to the first error has a label, or every step where there is no error.

    Shapes:   ends, labelled [B, N] bool: where steps end, and which of those have a label; first [B] int64, as
              `first_errors` of the labels returns it. Returns [B] bool.
    Raises:   ValueError if shapes differ or a mask is not bool.
    """
    check_mask(ends, labelled=labelled)
    place = torch.arange(ends.shape[1], device=ends.device)
    counts = (first[:, None] < 0) | (place <= first[:, None])
    return ~(ends & ~labelled & counts).any(1)


def harmonic(first: float, second: float) -> float:
    """2 a b / (a + b) of two shares; 0 where both are 0.

    Source:   ProcessBench's F1, of the share of wrong solutions whose first error is found, and of the share of
              correct ones in which none is.
    """
    return 2 * first * second / (first + second) if first + second else 0.0
