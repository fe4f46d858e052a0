"""A discounted sum from the right, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 32


def reverse_scan(b: Tensor, decay: float) -> Tensor:
    """x_t = b_t + decay x_{t+1} along the rows of b [S, T].

    Inside a block of 32 it is a product with a triangle of powers. The first x of every block are a shorter scan, with
    decay^32, whose results enter each block from the right.
    """
    rows, width = b.shape
    block = width if width <= 2 * _BLOCK else _BLOCK
    powers = torch.tensor([decay**k for k in range(block, 0, -1)], dtype=b.dtype, device=b.device)
    # Row s holds decay^(s - t): the powers shifted by one a row, which is one stride less a row.
    shifted = torch.cat([powers[1:], powers.new_ones(1), powers.new_zeros(block - 1)]) if block else powers
    triangle = shifted.unfold(0, block, 1).flip(0) if block else shifted.view(0, 0)
    if block == width:
        return b @ triangle
    x = torch.nn.functional.pad(b, (0, -width % block)) if width % block else b
    x = (x.reshape(-1, block) @ triangle).view(rows, -1, block)
    x[:, :-1].addcmul_(reverse_scan(x[:, :, 0], decay**block)[:, 1:, None], powers)
    return x.view(rows, -1)[:, :width]
