from __future__ import annotations

import json

import pytest

from megarlhf.data.loader import Loader
from megarlhf.errors import CheckpointError, ConfigError


def take(loader: Loader, batches: int) -> list[list[int]]:
    return [next(loader).tolist() for _ in range(batches)]


def test_every_row_once_an_epoch_across_the_seam() -> None:
    # 10 rows in batches of 4: epochs end inside batches, and no row may be lost or doubled there.
    flat = sum(take(Loader(10, 4, seed=3), 15), [])
    epochs = [flat[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_seed_decides_the_order() -> None:
    assert take(Loader(50, 10, seed=1), 7) == take(Loader(50, 10, seed=1), 7)
    assert take(Loader(50, 10, seed=1), 5) != take(Loader(50, 10, seed=2), 5)


def test_order_does_not_depend_on_the_batch() -> None:
    assert sum(take(Loader(12, 2, seed=1), 12), []) == sum(take(Loader(12, 6, seed=1), 4), [])


@pytest.mark.parametrize("done", [0, 1, 4, 5, 13])
def test_resumed_equals_uninterrupted(done: int) -> None:
    whole = take(Loader(21, 4, seed=9), 25)
    loader = Loader(21, 4, seed=9)
    take(loader, done)
    state = json.loads(json.dumps(loader.state()))
    resumed = Loader(21, 4, seed=9)
    take(resumed, 3)
    resumed.load_state(state)
    assert resumed.epoch == done * 4 // 21
    assert take(resumed, 25 - done) == whole[done:]


def test_resume_with_another_batch_goes_on_at_the_same_row() -> None:
    loader = Loader(20, 4, seed=9)
    flat = sum(take(loader, 10), [])
    first = Loader(20, 4, seed=9)
    take(first, 5)
    second = Loader(20, 10, seed=9)
    second.load_state(first.state())
    assert sum(take(second, 2), []) == flat[20:]


def test_state_of_other_data_is_refused() -> None:
    state = Loader(20, 4, seed=9).state()
    with pytest.raises(CheckpointError, match="rows=20, this run has rows=21"):
        Loader(21, 4, seed=9).load_state(state)
    with pytest.raises(CheckpointError, match="seed=9, this run has seed=8"):
        Loader(20, 4, seed=8).load_state(state)


@pytest.mark.parametrize("batch", [0, 21])
def test_batch_must_fit_the_rows(batch: int) -> None:
    with pytest.raises(ConfigError, match="20 rows; use 1 to 20"):
        Loader(20, batch, seed=0)
