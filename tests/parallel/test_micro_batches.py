"""Whatever way a batch is cut, every position that is to be read is read once, and its number comes back to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megarlhf.batch.supervised import PreferencePairs, TokenBatch
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.micro_batches import InRows, InTokens, Shapes, States, split

LENGTHS = torch.tensor([3, 9, 5, 9, 2, 7])


def shapes(micro_batch: int, **layout: Any) -> Shapes:
    return Shapes(InRows(micro_batch), ParallelLayout(**layout), fp8_multiple=1, device=torch.device("cpu"))


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
    parts = split(batch, at, Shapes(InRows(2), layout, fp8_multiple=1, device=torch.device("cpu")), may_repeat=False)
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


BUDGETS = [9, 12, 20, 64]


def tokens_in(budget: int, **layout: Any) -> Shapes:
    return Shapes(InTokens(budget), ParallelLayout(**layout), fp8_multiple=1, device=torch.device("cpu"))


@pytest.mark.parametrize("budget", BUDGETS)
def test_in_packs_too_every_position_is_read_once_and_comes_back_to_its_place(budget: int) -> None:
    batch, at = some_rows()
    result = torch.zeros(at.shape)
    seen: list[int] = []
    for part in split(batch, at, tokens_in(budget), may_repeat=False):
        assert part.inputs.shape[0] == 1
        assert part.inputs.shape[1] <= budget
        states = part.states(part.inputs[..., None].float())
        assert torch.equal(states.hidden[:, 0] + 1, states.of(part.rows.labels).float())
        assert torch.equal(part.inputs[part.read], states.hidden[:, 0].long())  # the same positions, for the last layer
        part.place(states.hidden[:, 0], result)
        seen += part.rows.lengths.tolist()
    assert sorted(seen) == sorted(LENGTHS.tolist())
    assert torch.equal(result, torch.where(at, batch.tokens.float(), 0.0))


def test_documents_say_where_each_begins_and_count_from_zero() -> None:
    batch, at = some_rows()
    (part,) = split(batch, at, tokens_in(64), may_repeat=False)
    documents = part.documents
    assert documents is not None
    assert documents.lengths == (8, 8, 6, 4, 2, 1)  # read up to the last but one; the row of 2 tokens is not read
    assert documents.cu_seqlens_q.tolist() == [0, 8, 16, 22, 26, 28, 29]
    assert documents.cu_seqlens_q.dtype == torch.int32
    assert (documents.max_seqlen_q, documents.qkv_format) == (8, "thd")
    assert documents.positions.tolist() == [t for length in documents.lengths for t in range(length)]
    assert torch.equal(part.inputs[0] % 100, documents.positions)


@pytest.mark.parametrize(
    ("fp8", "layout", "multiple"),
    [(False, {"tensor": 4, "sequence_parallel": True}, 4), (True, {}, 16), (True, {"tensor": 2}, 16)],
)
def test_packs_are_filled_up_to_what_ranks_and_products_take(fp8: bool, layout: Any, multiple: int) -> None:
    batch, at = some_rows()
    shapes = Shapes(InTokens(16), ParallelLayout(**layout), fp8_multiple=16 if fp8 else 1, device=torch.device("cpu"))
    parts = split(batch, at, shapes, may_repeat=False)
    for part in parts:
        size, documents = part.inputs.shape[1], part.documents
        assert documents is not None
        assert size % multiple == 0
        assert size == sum(documents.lengths) == len(documents.positions) <= 16
        assert (
            documents.max_seqlen_q == max(documents.lengths) == int(part.position.max()) + 1
        )  # what fills is no longer
    assert sum(int(part.read.sum()) for part in parts) == int(at.sum())


def test_a_pair_stays_together_in_a_pack() -> None:
    tokens = torch.arange(6)[:, None] * 10 + torch.arange(5)
    lengths = torch.tensor([2, 3, 5, 1, 4, 4])
    pairs = PreferencePairs(tokens, torch.ones_like(lengths), lengths, torch.tensor([0.0, 1.0, 2.0]))
    at = torch.arange(5) == (lengths - 1)[:, None]
    parts = split(pairs, at, tokens_in(11), may_repeat=False)
    assert [part.rows.lengths.tolist() for part in parts] == [[4, 4], [5, 1, 2, 3]]
    result = torch.zeros(at.shape)
    for part in parts:
        part.place(part.states(part.inputs[..., None].float()).hidden[:, 0], result)
    assert result[at].tolist() == [1.0, 12.0, 24.0, 30.0, 43.0, 53.0]
    with pytest.raises(ValueError, match="a row has 8 tokens, but micro_batch_tokens=7; raise it to 8 or more"):
        split(pairs, at, tokens_in(7), may_repeat=False)


def test_interleaved_stages_get_packs_of_one_shape_and_enough_of_them() -> None:
    batch, at = some_rows()
    layout = {"pipeline": 4, "virtual_pipeline": 2}
    # Packs of 8 + 8 and 6 + 4 + 2 + 1 tokens: the last is scored again, or those of most rows are halved, to 8 at most.
    for may_repeat, size, rows in ((True, 16, [2, 4, 4, 4]), (False, 8, [1, 1, 2, 2])):
        parts = split(batch, at, tokens_in(16, **layout), may_repeat=may_repeat)
        assert [part.inputs.shape for part in parts] == [(1, size)] * 4
        assert [len(part.rows) for part in parts] == rows
        assert all(part.documents is not None and sum(part.documents.lengths) == size for part in parts)


def test_states_pick_from_any_number_of_a_position() -> None:
    states = States(torch.zeros(2, 1), torch.tensor([0, 1]), torch.tensor([2, 0]))
    values = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(states.of(values), torch.stack([values[0, 2], values[1, 0]]))
