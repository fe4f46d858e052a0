"""Rollouts on real ranks: the same in every layout and batch, true to the trainer and to transformers, and frugal."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megarlhf.errors import ConfigError, DataError, LayoutError
from megarlhf.models.role import TrainableRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.rollout import engine as engine_module
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.requests import requests_of
from megarlhf.rollout.sampling import SamplingConfig
from tests.helpers.ranks import run_ranks
from tests.rollout.worlds import EOS, PAD, SPEC, actor, as_tensors, engine, nested, prompts

SAMPLING = SamplingConfig(temperature=0.7, max_new_tokens=20)
SAMPLES = 3


def roll(layout: ParallelLayout, sampling: SamplingConfig, seed: int, max_requests: int) -> tuple:
    """A rollout of 5 prompts x 3 samples, and how far the trainer's log-probs are from the sampler's."""
    role = actor(layout, temperature=sampling.temperature)
    rollout = engine(role, max_requests=max_requests).generate(prompts(), sampling, seed=seed, group_size=SAMPLES)
    gap = (role.score(rollout) - rollout.sampler_logprobs).abs().max()
    return *as_tensors(rollout), float(gap)


@pytest.fixture(scope="module")
def reference() -> tuple:
    return run_ranks(roll, 1, ParallelLayout(), SAMPLING, 7, 512)[0]


LAYOUTS = [
    ParallelLayout(tensor=2),
    ParallelLayout(tensor=2, sequence_parallel=True),
    ParallelLayout(pipeline=2),
    ParallelLayout(pipeline=3),
    ParallelLayout(tensor=2, pipeline=2),
    ParallelLayout(data=2),
    ParallelLayout(context=2, pipeline=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_and_rank_gives_the_same_rollout(layout: ParallelLayout, reference: tuple) -> None:
    ranks = run_ranks(roll, layout.world_size, layout, SAMPLING, 7, 512)
    for tokens, lengths, terminated, logprobs, gap in ranks:
        assert torch.equal(tokens, reference[0])
        assert torch.equal(lengths, reference[1])
        assert torch.equal(terminated, reference[2])
        assert torch.equal(logprobs, ranks[0][3])
        # Sums over 64 numbers in another order, through 4 layers: a few units of 1e-6.
        torch.testing.assert_close(logprobs, reference[3], atol=1e-5, rtol=0)
        assert gap < 1e-5


@pytest.mark.parametrize("max_requests", [1, 4, 8])
def test_rows_that_wait_for_others_come_out_the_same(max_requests: int, reference: tuple) -> None:
    tokens, lengths, _, logprobs, gap = run_ranks(roll, 1, ParallelLayout(), SAMPLING, 7, max_requests)[0]
    assert torch.equal(tokens, reference[0])
    assert torch.equal(lengths, reference[1])
    torch.testing.assert_close(logprobs, reference[3], atol=1e-5, rtol=0)
    assert gap < 1e-5


def score_less_than_was_drawn(layout: ParallelLayout) -> float:
    """How far the trainer's log-probs of one short row are from the sampler's, after a prefill of many more tokens."""
    role = actor(layout, kind=TrainableRole)
    rollout = engine(role).generate(prompts(12), SamplingConfig(temperature=1.0, max_new_tokens=4), seed=7)
    first = rollout.rows(torch.tensor([0]))
    return float((role.score(first) - first.sampler_logprobs).abs().max())


def test_scratch_of_a_rollout_is_none_of_what_comes_after_it() -> None:
    """Sequence parallelism gathers into scratch that is kept; outside of inference mode nothing may write there."""
    for gap in run_ranks(score_less_than_was_drawn, 2, ParallelLayout(tensor=2, sequence_parallel=True)):
        assert gap < 1e-5


def test_waiting_works_on_split_models_too(reference: tuple) -> None:
    layout = ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True)
    for tokens, *_ in run_ranks(roll, 4, layout, SAMPLING, 7, 5):
        assert torch.equal(tokens, reference[0])


def test_the_seed_decides(reference: tuple) -> None:
    again = run_ranks(roll, 1, ParallelLayout(), SAMPLING, 7, 512)[0]
    other = run_ranks(roll, 1, ParallelLayout(), SAMPLING, 8, 512)[0]
    assert torch.equal(again[0], reference[0])
    assert torch.equal(again[3], reference[3])
    width = min(other[0].shape[1], reference[0].shape[1])
    assert not torch.equal(other[0][:, :width], reference[0][:, :width])


def roll_apart() -> tuple:
    """The 15 rows of a batch, and each prompt's samples from a call of its own, in another order."""
    role = actor(ParallelLayout())
    sampler = engine(role)
    together = sampler.generate(prompts(), SAMPLING, seed=7, group_size=SAMPLES)
    alone = [sampler.generate(prompts().rows(torch.tensor([i])), SAMPLING, seed=7, group_size=2) for i in (4, 2, 0)]
    repeated = sampler.generate(prompts().repeat(SAMPLES), SAMPLING, seed=7)
    shuffled = sampler.generate(prompts().rows(torch.tensor([3, 1, 0, 4, 2])), SAMPLING, seed=7, group_size=SAMPLES)
    return together.tokens, [part.tokens for part in alone], repeated.tokens, shuffled.tokens


