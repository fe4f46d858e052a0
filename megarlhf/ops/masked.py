"""Sums and moments over the True entries of a mask. Sums run in fp64: the tensors are small, so precision is free.

Masked entries may hold anything, NaN and inf included: they are replaced before the arithmetic, never multiplied by 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask` is True; 0 where it never is.

    Shapes:   x any shape; mask bool, the same shape. Returns a scalar of x's dtype, summed in fp64.
    Raises:   ValueError if shapes differ or mask is not bool.
    """
    return _sum(x, mask).to(x.dtype)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is True; 0 where it never is.

    Shapes:   x any shape; mask bool, the same shape. Returns a scalar of x's dtype.
    Raises:   ValueError if shapes differ or mask is not bool.
    """
    return _mean(x, mask).to(x.dtype)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Biased variance of `x` where `mask` is True (divides by the count); 0 where it never is.

    Shapes:   x any shape; mask bool, the same shape. Returns a scalar of x's dtype.
    Raises:   ValueError if shapes differ or mask is not bool.
    """
    return _var(x, mask, _mean(x, mask)).to(x.dtype)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Variance 1 over the True entries, and mean 0 (or, without `shift_mean`, the mean it had).

        (x - mean) / sqrt(var + eps)   [+ mean]

    Shapes:   x any shape; mask bool, the same shape. Returns x's shape and dtype; masked outputs are exactly 0.
    Ranks:    none (pure): pass the global batch, for a mean over a part of it is another mean.
    Raises:   ValueError if shapes differ or mask is not bool.
    Source:   Huang et al. 2024, detail "whiten": biased variance, eps inside the root.
    """
    mean = _mean(x, mask)
    # Two passes: E[x^2] - E[x]^2 cancels when the mean is large against the spread.
    whitened = (x.double() - mean) * torch.rsqrt(_var(x, mask, mean) + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened.to(x.dtype), 0.0)


def last_true(mask: Tensor) -> Tensor:
    """True at the last True of each row, and nowhere in a row without one.

    Shapes:   mask [B, T] bool. Returns [B, T] bool.
    """
    from_the_end = mask.flip(1).cumsum(1).flip(1)
    return mask & (from_the_end == 1)


def check_mask(mask: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless `mask` is bool and every named tensor has its shape."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask: got {mask.dtype}; must be torch.bool, True counts.")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name}: got {list(tensor.shape)}, mask is {list(mask.shape)}; must be equal.")


def _sum(x: Tensor, mask: Tensor) -> Tensor:
    check_mask(mask, x=x)
    return torch.where(mask, x, 0.0).sum(dtype=torch.float64)


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return _sum(x, mask) / mask.sum().clamp(min=1)


def _var(x: Tensor, mask: Tensor, mean: Tensor) -> Tensor:
    return _mean((x.double() - mean) ** 2, mask)
