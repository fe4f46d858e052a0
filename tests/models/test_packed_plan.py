"""Micro-batches of so many tokens, from sizes alone: how full they are, what they take, and how long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megarlhf.errors import ConfigError
from megarlhf.models.activations import Arithmetic, Tokens
from megarlhf.models.gpus import GPUS
from megarlhf.models.phases import phases_of
from megarlhf.models.spec import PRESETS
from megarlhf.models.step_time import model_flops, seconds_of
from megarlhf.models.workload import Job, RoleWork, Split, Workload
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.micro_batches import Cut, InRows, InTokens
from megarlhf.runtime.layouts import Machine, changes, check_split, options

H100, MEMORY = GPUS["h100-80gb"], 70 << 30
ACTOR = RoleWork("actor", "actor.init", "a", "language", learns=True, scores=1, loss="fused")
CRITIC = RoleWork("critic", "critic.init", "r", "scalar", learns=True, scores=1)
TP2 = ParallelLayout(tensor=2, data=4, sequence_parallel=True)


def job(cut: Cut, layout: ParallelLayout = TP2, rows: int = 128, sequences: int = 1) -> Job:
    """Rows of 512 + 1024 tokens, of which a language model computes 1535 and reads 1024."""
    work = Workload((ACTOR, CRITIC), 512, 1024, 4 * rows, rows, "global_batch", sequences=sequences)
    split = Split(layout, cut, recompute="none", offload=True)
    specs = {role.name: PRESETS["llama3-8b"] for role in work.roles}
    return Job(work, specs, split, Arithmetic(2, engine=True, recompute="none"))


def test_a_budget_is_taken_whole_and_read_as_its_rows_are() -> None:
    packed = job(InTokens(6144))
    assert packed.together(ACTOR) == 4  # 4 x 1535 = 6140, 4 x 1536 = 6144
    assert packed.together(CRITIC) == 4
    assert packed.fullest(ACTOR, 128) == Tokens(6144, round(6144 * 1024 / 1535))
    assert packed.fullest(CRITIC, 128) == Tokens(6144, 4096)
    # One token less and a critic's rows go by three; shorter rows fill the budget all the same.
    less = job(InTokens(6142))
    assert (less.together(ACTOR), less.together(CRITIC)) == (4, 3)
    assert less.fullest(CRITIC, 128).computed == 6142


def test_no_more_than_there_is() -> None:
    # 8 rows over 4 data ranks are 2 x 1535 tokens on each, and a slice of them on each tensor rank.
    assert job(InTokens(6144)).fullest(ACTOR, 8).computed == 2 * 1535
    assert job(InTokens(6144)).fullest(ACTOR, 4).computed == 1536
    assert job(InRows(4)).fullest(ACTOR, 8) == Tokens(4 * 1535, 4 * 1024)


def test_a_pair_is_not_cut_in_two() -> None:
    pairs = job(InTokens(6144), sequences=2)
    assert pairs.together(ACTOR) == 2
    with pytest.raises(ConfigError, match=r"up to 3072 tokens, .* micro_batch_tokens=2048; set it to 3072 or more"):
        check_split(job(InTokens(2048), sequences=2))


@pytest.mark.parametrize(("context", "filled"), [(1, 15_350), (2, 15_360), (4, 15_360), (20, 15_600)])
def test_context_ranks_fill_up_each_text(context: int, filled: int) -> None:
    """Ten rows of 1535 tokens, each filled up to a multiple of 2 x context, which their budget does not count."""
    assert job(InTokens(15_350), ParallelLayout(context=context)).fullest(ACTOR, 128).computed == filled


def test_fp8_pads_a_budget_that_is_not_full() -> None:
    packed = replace(job(InTokens(6144), ParallelLayout(data=4)), fp8_multiple=128)
    assert packed.fullest(ACTOR, 4).computed == 12 * 128
    assert packed.fullest(ACTOR, 8).computed == 24 * 128
    with pytest.raises(
        ConfigError, match=r"6143 is not a multiple of 128, as compute\.fp8 needs; set it to 6016 or 6144"
    ):
        check_split(packed.splitting(replace(packed.split, cut=InTokens(6143))))


def test_what_is_left_of_a_pack_is_a_part_of_one_but_for_interleaved_stages() -> None:
    assert job(InTokens(6144)).micro_batches(ACTOR, 128) == 8
    assert job(InTokens(7680)).micro_batches(ACTOR, 128) == 32 / 5
    stages = ParallelLayout(pipeline=4, virtual_pipeline=2)
    assert job(InTokens(7680), stages).micro_batches(ACTOR, 128) == 28  # 25.6 packs, as many for each stage
    assert job(InTokens(7680), ParallelLayout(pipeline=4)).micro_batches(ACTOR, 128) == 128 / 5


def test_full_budgets_take_what_as_many_tokens_in_rows_take() -> None:
    """6144 tokens for 6140: activations in proportion, and nothing else differs."""
    packed, rows = ({phase.name: phase for phase in phases_of(job(cut), MEMORY)} for cut in (InTokens(6144), InRows(4)))
    step, other = packed["train actor"], rows["train actor"]
    assert (step.weights, step.gradients, step.optimiser) == (other.weights, other.gradients, other.optimiser)
    assert step.activations / other.activations == pytest.approx(6144 / 6140, rel=1e-6)
    # A budget that four rows do not fill is counted full: 7000 tokens for 6140.
    more = {phase.name: phase for phase in phases_of(job(InTokens(7000)), MEMORY)}["train actor"]
    assert more.activations / other.activations == pytest.approx(7000 / 6140, rel=1e-6)


def test_rows_end_to_end_attend_to_themselves_alone() -> None:
    """As long as rows apart take, and not as one row of 6140 tokens would."""
    packed, rows = job(InTokens(6144)), job(InRows(4))
    assert seconds_of(packed, H100, MEMORY) == seconds_of(rows, H100, MEMORY)
    assert model_flops(packed) == model_flops(rows)
    # As many rows in a budget that has room for a half more: no faster.
    assert seconds_of(job(InTokens(6900)), H100, MEMORY) == seconds_of(rows, H100, MEMORY)
    assert seconds_of(job(InTokens(7680)), H100, MEMORY).learn < seconds_of(rows, H100, MEMORY).learn


def test_a_run_of_budgets_is_offered_budgets() -> None:
    own = job(InTokens(5000))
    found = options(own, 2, Machine(H100, spare=8.0))
    budgets = {each.split.count for each in found}
    assert all(isinstance(each.split.cut, InTokens) for each in found)
    assert {5000, 1536, 3072, 6144, 12_288} <= budgets
    # No data rank has more than its rows: 128 over 2 are 64.
    assert max(each.split.count for each in found if each.split.layout.data == 2) <= 64 * 1536
    assert changes(own.split, replace(own.split, cut=InTokens(6144))) == {"micro_batch_tokens": "6144"}
    assert all(isinstance(each.split.cut, InRows) for each in options(job(InRows(4)), 1, Machine(H100, spare=8.0)))
