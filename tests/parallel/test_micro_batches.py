"""Whatever way a batch is cut, every position that is to be read is read once, and its number comes back to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megarlhf.batch.supervised import PreferencePairs, TokenBatch
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.micro_batches import Shapes, States, split

LENGTHS = torch.tensor([3, 9, 5, 9, 2, 7])


def shapes(micro_batch: int, **layout: Any) -> Shapes:
    return Shapes(micro_batch, ParallelLayout(**layout), fp8=False, device=torch.device("cpu"))


def some_rows() -> tuple[TokenBatch, torch.Tensor]:
    """Row i holds 100 i + t; supervised are its labels from 1 on, so that states from token 1 to the last but one."""
    places = torch.arange(12)
    tokens = 100 * torch.arange(6)[:, None] + places
    mask = (places[1:] >= 2) & (places[1:] < LENGTHS[:, None])
    return TokenBatch(tokens, LENGTHS, mask), torch.nn.functional.pad(mask, (0, 1))


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 6, 7])
def test_every_named_position_is_read_once_and_comes_back_to_its_place(micro_batch: int) -> None:
    batch, at = some_rows()
    result = torch.zeros(at.shape)
    read = 0
    for part in split(batch, at, shapes(micro_batch), may_repeat=False):
        assert len(part.rows) <= micro_batch
        states = part.states(part.inputs[..., None].float())  # a model whose states are its inputs
        labels = states.of(part.rows.labels)
        assert torch.equal(states.hidden[:, 0] + 1, labels.float())
        assert states.count == len(labels) == int(part.read.sum())
        part.place(states.hidden[:, 0], result)
        read += states.count
    assert read == int(at.sum())
    assert torch.equal(result, torch.where(at, batch.tokens.float(), 0.0))


def test_neighbours_are_alike_and_nothing_after_the_last_read_position_is_computed() -> None:
    batch, at = some_rows()
    parts = split(batch, at, shapes(2), may_repeat=False)
    assert [part.inputs.shape for part in parts] == [(2, 8), (2, 6), (2, 2)]  # a row of 9 tokens is read up to the 8th
    assert [part.rows.lengths.tolist() for part in parts] == [[9, 9], [7, 5], [3, 2]]


def test_positions_are_padded_to_what_tensor_ranks_can_share() -> None:
    batch, at = some_rows()
    layout = ParallelLayout(tensor=4, sequence_parallel=True)
    parts = split(batch, at, Shapes(2, layout, fp8=False, device=torch.device("cpu")), may_repeat=False)
    assert [part.inputs.shape for part in parts] == [(2, 8), (2, 8), (2, 4)]
    assert sum(int(part.read.sum()) for part in parts) == int(at.sum())


def test_a_pair_stays_together() -> None:
    tokens = torch.arange(6)[:, None] * 10 + torch.arange(5)
    lengths = torch.tensor([2, 3, 5, 1, 4, 4])
    pairs = PreferencePairs(tokens, torch.ones_like(lengths), lengths, torch.tensor([0.0, 1.0, 2.0]))
    at = torch.arange(5) == (lengths - 1)[:, None]
    result = torch.zeros(at.shape)
    for part in split(pairs, at, shapes(2), may_repeat=False):
        states = part.states(part.inputs[..., None].float())
        assert states.count == 2 * len(part.rows)
        part.place(states.hidden[:, 0], result)
    assert result[at].tolist() == [1.0, 12.0, 24.0, 30.0, 43.0, 53.0]


def test_interleaved_stages_get_parts_of_one_shape() -> None:
    batch, at = some_rows()
    layout = {"pipeline": 2, "virtual_pipeline": 2}
    with pytest.raises(ValueError, match=r"6 rows are not a multiple of micro_batch=2 x pipeline=2"):
        split(batch, at, shapes(2, **layout), may_repeat=False)
    parts = split(batch, at, shapes(2, **layout), may_repeat=True)
    assert [part.inputs.shape for part in parts] == [(2, 8)] * 4
    assert parts[-1].rows.lengths.tolist() == [2, 2]  # the last row stands in for those that are missing


def test_states_pick_from_any_number_of_a_position() -> None:
    states = States(torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([2, 0]))
    values = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(states.of(values), torch.stack([values[0, 2], values[1, 0]]))
