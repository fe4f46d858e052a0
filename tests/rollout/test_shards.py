"""Which part of a weight a rank has, who sends what to whom, and sums of bits that do not depend on either."""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
import torch

from megarlhf.rollout.shards import Places, checksum, cut_of, moves_of, numbers_a_word, spans

QKV, PROJ, FC1, NORM = (
    f"decoder.layers.3.{name}.weight"
    for name in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "input_layernorm")
)
EMBEDDING = "embedding.word_embeddings.weight"
ROWS = {EMBEDDING: 61, QKV: 24, PROJ: 24, FC1: 48, NORM: 8}


def whole(name: str) -> torch.Tensor:
    """Every number another one."""
    shape = {PROJ: (8, 24), NORM: (8,)}.get(name, (ROWS[name], 8))
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def part_of(name: str, part: int, parts: int) -> torch.Tensor:
    """By Megatron's rules: vocabulary padded with zeros, gate and up cut each, columns of what leads back."""
    weight = whole(name)
    if name == NORM:
        return weight
    if name == PROJ:
        return weight.chunk(parts, 1)[part].contiguous()
    if name == FC1:
        return torch.cat([half.chunk(parts)[part] for half in weight.chunk(2)])
    missing = -len(weight) % parts
    return torch.nn.functional.pad(weight, (0, 0, 0, missing)).chunk(parts)[part]


def test_a_padded_vocabulary_ends_where_it_ends() -> None:
    # 61 rows over 4 ranks: 16 each, and the last has 13 and 3 of padding; over 9: 7 each, the last 5.
    assert spans(61, 1, 3, 4) == [(48, 61, 0)]
    assert spans(61, 1, 8, 9) == [(56, 61, 0)]
    # A rank all of whose rows are padding: 9 rows over 8 ranks are 2 each, and the last three ranks have none.
    assert spans(9, 1, 5, 8) == []


def test_a_gated_layer_is_cut_twice() -> None:
    # 48 rows are 24 of the gate and 24 of what it lets through.
    assert spans(48, 2, 1, 2) == [(12, 24, 0), (36, 48, 12)]


def test_a_weight_that_nobody_knows_is_not_guessed_at() -> None:
    with pytest.raises(KeyError):
        cut_of("decoder.layers.0.mlp.adapter.weight")


def places(parts: int, copies: int, stages: int) -> Places:
    """As Megatron numbers ranks: tensor ranks are neighbours, then copies, then stages; each has a share of ROWS."""
    names = list(ROWS)
    held = [names[stage::stages] for stage in range(stages) for _ in range(copies * parts)]
    return Places(parts, [rank % parts for rank in range(parts * copies * stages)], held)


LAYOUTS = [(2, 1, 2), (1, 2, 2), (1, 1, 4), (2, 2, 1), (1, 4, 1), (4, 1, 1)]
WANTED = [(1, 4), (2, 2), (4, 1)]


@pytest.mark.parametrize(("here", "there"), list(itertools.product(LAYOUTS, WANTED)), ids=str)
def test_moves_make_every_part_of_the_other_layout(here: tuple[int, int, int], there: tuple[int, int]) -> None:
    """Carried out by hand, in the order that each rank has of its own: what was sent first arrives first."""
    before, after = places(*here), places(*there, 1)
    sent: dict[tuple[int, int], list] = defaultdict(list)
    for rank in range(4):
        for move in moves_of(rank, ROWS, before, after):
            if move.source == rank:
                have = part_of(move.name, before.part_of[rank], before.parts)
                sent[rank, move.target].append(have.narrow(move.dim, move.start, move.length))
    for rank in range(4):
        made = {name: torch.zeros_like(part_of(name, after.part_of[rank], after.parts)) for name in ROWS}
        for move in moves_of(rank, ROWS, before, after):
            if move.target == rank:
                made[move.name].narrow(move.dim, move.to, move.length).copy_(sent[move.source, rank].pop(0))
        for name, weight in made.items():
            assert torch.equal(weight, part_of(name, after.part_of[rank], after.parts)), name
    assert not any(sent.values())


@pytest.mark.parametrize(("here", "there"), [(1, (1, 4)), (1, (2, 2)), (1, (4, 1)), (2, (2, 2))], ids=str)
def test_nothing_travels_that_is_there_already(here: int, there: tuple[int, int]) -> None:
    """Four whole copies, or two of two halves each: whatever a rank needs, it has."""
    before, after = places(here, 4 // here, 1), places(*there, 1)
    assert all(move.source == move.target for rank in range(4) for move in moves_of(rank, ROWS, before, after))


def test_copies_of_a_model_take_turns() -> None:
    """Two stages of two copies, to four whole ones: each rank sends what the ranks of the other stage need, once."""
    before, after = places(1, 2, 2), places(1, 4, 1)
    for rank in range(4):
        targets = [m.target for m in moves_of(rank, ROWS, before, after) if m.source == rank != m.target]
        assert set(targets) == {(rank + 2) % 4}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checksum_is_that_of_the_whole_however_it_is_cut(name: str, dtype: torch.dtype) -> None:
    counts = [1, 2, 4]
    together = numbers_a_word(name, part_of(name, 0, 1).to(dtype), ROWS[name], counts)
    # 8 rows of norms and 8 columns are whole words of 8 bytes, and so are 24 / 4 columns in fp32, not in bf16.
    assert together * dtype.itemsize == (4 if (name, dtype) == (PROJ, torch.bfloat16) else 8)
    totals = set()
    for parts in counts:
        sums = [
            checksum(name, part_of(name, part, parts).to(dtype), ROWS[name], part, parts, together=together)
            for part in range(1 if name == NORM else parts)
        ]
        totals.add(int(torch.stack(sums).sum()))
    assert len(totals) == 1
    # In closed form, of words along the dimension that is cut.
    bits = (
        whole(name).to(dtype).view({2: {4: torch.int64, 2: torch.int32}, 4: {2: torch.int64}}[dtype.itemsize][together])
    )
    lines = bits.long() if name == NORM else bits.long().sum(0 if name == PROJ else 1)
    assert totals == {int((lines * (2 * torch.arange(len(lines)) + 1)).sum())}


def test_a_checksum_shows_one_bit_and_parts_in_the_wrong_place() -> None:
    def of(weight: torch.Tensor) -> int:
        return int(checksum(FC1, weight, 48, 0, 1, together=2))

    right = whole(FC1)
    bit = right.clone()
    bit.view(torch.int32)[17, 3] ^= 1
    # As it is put together by who does not know that gate and up are cut each.
    mixed = torch.cat([part_of(FC1, part, 2) for part in (0, 1)])
    assert len({of(right), of(bit), of(mixed)}) == 3


def test_words_of_a_part_that_begins_between_two_are_read_all_the_same() -> None:
    """Parameters are views of one buffer, and nothing says where they begin in it."""
    buffer = torch.cat([torch.zeros(1), whole(QKV).flatten()])
    assert checksum(QKV, buffer[1:].view(24, 8), 24, 0, 1, together=2) == checksum(
        QKV, whole(QKV), 24, 0, 1, together=2
    )
