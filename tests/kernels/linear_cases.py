"""What the tests of `linear_logprob` and `linear_ppo` share: cases, oracles in fp64, and vocabularies cut in shards."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Inputs and upstream gradients; fp32, random."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    d_logprobs: Tensor
    d_entropy: Tensor


def a_case(count: int, vocab: int, width: int = 16, *, scale: float = 1.0, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(count, width, generator=generator),
        scale * torch.randn(vocab, width, generator=generator) / width**0.5,
        torch.randint(0, vocab, (count,), generator=generator),
        torch.randn(count, generator=generator),
        torch.randn(count, generator=generator),
    )


def leaves(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies of hidden and weight that want gradients."""
    return case.hidden.to(dtype, copy=True).requires_grad_(), case.weight.to(dtype, copy=True).requires_grad_()


def shard_of(weight: Tensor, rank: int, columns: int) -> Tensor:
    """Rows rank * columns.. of a vocabulary padded with rows whose logits would drown all others."""
    missing = max(0, (rank + 1) * columns - len(weight))
    return torch.nn.functional.pad(weight, (0, 0, 0, missing), value=1e4)[rank * columns : (rank + 1) * columns]


def worst(got, expected) -> float:
    """Largest absolute difference between two lists of tensors."""
    pairs = zip(got, expected, strict=True)
    return max((a.double() - b.double()).abs().max().item() if a.numel() else 0.0 for a, b in pairs)
