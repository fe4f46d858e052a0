"""What passes through a model: formulas written out for one size, and what must not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megarlhf.models.activations import Arithmetic, Shape, Tokens, learning, scoring
from megarlhf.models.spec import PRESETS
from megarlhf.parallel.layout import ParallelLayout

B8 = PRESETS["llama3-8b"]
ENGINE, LOCAL = Arithmetic(2, engine=True, recompute="none"), Arithmetic(4, engine=False, recompute="none", cpu=True)
TOKENS = Tokens(computed=4 * 1535, read=4 * 1024)


def test_a_layer_of_transformer_engine() -> None:
    # Two norms and their results, each a slice of 4096 over 2 ranks; queries, keys and values as the product made them,
    # queries and keys rotated, the output; gate and rest, silu of the gate, the rest plus 0, their product. In bf16,
    # and an fp32 number for each of 16 heads.
    shape = Shape(B8, ParallelLayout(tensor=2, sequence_parallel=True), ENGINE)
    numbers = 4 * 2048 + (2048 + 2 * 512) + (2048 + 512) + 2048 + 5 * 7168
    assert numbers == 51_712
    assert shape.layer(1, 1) == 2 * numbers + 4 * 16
    kept = learning(shape, "language", TOKENS, 0, micro_batches=8, reads="fused").kept
    assert kept == 32 * 6140 * (2 * numbers + 64) + 6140 * 2 * 2048  # and what the final norm keeps


def test_without_sequence_parallelism_norms_are_whole() -> None:
    split, whole = (Shape(B8, ParallelLayout(tensor=2, sequence_parallel=sliced), ENGINE) for sliced in (True, False))
    assert whole.layer(1, 1) - split.layer(1, 1) == 2 * 4 * 2048


def test_a_local_layer_keeps_fp32_copies_in_its_norms() -> None:
    # In fp32: two copies and the result of each norm, queries, keys and values, rotated ones, the output, and gate,
    # rest and product of the MLP.
    shape = Shape(B8, ParallelLayout(), LOCAL)
    numbers = 2 * 3 * 4096 + (4096 + 2 * 1024) + (4096 + 1024) + 4096 + 3 * 14_336
    assert shape.layer(1, 1) == 4 * numbers + 4 * 32
    # In bf16 the copies are fp32 all the same.
    half = Shape(B8, ParallelLayout(), replace(LOCAL, itemsize=2))
    assert half.layer(1, 1) == 2 * (numbers - 4 * 4096) + 4 * 4 * 4096 + 4 * 32


def test_recompute_keeps_the_input_of_a_layer() -> None:
    shape = Shape(B8, ParallelLayout(tensor=2, sequence_parallel=True), replace(ENGINE, recompute="full"))
    step = learning(shape, "scalar", TOKENS, 0, micro_batches=8, reads="fused")
    assert step.kept == 32 * 6140 * 2 * 2048 + 6140 * 2 * 2048
    # A whole layer, less its input, comes back while it is taken through backward.
    whole = Shape(B8, shape.layout, ENGINE)
    assert step.working == 6140 * (51_712 * 2 + 64 - 2 * 2048) + whole.backward(6140, 6140)
    # At the head of a language model more is needed at once: a chunk of logits, and the gradient of the states.
    assert learning(shape, "language", TOKENS, 0, 8, "fused").logits == shape.head("language", TOKENS, "fused")[0]


def test_logits_come_in_chunks_of_two_gibibytes() -> None:
    # 2^29 fp32 logits and their bf16 gradient, whatever the rows; fewer where there are fewer rows.
    shape = Shape(B8, ParallelLayout(), ENGINE)
    rows = (1 << 29) // 128_256
    at_once, waiting = shape.head("language", Tokens(20_000, 20_000), "fused")
    assert at_once == rows * 128_256 * (4 + 2) + 20_000 * 4096 * (2 + 2 + 4)
    assert waiting == 20_000 * 4096 * 2
    few = shape.head("language", Tokens(100, 100), "fused")[0]
    assert few == 100 * (128_256 * 6 + 4096 * 8)
    # No gradient is made where nothing is learnt.
    assert shape.head("language", Tokens(100, 100), "scored")[0] == 100 * (128_256 * 4 + 4096 * 4)


@pytest.mark.parametrize(("rank", "kept"), [(0, 4), (1, 3), (2, 2), (3, 1)])
def test_stages_keep_as_many_micro_batches_as_follow(rank: int, kept: int) -> None:
    shape = Shape(B8, ParallelLayout(pipeline=4), ENGINE)
    stream = 2 * 6140 * 4096
    one = 8 * shape.layer(6140, 6140) + 2 * stream  # and what came in and went out
    final = 6140 * 2 * 4096 if rank == 3 else 0
    assert learning(shape, "language", TOKENS, rank, micro_batches=8, reads="fused").kept == kept * one + final
    # Never more than there are.
    assert learning(shape, "language", TOKENS, rank, micro_batches=1, reads="fused").kept == one + final


def test_interleaved_stages_warm_up_with_more_but_smaller_ones() -> None:
    # Rank 0 of 4 with 2 chunks has 2 x 3 + 4 + 1 of 4 layers in flight: 11 x 4 = 44 layers, where 4 x 8 = 32 were.
    shape = Shape(B8, ParallelLayout(pipeline=4, virtual_pipeline=2), ENGINE)
    one = 4 * shape.layer(6140, 6140) + 2 * 2 * 6140 * 4096
    assert learning(shape, "language", TOKENS, 0, micro_batches=8, reads="fused").kept == 11 * one


def test_twice_the_tokens_take_twice_the_bytes_but_for_the_gradient_of_a_weight() -> None:
    shape = Shape(B8, ParallelLayout(tensor=8, sequence_parallel=True), ENGINE)
    one, two = (learning(shape, "scalar", Tokens(n, 1), 0, 4, "composed") for n in (1000, 2000))
    weight = 2 * 14_336 // 8 * 4096
    assert two.kept == 2 * one.kept
    assert two.working - weight == 2 * (one.working - weight)


def test_scoring_keeps_nothing() -> None:
    shape = Shape(B8, ParallelLayout(), ENGINE)
    found = scoring(shape, "scalar", Tokens(1000, 1000), 0)
    assert found.kept == 0
    # The residual stream, its norm and what comes out, and five of the MLP's width.
    assert found.total == 1000 * 2 * (3 * 4096 + 5 * 14_336)


def test_context_ranks_have_their_share_of_the_tokens() -> None:
    """Two ranks: rank 0 has the first and the last quarter of each row, rank 1 what lies between."""
    assert Tokens(800, 200).on_rank(2) == Tokens(400, 200)  # a response as long as the last quarter
    assert Tokens(800, 400).on_rank(2) == Tokens(400, 200)
    assert Tokens(800, 600).on_rank(2) == Tokens(400, 400)  # all of rank 1's
    assert Tokens(800, 100).on_rank(4) == Tokens(200, 100)
    assert Tokens(801, 77).on_rank(1) == Tokens(801, 77)
    one, two = (Shape(B8, ParallelLayout(context=context), ENGINE) for context in (1, 2))
    half = Tokens(TOKENS.computed // 2, TOKENS.read)
    for recompute in (False, True):
        of = replace(ENGINE, recompute=recompute)
        shared, short = (
            learning(replace(shape, of=of), "scalar", tokens, 0, 4, "fused")
            for shape, tokens in ((two, TOKENS), (one, half))
        )
        assert (shared.kept, shared.working) == (short.kept, short.working)
    assert scoring(two, "scalar", TOKENS, 0) == scoring(one, "scalar", half, 0)


def test_local_layers_keep_keys_and_values_of_all_context_ranks() -> None:
    # Rotated queries and the output, and of two tokens keys and values: 2 x 4096 + 2 x 2 x 1024.
    one, two = (Shape(B8, ParallelLayout(context=context), LOCAL) for context in (1, 2))
    assert two.attention == 4 * (2 * 4096 + 4 * 1024) + 4 * 32
    assert Shape(B8, ParallelLayout(context=2), ENGINE).attention == Shape(B8, ParallelLayout(), ENGINE).attention
    assert two.norm == one.norm


def test_a_head_has_all_states_and_projects_its_share() -> None:
    shape = Shape(B8, ParallelLayout(context=2), ENGINE)
    rows = (1 << 29) // 128_256
    at_once, waiting = shape.head("language", Tokens(20_000, 20_000), "fused")
    # Own hidden states, those that are read, and the fp32 gradient of 10,000 of them.
    assert at_once == rows * 128_256 * (4 + 2) + 4096 * (10_000 * 2 + 20_000 * 2 + 10_000 * 4)
    assert waiting == 20_000 * 4096 * 2
