"""A vocabulary split over ranks: which columns a rank has, and how the ranks' statistics become one."""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

NO_LOGIT = -1e30
"""Stands for "no such column". Finite, because -inf * 0 is NaN."""


class Shard(TypedDict, total=False):
    """This rank's columns of the vocabulary. Left out: there is one rank, and no padding."""

    vocab_start: int
    """Global index of the first local column."""
    vocab_size: int | None
    """Columns of the whole vocabulary; local columns from there on are padding."""
    group: dist.ProcessGroup | None
    """The ranks that hold the other columns."""


def live_columns(width: int, shard: Shard) -> int:
    """How many of `width` local columns are not padding."""
    size = shard.get("vocab_size")
    return width if size is None else max(0, min(width, size - shard.get("vocab_start", 0)))


def gather_shards(statistics: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Statistics [K, N] of every rank, in rank order: [R, K, N].

    Every rank merges the same numbers in the same order, so all get bitwise the same result.
    """
    if group is None or dist.get_world_size(group) == 1 or not statistics.numel():
        return statistics[None]
    shards = [torch.empty_like(statistics) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, statistics, group=group)
    return torch.stack(shards)


def sum_shards(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`tensor` summed over the ranks of `group`, in place."""
    if group is not None and dist.get_world_size(group) > 1 and tensor.numel():
        dist.all_reduce(tensor, group=group)
    return tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Log-probs and gradients are computed in fp32, or in fp64 when the input is."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
