"""Which rows go together: pure functions of numbers that every rank has, so that every rank decides alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]
"""[n]: rows of a batch."""


def dealt(costs: Sequence[int], hands: int) -> list[Index]:
    """Rows for each of `hands` data ranks: equally many, or one more for some, and nearly equal sums of `costs`.

    Rows of like cost are dealt together, one to each hand, the dearest of them to the hand that has least. So two hands
    differ by no more than the rows of one such deal do; where the last is too small for all, by no more than its rows.

    Shapes:   returns `hands` arrays, together every row once; ascending within each.
    """
    order = np.argsort(-np.asarray(costs, dtype=np.int64), kind="stable")
    rows: list[list[int]] = [[] for _ in range(hands)]
    sums = [0] * hands
    for first in range(0, len(order), hands):
        together = _numbers(order[first : first + hands])
        least_first = sorted(range(hands), key=sums.__getitem__)
        for hand, row in zip(least_first, together, strict=False):
            rows[hand].append(row)
            sums[hand] += costs[row]
    return [np.array(sorted(each), dtype=np.int64) for each in rows]


def first_fit(lengths: Index, budget: int) -> list[Index]:
    """Packs of rows of at most `budget` tokens together: longest first, each into the first pack that has room.

    Shapes:   lengths [rows]. Returns packs, together every row once; the rows of a pack from long to short.
    Raises:   ValueError where a row exceeds the budget.
    Source:   Johnson 1974: at most 11/9 of the fewest packs there could be, and 6/9 of one.
    """
    if len(lengths) and lengths.max() > budget:
        raise ValueError(
            f"a row has {lengths.max()} tokens, but micro_batch_tokens={budget}; raise it to {lengths.max()} or more."
        )
    packs: list[list[int]] = []
    room = np.full(len(lengths), budget, dtype=np.int64)  # of each pack that may come to be
    for row in _numbers(np.argsort(-lengths, kind="stable")):
        pack = int(np.argmax(room >= lengths[row]))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(row)
        room[pack] -= lengths[row]
    return [np.array(pack, dtype=np.int64) for pack in packs]


def in_multiples(packs: list[Index], multiple: int) -> list[Index]:
    """As many packs as a `multiple` of packs, by halving those of most rows.

    Raises:   ValueError where there are too few rows.
    """
    packs = list(packs)
    while len(packs) % multiple:
        largest = max(range(len(packs)), key=lambda pack: len(packs[pack]))
        pack = packs[largest]
        if len(pack) < 2:
            rows = sum(map(len, packs))
            raise ValueError(f"{rows} rows do not make a multiple of {multiple} packs, one or more rows each.")
        packs[largest : largest + 1] = [pack[0::2], pack[1::2]]
    return packs


def _numbers(rows: Index) -> list[int]:
    return cast(list[int], rows.tolist())