def roll_unevenly(layout: ParallelLayout) -> list[tuple]:
    """One prompt, so that a data rank has none; and one prompt twice, far apart, with two samples each."""
    role = actor(layout)
    sampler = engine(role)
    twice = prompts(4).rows(torch.tensor([1, 0, 2, 3, 1]))
    return [
        (*as_tensors(rollout), role.score(rollout))
        for rollout in (
            sampler.generate(prompts(1), SAMPLING, seed=7, group_size=2),
            sampler.generate(twice, SAMPLING, seed=7, group_size=2),
        )
    ]


def test_prompts_need_not_divide_over_data_ranks_and_one_that_comes_twice_has_other_samples() -> None:
    whole = run_ranks(roll_unevenly, 1, ParallelLayout())[0]
    for rank in run_ranks(roll_unevenly, 2, ParallelLayout(data=2)):
        for (tokens, *_, logprobs), (expected, *_, theirs) in zip(rank, whole, strict=True):
            assert torch.equal(tokens, expected)
            torch.testing.assert_close(logprobs, theirs, atol=1e-5, rtol=0)
    samples = whole[1][0][[0, 1, 8, 9]]
    assert len({tuple(row.tolist()) for row in samples}) == 4


def test_a_rollout_does_not_depend_on_its_batch() -> None:
    together, alone, repeated, shuffled = run_ranks(roll_apart, 1)[0]
    for prompt, tokens in zip((4, 2, 0), alone, strict=True):
        same = together[SAMPLES * prompt : SAMPLES * prompt + 2]
        assert torch.equal(tokens, same[:, : tokens.shape[1]])
        assert (same[:, tokens.shape[1] :] == PAD).all()
    assert torch.equal(repeated, together)
    assert torch.equal(shuffled.view(5, SAMPLES, -1), together.view(5, SAMPLES, -1)[[3, 1, 0, 4, 2]])


def test_samples_of_a_prompt_differ(reference: tuple) -> None:
    groups = reference[0].view(5, SAMPLES, -1)
    # Short ones may coincide by chance; all of a prompt's would if its samples shared random numbers.
    assert all(len(group.unique(dim=0)) > 1 for group in groups)


def test_rows_end_at_eos_or_at_the_limit(reference: tuple) -> None:
    tokens, lengths, terminated, logprobs, _ = reference
    rows = prompts().repeat(SAMPLES)
    assert len(set((lengths - rows.lengths).tolist())) > 5  # ragged
    assert 0 < int(terminated.sum()) < len(tokens)
    for row, prompt, start_, end, done, scores in zip(
        tokens, rows.tokens, rows.lengths, lengths, terminated, logprobs, strict=True
    ):
        response = row[start_:end].tolist()
        assert torch.equal(row[:start_], prompt[:start_])
        assert (EOS in response[:-1]) is False
        assert (response[-1] == EOS) == bool(done)
        assert done or len(response) == SAMPLING.max_new_tokens
        assert (row[end:] == PAD).all()
        # Index t is about token t + 1.
        assert (scores[: start_ - 1] == 0).all()
        assert (scores[start_ - 1 : end - 1] < 0).all()
        assert (scores[end - 1 :] == 0).all()


def roll_to_the_wall() -> tuple:
    role = actor(ParallelLayout())
    rollout = engine(role, eos_ids=[-1]).generate(prompts(), SamplingConfig(temperature=1.0, max_new_tokens=35), seed=1)
    return rollout.lengths, rollout.terminated


def test_no_row_outgrows_the_longest_sequence_allowed() -> None:
    lengths, terminated = run_ranks(roll_to_the_wall, 1)[0]
    assert lengths.tolist() == [min(n + 35, 40) for n in prompts().lengths.tolist()]
    assert not terminated.any()


