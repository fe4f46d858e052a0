"""Context parallelism: which tokens of a sequence a rank has, and how what ranks have apart is put together.

A sequence is cut into 2 c chunks of one length for c ranks, of which rank r has chunk r and chunk 2 c - 1 - r:

    c = 2      rank 0 [ 0     3 ]      rank 1 [   1 2   ]

Of causal attention the first chunk is the least work and the last the most: so every rank has as much. What is shorter
than 2 c equal chunks is filled up behind its end, where no token of it looks.

Everything but attention and the head takes its own tokens alone. Attention of local layers gathers keys and values;
Transformer Engine's passes them round. A head gets whole rows of states, as without context, and takes an equal part
of them on each rank: responses lie at the end of their rows, in the chunks of one rank.

Source:   the order is that of Megatron-Core and Transformer Engine (`get_batch_on_this_cp_rank`, `p2p`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megarlhf.parallel.packing import Index


def chunks(context: int) -> int:
    """Of what the length of a sequence must be a multiple, for so many context ranks."""
    return 2 * context if context > 1 else 1


def own_columns(lengths: Index, rank: int, context: int) -> Index:
    """Which tokens of texts that lie end to end a context rank has, text by text and in their order.

    Shapes:   lengths [texts], multiples of `chunks(context)`. Returns [sum of lengths / context].
    """
    if context == 1:
        return np.arange(lengths.sum())
    starts, sizes = np.cumsum(lengths) - lengths, lengths // (2 * context)
    firsts = np.stack([starts + rank * sizes, starts + (2 * context - 1 - rank) * sizes], axis=1).reshape(-1)
    each = np.repeat(sizes, 2)
    within = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each)
    return np.repeat(firsts, each) + within


@dataclass(frozen=True)
class Spread:
    """Where the states that are read lie: each on the one context rank that has its token.

    Shapes:   own [n_r] int64: which of the n states this rank has; columns [n_r]: in which of its own columns those
              are; place [n]: where each state is among those of all ranks, `most` of each end to end.
    """

    own: Index
    columns: Index
    place: Index
    most: int

    @classmethod
    def of(cls, columns: Index, lengths: Index, rank: int, context: int) -> Spread:
        """Of states at `columns` [n] of texts of these lengths."""
        holder, within = np.empty((2, int(lengths.sum())), dtype=np.int64)
        for other in range(context):
            theirs = own_columns(lengths, other, context)
            holder[theirs], within[theirs] = other, np.arange(len(theirs))
        holders = holder[columns]
        counts = np.bincount(holders, minlength=context)
        order = np.argsort(holders, kind="stable")
        nth = np.empty_like(holders)
        nth[order] = np.arange(len(holders)) - np.repeat(np.cumsum(counts) - counts, counts)
        own, most = (holders == rank).nonzero()[0], int(counts.max())
        return cls(own, within[columns[own]], holders * most + nth, most)


def whole_states(own: Tensor, place: Tensor, most: int, group: ProcessGroup) -> Tensor:
    """All states, of which each context rank has some. The gradient of each comes back to where it lies.

    Shapes:   own [n_r, H] of this rank, of at most `most`; place [n] as in `Spread`. Returns [n, H].
    Ranks:    collective over context; the gradients of all ranks are summed.
    """
    if not most:
        return own
    padded = torch.nn.functional.pad(own, (0, 0, 0, most - len(own)))
    return gather_from_sequence_parallel_region(padded, tensor_parallel_output_grad=True, group=group)[place]


def whole_sequence(own: Tensor, group: ProcessGroup) -> Tensor:
    """What all context ranks have of some texts, rank by rank. The gradients of all ranks are summed.

    Shapes:   own [s, ...]. Returns [c, s, ...].
    """
    every = gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=True, group=group)
    return every.view(group.size(), *own.shape)


def in_order(parts: Tensor) -> Tensor:
    """One text as it reads: parts [c, 2 h, ...] of each context rank -> [2 c h, ...]."""
    first, last = parts.unflatten(1, (2, -1)).unbind(1)
    return torch.cat([first, last.flip(0)]).flatten(0, 1)


@dataclass(frozen=True)
class HeadShare:
    """The rows of states that this context rank projects, of `count` that every one of them has.

    A loss is computed of the whole on each rank alike; each adds the gradient of its own rows to the head's weights.
    """

    count: int
    group: ProcessGroup

    @property
    def _each(self) -> int:
        return -(-self.count // self.group.size())

    @property
    def own(self) -> slice:
        """The last ranks may have fewer rows, or none."""
        first = self.group.rank() * self._each
        return slice(first, first + self._each)

    def whole(self, numbers: Tensor) -> Tensor:
        """Numbers [own rows] of each rank, as [count] on every one. Its gradient, the same on all, goes to the own."""
        if self.group.size() == 1 or not self.count:
            return numbers
        padded = torch.nn.functional.pad(numbers, (0, self._each - len(numbers)))
        every = gather_from_sequence_parallel_region(padded, tensor_parallel_output_grad=False, group=self.group)
        return every[: self.count]

    def total(self, sums: Tensor) -> Tensor:
        """Sums over the own rows, added up. Its gradient, the same on all, is that of each rank's sum."""
        return reduce_from_tensor_model_parallel_region(sums.clone(), group=self.group)  # it adds in place
