"""How far probabilities can be taken at their word."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

BINS = 10
"""Of equal width, from 0 to 1."""


class Calibration(NamedTuple):
    """What came of events of which it was said how probable they are, bin by bin: [BINS] each, 0 where a bin is empty.

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


def calibration(probabilities: Tensor, came: Tensor) -> Calibration:
    """Of N events.

        bin b holds the probabilities from b / BINS up to (b + 1) / BINS, the last of them 1 too

    Shapes:   probabilities [N] in 0..1, of any float dtype; came [N], 1 where it came true, 0 where it did not, or what
              is known of that between them. Computed in fp64.
    Raises:   ValueError if shapes differ or there are none.
    Source:   Guo et al. 2017 (arXiv 1706.04599), eq. 3, for the probability of one class.
    """
    if probabilities.shape != came.shape or not len(came):
        got = f"{list(probabilities.shape)} probabilities, {list(came.shape)} outcomes"
        raise ValueError(f"{got}; they must be as many, and at least one.")
    said, found = probabilities.double(), came.double()
    bins = (said * BINS).long().clamp(max=BINS - 1)
    count, sum_said, sum_found = (said.new_zeros(BINS) for _ in range(3))
    count.index_add_(0, bins, said.new_ones(len(said)))
    sum_said.index_add_(0, bins, said)
    sum_found.index_add_(0, bins, found)
    filled = count.clamp(min=1)
    return Calibration(count / len(said), sum_said / filled, sum_found / filled)
