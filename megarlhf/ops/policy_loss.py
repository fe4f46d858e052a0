"""What the policy losses of algorithms have beside the kernel's: the ratio of whole responses."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_logprobs(new_logprobs: Tensor, logprobs: Tensor, row: Tensor, rows: int) -> Tensor:
    """Old log-probs from which each token's ratio is that of its response, with the gradient that belongs to it.

        s = exp(mean over t of (new_t - old_t))        returned: new_t - log s, so that exp(new_t - returned_t) = s

    The surrogate's gradient is then A s d new_t in each token, and a mean over the tokens of a response makes it that
    of A s, GSPO's ratio.

    Shapes:   new_logprobs, logprobs [n] fp32, without gradient; row [n] int64: whose token each is, of `rows`.
              Returns [n].
    Source:   GSPO (arXiv 2507.18071), eq. 6 and 14.
    """
    gap = (new_logprobs - logprobs).double()
    sums = torch.zeros(2, rows, dtype=torch.float64, device=gap.device)
    sums.index_add_(1, row, torch.stack([gap, torch.ones_like(gap)]))
    mean = sums[0] / sums[1].clamp(min=1)
    return new_logprobs - mean[row].to(new_logprobs.dtype)
