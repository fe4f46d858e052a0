"""Every token of a sequence is on one context rank, attention over all of them is its formula, and heads share rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarlhf.batch.supervised import TokenBatch
from megarlhf.models.attention import CausalAttention
from megarlhf.parallel.context import HeadShare, Spread, in_order, own_columns, whole_states
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import (
    Cut,
    Documents,
    InRows,
    InTokens,
    MicroBatch,
    Shapes,
    sequence_multiple,
    split,
)
from tests.helpers.ranks import run_ranks

HEADS, GROUPS, WIDTH = 4, 2, 8
LENGTHS = (24, 12, 36)
"""Multiples of 2 x 2 and of 2 x 3."""
BOTH = [2, 3]


@pytest.mark.parametrize("context", [1, 2, 3])
def test_each_token_is_on_one_rank_and_each_rank_has_as_much_to_look_at(context: int) -> None:
    lengths = np.array(LENGTHS)
    every = [own_columns(lengths, rank, context) for rank in range(context)]
    assert sorted(np.concatenate(every).tolist()) == list(range(72))
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    keys = np.arange(72) - starts + 1
    assert len({int(keys[columns].sum()) for columns in every}) == 1


def test_a_rank_has_a_chunk_from_either_end_of_each_text() -> None:
    assert own_columns(np.array([8, 4]), 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert own_columns(np.array([8, 4]), 1, 2).tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("context", BOTH)
def test_what_ranks_have_is_put_in_order(context: int) -> None:
    parts = [torch.from_numpy(own_columns(np.array([12]), rank, context)) for rank in range(context)]
    assert in_order(torch.stack(parts)).tolist() == list(range(12))


@pytest.mark.parametrize("context", BOTH)
def test_each_state_is_found_where_it_lies(context: int) -> None:
    lengths, columns = np.array(LENGTHS), np.array([71, 3, 0, 24, 60, 3, 40, 41])
    spreads = [Spread.of(columns, lengths, rank, context) for rank in range(context)]
    lying = np.full((context, spreads[0].most), -1)
    for rank, spread in enumerate(spreads):
        lying[rank, : len(spread.own)] = own_columns(lengths, rank, context)[spread.columns]
        assert np.array_equal(lying[rank, : len(spread.own)], columns[spread.own])
        assert np.array_equal(spread.place, spreads[0].place)
    assert np.array_equal(lying.reshape(-1)[spreads[0].place], columns)
    assert spreads[0].most == max(len(spread.own) for spread in spreads)


@pytest.mark.parametrize(
    ("layout", "rows", "fp8", "multiple"),
    [
        (ParallelLayout(context=2), 1, False, 4),
        (ParallelLayout(context=3), 1, False, 6),
        (ParallelLayout(context=3, tensor=4, sequence_parallel=True), 1, False, 12),  # 4 a rank: two chunks of 2
        (ParallelLayout(context=2), 1, True, 32),
        (ParallelLayout(context=2, tensor=2, sequence_parallel=True), 4, True, 16),  # 4 rows x 4 of a slice
    ],
)
def test_sequences_are_padded_to_what_context_ranks_can_share(
    layout: ParallelLayout, rows: int, fp8: bool, multiple: int
) -> None:
    assert sequence_multiple(rows, layout, 16 if fp8 else 1) == multiple


def some_rows() -> tuple[TokenBatch, Tensor]:
    """Row i holds 100 (i + 1) + t; supervised are its labels from 1 on."""
    lengths, places = torch.tensor([3, 9, 5, 9, 2, 7]), torch.arange(12)
    tokens = 100 * torch.arange(1, 7)[:, None] + places
    mask = (places[1:] >= 2) & (places[1:] < lengths[:, None])
    return TokenBatch(tokens, lengths, mask), torch.nn.functional.pad(mask, (0, 1))


def as_a_model(part: MicroBatch[TokenBatch]) -> Tensor:
    """[most, 1]: the states that a rank has to read, of a model whose states are its inputs."""
    found = part.states(part.inputs[..., None].float()).hidden
    assert part.gathered is not None
    return torch.nn.functional.pad(found, (0, 0, 0, part.gathered.most - len(found)))


@pytest.mark.parametrize("cut", [InRows(2), InRows(4), InTokens(9), InTokens(20)], ids=str)
@pytest.mark.parametrize("context", BOTH)
def test_micro_batches_of_context_ranks_are_one_between_them(cut: Cut, context: int) -> None:
    batch, at = some_rows()
    shapes = [Shapes(cut, ParallelLayout(context=context), 1, torch.device("cpu"), r) for r in range(context)]
    result = torch.zeros(at.shape)
    for parts in zip(*(split(batch, at, each, may_repeat=False) for each in shapes), strict=True):
        one = parts[0]
        for part in parts:
            # A token says where it stands in its text; what fills up says 0, and stands behind.
            known = part.inputs > 0
            assert torch.equal(part.inputs[known] % 100, part.places.expand_as(part.inputs)[known])
            assert part.inputs.shape == one.inputs.shape
            assert len(part.places) % 2 == 0
        assert one.gathered is not None
        states = torch.cat([as_a_model(part) for part in parts])[one.gathered.place][:, 0]
        assert len(states) == sum(int(part.read.sum()) for part in parts)
        one.place(states, result)
    assert torch.equal(result, torch.where(at, batch.tokens.float(), 0.0))


def by_formula(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[N, B, heads * d] in fp64: each token attends to those of its own text that are not behind it."""
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(text))
    seen = (text[:, None] == text) & (place <= place[:, None])
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / WIDTH**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(2)