def greedy_of(directory: Path, layout: ParallelLayout, ends: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=24)
    rollout = engine(actor(layout, directory=directory), eos_ids=ends).generate(prompts(8), sampling, seed=0)
    return rollout.tokens, rollout.terminated


def greedy_model(directory: Path) -> Any:
    torch.manual_seed(6)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SPEC.vocab_size,
            hidden_size=SPEC.hidden_size,
            num_hidden_layers=SPEC.layers,
            num_attention_heads=SPEC.heads,
            num_key_value_heads=SPEC.kv_heads,
            intermediate_size=SPEC.ffn_size,
            rms_norm_eps=SPEC.norm_eps,
            max_position_embeddings=SPEC.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": SPEC.rope_theta},
            eos_token_id=EOS,
            bos_token_id=1,
            pad_token_id=PAD,
            initializer_range=0.2,
        )
    ).eval()
    model.save_pretrained(directory)
    return model


def greedily(model: Any, ends: list[int]) -> list[list[int]]:
    """What transformers generates, prompts left out."""
    found = []
    for length, prompt in zip(prompts(8).lengths.tolist(), prompts(8).tokens, strict=True):
        said = model.generate(
            prompt[None, :length],
            attention_mask=torch.ones(1, length).long(),
            do_sample=False,
            max_new_tokens=min(24, 40 - length),
            eos_token_id=ends,
        )
        found.append(said[0, length:].tolist())
    return found


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tensor=2, pipeline=2)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_greedy_rollouts_are_transformers_greedy_generation(count: int, layout: ParallelLayout, tmp_path: Path) -> None:
    model = greedy_model(tmp_path)
    # Ends that rows come to, each at another place, and before any of them reaches its limit.
    endless = greedily(model, [SPEC.vocab_size])
    ends = [EOS] if count == 1 else [endless[row][3 + row] for row in range(count)]
    assert len(set(ends)) == count
    tokens, terminated = run_ranks(greedy_of, layout.world_size, tmp_path, layout, ends)[0]
    expected = greedily(model, ends)
    for row, done, length, said in zip(tokens, terminated, prompts(8).lengths.tolist(), expected, strict=True):
        assert row[length : length + len(said)].tolist() == said
        assert row[length + len(said) :].tolist() == [PAD] * (len(row) - length - len(said))
        assert bool(done) == (said[-1] in ends)
    if count > 1:
        assert len({said[-1] for said in expected} & set(ends)) > 1


def roll_as_on_a_gpu(block: int, free: int) -> tuple | str:
    """The geometry that GPUs use: blocks shorter than a sequence, handed out in any order, as many as memory holds."""
    role = actor(ParallelLayout())
    on_gpu = dataclasses.replace(role.mesh, device=torch.device("cuda"))
    sampler = RolloutEngine(role, eos_ids=[EOS], pad_id=PAD, max_sequence_length=33)
    sampler.mesh = on_gpu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "CUDA_BLOCK_TOKENS", block)
        patch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 * 2**30))
        try:
            return as_tensors(sampler.generate(prompts(), SAMPLING, seed=7, group_size=SAMPLES))
        except ConfigError as error:
            return str(error)


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU where there is none")
@pytest.mark.parametrize("block", [4, 256])
@pytest.mark.parametrize("rows", [5, 100])
def test_short_blocks_and_little_memory_give_the_same_rollout(block: int, rows: int, reference: tuple) -> None:
    free = int(row_bytes(block) * (rows + 1.5) / 0.8)
    tokens, lengths, terminated, logprobs = run_ranks(roll_as_on_a_gpu, 1, block, free)[0]
    assert torch.equal(tokens, reference[0])
    assert torch.equal(lengths, reference[1])
    assert torch.equal(terminated, reference[2])
    torch.testing.assert_close(logprobs, reference[3], atol=1e-5, rtol=0)


