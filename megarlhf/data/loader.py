"""Which rows come next: shuffled, resumable, and the same for every layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from megarlhf.errors import CheckpointError, ConfigError


class Loader(Iterator[Tensor]):
    """An endless stream of global batches of row indices, the same on every rank.

    Epochs follow each other without a seam, each a permutation drawn from (seed, epoch): every row is seen once an
    epoch, and a batch may end one epoch and begin the next.

    Shapes:   yields int64 [batch], indices in 0..rows-1.
    Ranks:    none: every rank holds an equal one.
    Raises:   ConfigError if the batch is larger than the rows.
    """

    def __init__(self, rows: int, batch: int, *, seed: int) -> None:
        """Begin at the first row of epoch 0."""
        if not 1 <= batch <= rows:
            raise ConfigError(f"batch does not fit the data: batch {batch}, {rows} rows; use 1 to {rows}.")
        self.rows, self.batch, self.seed = rows, batch, seed
        self._position = 0
        self._epoch, self._order = 0, self._permutation(0)

    @property
    def epoch(self) -> int:
        """Epoch of the next row, from 0."""
        return self._position // self.rows

    def __next__(self) -> Tensor:
        """The next global batch."""
        return self.take(self.batch)

    def take(self, count: int) -> Tensor:
        """The next `count` rows, whatever the batch: int64 [count]."""
        parts, wanted = [], count
        while wanted:
            epoch, start = divmod(self._position, self.rows)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._permutation(epoch)
            parts.append(self._order[start : start + wanted])
            wanted -= len(parts[-1])
            self._position += len(parts[-1])
        return torch.cat(parts)

    def state(self) -> dict[str, int]:
        """Everything needed to go on from here, whatever the batch then."""
        return {"rows": self.rows, "seed": self.seed, "position": self._position}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from `state`.

        Raises:   CheckpointError if it was saved over other data or another seed.
        """
        if missing := sorted(self.state().keys() - state.keys()):
            raise CheckpointError(f"loader state has no {', '.join(missing)}; resume from another state.")
        for name, mine in (("rows", self.rows), ("seed", self.seed)):
            if state[name] != mine:
                raise CheckpointError(
                    f"loader state does not fit the data: it was saved with {name}={state[name]}, this run has "
                    f"{name}={mine}; resume with the same data and seed, or start afresh."
                )
        self._position = state["position"]

    def _permutation(self, epoch: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng([self.seed, epoch]).permutation(self.rows))