def qkv(tokens: int, rows: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(tokens, rows, heads, WIDTH, generator=draws) for heads in (HEADS, GROUPS, GROUPS)]


def upstream(tokens: int, rows: int) -> Tensor:
    return torch.randn(tokens, rows, HEADS * WIDTH, generator=torch.Generator().manual_seed(2))


def attend(context: int, lengths: tuple[int, ...], rows: int, packed: bool) -> tuple[Any, Tensor, list[Tensor]]:
    """This rank's columns, its output there, and its gradients there."""
    mesh = start(ParallelLayout(context=context), seed=1)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, context_parallel_size=context)
    core = CausalAttention(config, pg_collection=mesh.groups)
    columns = own_columns(np.array(lengths), mesh.context_rank, context)
    own = torch.from_numpy(columns)
    leaves = [x[own].requires_grad_() for x in qkv(sum(lengths), rows)]
    documents = Documents.of(np.array(lengths), torch.device("cpu"), columns) if packed else None
    out = core(*leaves, packed_seq_params=documents)
    return own, out.detach(), list(torch.autograd.grad(out, leaves, upstream(sum(lengths), rows)[own]))


@pytest.mark.parametrize("context", BOTH)
@pytest.mark.parametrize(("lengths", "rows"), [((36,), 2), (LENGTHS, 1)], ids=["padded", "packed"])
def test_attention_over_context_ranks_is_its_formula_and_gradient(
    lengths: tuple[int, ...], rows: int, context: int
) -> None:
    exact = [x.double().requires_grad_() for x in qkv(sum(lengths), rows)]
    query, key, value = exact
    expected = by_formula(query, key, value, lengths)
    theirs = torch.autograd.grad(expected, exact, upstream(sum(lengths), rows).double())
    for own, out, gradients in run_ranks(attend, context, context, lengths, rows, len(lengths) > 1):
        torch.testing.assert_close(out.double(), expected[own].detach(), rtol=0, atol=1e-6)
        for mine, other in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(mine.double(), other[own], rtol=0, atol=5e-6)


COLUMNS = (70, 1, 13, 40, 71)
"""Of states that are read; with three ranks one of them has none of the last two."""


def share(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A head's numbers of all states, their sum, and the gradients of this rank: of its states, and of the weight."""
    mesh = start(ParallelLayout(context=3), seed=1)
    columns = np.array(COLUMNS[:count])
    spread = Spread.of(columns, np.array(LENGTHS), mesh.context_rank, 3)
    states = torch.arange(72.0)[:, None].repeat(1, 2)[torch.from_numpy(columns[spread.own])].requires_grad_()
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    group = mesh.group("context")
    hidden = whole_states(states, torch.from_numpy(spread.place), spread.most, group)
    head = HeadShare(len(hidden), group)
    numbers = head.whole(hidden[head.own] @ weight)
    total = head.total((hidden[head.own] @ weight).sum())
    loss = (numbers * torch.arange(1.0, count + 1)).sum() + total
    mine, of_weight = torch.autograd.grad(loss, [states, weight])
    at = torch.zeros(72, 2)
    at[torch.from_numpy(columns[spread.own])] = mine
    return numbers.detach(), total.detach(), at, of_weight


@pytest.mark.parametrize("count", [5, 2])
def test_ranks_project_their_share_of_all_states_and_none_counts_twice(count: int) -> None:
    """Of 2 states 3 ranks project one each, and the last none."""
    columns = torch.tensor(COLUMNS[:count])
    ranks = run_ranks(share, 3, count)
    for numbers, total, _, _ in ranks:
        assert torch.equal(numbers, 3.0 * columns)
        assert total == 3.0 * columns.sum()
    expected = torch.zeros(72, 2)
    factors = torch.arange(1.0, count + 1) + 1
    expected[columns] = factors[:, None] * torch.tensor([1.0, 2.0])
    assert torch.equal(torch.stack([at for _, _, at, _ in ranks]).sum(0), expected)
    assert torch.equal(torch.stack([of for *_, of in ranks]).sum(0), (factors * columns).sum().expand(2))