def row_bytes(block: int) -> int:
    """fp32 keys and values of a row of 13 + 20 tokens in whole blocks."""
    return -(-33 // block) * block * 2 * SPEC.layers * SPEC.kv_heads * SPEC.head_dim * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU where there is none")
def test_too_little_memory_for_one_row_is_an_error() -> None:
    message = run_ranks(roll_as_on_a_gpu, 1, 4, row_bytes(4))[0]
    assert message.startswith("KV cache: two rows of 33 tokens need 0.0 GiB, more than rollout.memory_share=0.8 of")


def roll_nested(layout: ParallelLayout, max_requests: int, block: int, order: list[int]) -> tuple:
    """Responses to prompts that begin one another, asked for in this order, and put back into their own."""
    role = actor(layout, temperature=SAMPLING.temperature)
    sampler = engine(role, max_requests=max_requests)
    with pytest.MonkeyPatch.context() as patch:
        if block:
            sampler.mesh = dataclasses.replace(role.mesh, device=torch.device("cuda"))
            patch.setattr(engine_module, "CUDA_BLOCK_TOKENS", block)
            patch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 80 * 2**30))
        rollout = sampler.generate(nested().rows(torch.tensor(order)), SAMPLING, seed=7, group_size=SAMPLES)
    own = (torch.tensor(order).argsort()[:, None] * SAMPLES + torch.arange(SAMPLES)).flatten()
    gap = (role.score(rollout) - rollout.sampler_logprobs).abs().max()
    return *(each[own] for each in as_tensors(rollout)), float(gap)


@pytest.fixture(scope="module")
def one_by_one() -> tuple:
    """No two neighbours begin one another: each is prefilled alone."""
    order = [3, 4, 7, 2, 5, 8, 1, 6, 9, 0]
    assert [len(each.lengths) for each in requests_of(nested().rows(torch.tensor(order)), 512)] == [1] * 10
    return run_ranks(roll_nested, 1, ParallelLayout(), 512, 0, order)[0]


@pytest.mark.parametrize("block", [0, 2, 3, 4, 256])
@pytest.mark.parametrize("rows", [4, 512])
def test_prompts_that_begin_another_are_taken_from_its_cache(block: int, rows: int, one_by_one: tuple) -> None:
    """Their responses are the same, by whole rows and by blocks, and however many wait."""
    check_same(run_ranks(roll_nested, 1, ParallelLayout(), rows, block, list(range(10))), one_by_one)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_takes_them_so(layout: ParallelLayout, one_by_one: tuple) -> None:
    check_same(run_ranks(roll_nested, layout.world_size, layout, 512, 0, list(range(10))), one_by_one)


def check_same(ranks: list[tuple], expected: tuple) -> None:
    for tokens, lengths, terminated, logprobs, gap in ranks:
        assert torch.equal(tokens, expected[0])
        assert torch.equal(lengths, expected[1])
        assert torch.equal(terminated, expected[2])
        torch.testing.assert_close(logprobs, expected[3], atol=1e-5, rtol=0)
        assert gap < 1e-5


def test_what_is_prefilled_together() -> None:
    """Neighbours that begin the longest of them; never as of before their first token, and no more than fit."""
    requests = requests_of(nested(), 512)
    assert [(each.row, len(each.tokens), each.lengths) for each in requests] == [
        (0, 13, [2, 5, 5, 13]),
        (4, 9, [9, 4, 8]),
        (7, 12, [12]),
        (8, 1, [1]),
        (9, 6, [6]),
    ]
    assert [each.lengths for each in requests_of(nested(), 2)] == [[2, 5], [5, 13], [9, 4], [8], [12], [1], [6]]


def errors() -> list[str]:
    role = actor(ParallelLayout())
    sampler = RolloutEngine(role, eos_ids=[EOS], pad_id=PAD, max_sequence_length=10)
    messages = []
    with pytest.raises(DataError) as caught:
        sampler.generate(prompts(), SAMPLING, seed=1)
    messages.append(str(caught.value))
    # A call that failed leaves nothing behind.
    sampler.generate(prompts().rows(torch.arange(3)), SAMPLING, seed=1)
    return messages


def test_a_prompt_without_room_for_a_response_is_named() -> None:
    expected = "prompt row 3 (data set row 103) has 10 tokens and max_sequence_length is 10; "
    assert run_ranks(errors, 1)[0] == [expected + "drop the prompt or raise the limit."]


def interleaved() -> str:
    role = actor(ParallelLayout(pipeline=2, virtual_pipeline=2))
    with pytest.raises(LayoutError) as caught:
        RolloutEngine(role, eos_ids=[EOS], pad_id=PAD, max_sequence_length=10)
    return str(caught.value)


def test_interleaved_schedules_are_refused() -> None:
    assert "virtual_pipeline=2" in run_ranks(interleaved, 2)[0]


def test_a_signal_prints_no_stack() -> None:
    code = "import os, signal, megarlhf.rollout.engine; os.kill(os.getpid(), signal.SIGTERM)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM
    assert "most recent call first" not in done.stderr
