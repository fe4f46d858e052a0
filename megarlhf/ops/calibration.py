"""How far probabilities can be taken at their word."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 10
"""Of equal width, from 0 to 1."""


class Calibration(NamedTuple):
    """What came of events of which it was said how probable they are, bin by bin: [bins] each, 0 where a bin is empty.

    Fractions of one.
    """

    weight: Tensor
    """Of the bin in all."""
    said: Tensor
    """The mean probability in the bin."""
    found: Tensor
    """The share of events in it that came true."""

    @property
    def error(self) -> float:
        """The expected calibration error, sum over the bins of weight * |found - said|."""
        return float((self.weight * (self.found - self.said).abs()).sum())


def calibration(probabilities: Tensor, came: Tensor, weight: Tensor | None = None, *, bins: int = BINS) -> Calibration:
    """Of N events.

        bin b holds the probabilities from b / bins up to (b + 1) / bins, the last of them 1 too

    Shapes:   probabilities [N] in 0..1, of any float dtype; came [N], 1 where it came true, 0 where it did not, or what
              is known of that between them; weight [N], what events weigh, 1 where None. Computed in fp64.
    Raises:   ValueError if shapes differ or there are none.
    Source:   Guo et al. 2017 (arXiv 1706.04599), eq. 3, for the probability of one class.
    """
    if probabilities.shape != came.shape or not len(came):
        got = f"{list(probabilities.shape)} probabilities, {list(came.shape)} outcomes"
        raise ValueError(f"{got}; they must be as many, and at least one.")
    said, found = probabilities.double(), came.double()
    of = torch.ones_like(said) if weight is None else weight.double()
    bin_of = (said * bins).long().clamp(max=bins - 1)
    count, sum_said, sum_found = (
        said.new_zeros(bins).index_add_(0, bin_of, values) for values in (of, of * said, of * found)
    )
    filled = torch.where(count > 0, count, 1.0)
    return Calibration(count / of.sum(), sum_said / filled, sum_found / filled)
