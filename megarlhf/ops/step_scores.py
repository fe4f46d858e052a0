"""From what the steps of a response are worth to what the response is worth."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from megarlhf.ops.masked import check_mask, last_true

Aggregate = Literal["min", "product", "mean", "last"]
"""Source: min Math-Shepherd (arXiv 2312.08935); product Lightman et al. 2023 (2305.20050); mean RLHFlow; last is what
an outcome model does."""


def soft_min(values: Tensor, ends: Tensor, *, temperature: float) -> Tensor:
    """Each step's value, weighed so that the weighted values add up to about the least of them.

        value_k softmax(-value / temperature)_k

    Shapes:   values [B, N] fp32; ends [B, N] bool: where a step's value stands. Returns [B, N], 0 elsewhere.
    Raises:   ValueError if shapes differ or ends is not bool.
    Source:   PURE (arXiv 2504.15275), whose README has temperature 0.1, of rewards in -1..1.
    """
    check_mask(ends, values=values)
    weights = torch.where(ends, -values / temperature, -torch.inf).softmax(1)
    return torch.where(ends, values * weights, 0.0)


def aggregated(values: Tensor, ends: Tensor, how: Aggregate) -> Tensor:
    """The least of the steps' values, their product, their mean, or the last.

    Shapes:   values [B, N] of any float dtype; ends [B, N] bool: where a step's value stands. Returns [B].
    Raises:   ValueError if shapes differ, ends is not bool, or a row has no step.
    """
    check_mask(ends, values=values)
    if not bool(ends.any(1).all()):
        raise ValueError(f"ends: row {int((~ends.any(1)).nonzero()[0])} has no step; every response has at least one.")
    match how:
        case "min":
            return torch.where(ends, values, torch.inf).amin(1)
        case "product":
            return torch.where(ends, values, 1.0).prod(1)
        case "mean":
            return torch.where(ends, values, 0.0).sum(1) / ends.sum(1)
        case "last":
            return torch.where(last_true(ends), values, 0.0).sum(1)
