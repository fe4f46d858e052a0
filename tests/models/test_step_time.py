"""The step-time model: published rates of training, closed forms, and what must be faster than what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megarlhf.models.activations import Arithmetic
from megarlhf.models.gpus import GPUS, gpu_named
from megarlhf.models.memory_plan import numbers_of
from megarlhf.models.spec import PRESETS
from megarlhf.models.step_time import HALF, HBM, LATENCY, LINK, MATMUL, model_flops, seconds_of
from megarlhf.models.workload import Drawing, Job, Overlap, RoleWork, Split, Workload
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.micro_batches import InRows

H100 = GPUS["h100-80gb"]
MEMORY = 70 << 30
ROLE = RoleWork("model", "model", "", "language", learns=True)
DRAWING = Drawing(prompts=64, rows=64, memory_share=0.8, prefill_tokens=16_384, graphs=True, keep=False)


def training(model: str, layout: ParallelLayout, tokens: int, batch: int) -> Job:
    """Whole rows are learnt from, one a micro-batch, and nothing is offloaded."""
    work = Workload((ROLE,), 0, tokens, rows=batch, step_rows=batch, step_setting="global_batch")
    split = Split(layout, InRows(1), recompute="none", offload=False)
    return Job(work, {"model": PRESETS[model]}, split, Arithmetic(2, engine=True, recompute="none"))


TP4 = ParallelLayout(tensor=4, pipeline=4, sequence_parallel=True, data=2, virtual_pipeline=5)
PUBLISHED = [
    # Llama 3.1 8B, 8 GPUs, two context ranks. NVIDIA DGX Cloud, 2025.
    (training("llama3.1-8b", ParallelLayout(context=2, data=4), 8192, 128), 10_254),
    # Llama 3.1 70B, 64 GPUs, 4 x 4 x 5 virtual; likewise.
    (training("llama3.1-70b", TP4.model_copy(update={"context": 2}), 8192, 128), 1_121),
    # Llama 3 70B, SFT of rows of 4096 packed tokens, 32 GPUs.
    (training("llama3-70b", TP4, 4096, 32), 1_219),
]


@pytest.mark.parametrize(("job", "published"), PUBLISHED, ids=["8B", "70B", "70B SFT"])
def test_published_rates_are_near(job: Job, published: int) -> None:
    """Tokens/s a GPU, bf16: within a quarter; theirs overlaps communication, the last packs short texts."""
    tokens = job.work.rows * job.work.width
    rate = tokens / seconds_of(job, H100, MEMORY).total / job.split.layout.world_size
    assert rate == pytest.approx(published, rel=0.25)


def test_one_gpu_computes_at_its_rate() -> None:
    job = training("llama3-8b", ParallelLayout(), 4096, 4)
    spec, weights = PRESETS["llama3-8b"], 8_030_261_248
    # 4096 tokens a micro-batch, of which the last is not computed; forward and backward are three forwards.
    flops = 3 * 4 * spec.forward_flops(4095, 4095 * 4096 // 2, 4096)
    rate = H100.flops * MATMUL * 4095 / (4095 + HALF)
    # Gradients are written and read, masters and moments read and written, weights written.
    stepped = weights * (2 * 4 + 2 * 12 + 2) / (HBM * H100.hbm)
    assert seconds_of(job, H100, MEMORY).total == pytest.approx(flops / rate + stepped, rel=1e-3)
    assert model_flops(job) == pytest.approx(flops, rel=1e-3)


def test_recompute_costs_a_third_of_the_products() -> None:
    job = training("llama3-8b", ParallelLayout(), 4096, 64)
    plain, again = (
        seconds_of(job.splitting(replace(job.split, recompute=on)), H100, MEMORY).learn for on in ("none", "full")
    )
    assert again / plain == pytest.approx(4 / 3, rel=0.01)
    assert model_flops(job) == model_flops(job.splitting(replace(job.split, recompute="full")))


def test_a_pipeline_waits_for_its_ends() -> None:
    """m micro-batches on p stages take m + p - 1 turns, so 8 on 4 take 11 / 8 of what 8 turns would."""
    few, many = (training("llama3-70b", ParallelLayout(pipeline=4), 4096, rows) for rows in (8, 800))
    short, long = (seconds_of(job, H100, MEMORY).learn for job in (few, many))
    turns = (long - short) / 792  # what a micro-batch more costs
    stepped = seconds_of(training("llama3-70b", ParallelLayout(pipeline=4), 4096, 8), H100, MEMORY).learn - 11 * turns
    assert stepped == pytest.approx(long - 803 * turns, rel=1e-6)
    assert short > 11 * turns > 10 * turns


def test_decoding_reads_weights_and_cache_once_a_token() -> None:
    spec, role = PRESETS["llama3-8b"], replace(ROLE, learns=False)
    work = Workload((role,), 512, 512, 64, 64, "global_batch", drawing=DRAWING)
    split = Split(ParallelLayout(), InRows(8), recompute="none", offload=False)
    job = Job(work, {"model": spec}, split, Arithmetic(2, engine=True, recompute="none"))
    # 64 rows: 16 GB of weights and 64 x 768 tokens of 131,072 bytes on average, and the sampler's five passes.
    read = 2 * spec.parameters + 64 * 768 * 131_072
    sampled = 5 * 4 * 64 * 128_256
    prefill = spec.forward_flops(64 * 512, 64 * 512 * 513 // 2, 64) / (H100.flops * MATMUL)
    expected = 512 * (read + sampled) / (HBM * H100.hbm) + prefill
    assert seconds_of(job, H100, MEMORY).rollout == pytest.approx(expected, rel=1e-3)
    # Half the rows at once are two rounds, each of which reads the weights.
    halved = replace(job, work=replace(work, drawing=DRAWING._replace(rows=32)))
    more = seconds_of(halved, H100, MEMORY).rollout - seconds_of(job, H100, MEMORY).rollout
    assert more == pytest.approx(512 * 2 * spec.parameters / (HBM * H100.hbm), rel=1e-3)
    # Without graphs a step takes as long as it is launched: 32 layers of 150 us, less than reading takes here.
    slow = replace(job, work=replace(work, drawing=DRAWING._replace(graphs=False)))
    assert seconds_of(slow, GPUS["b200-180gb"], MEMORY).rollout > seconds_of(job, GPUS["b200-180gb"], MEMORY).rollout


def test_tensor_ranks_sum_the_residual_stream() -> None:
    """10 collectives a layer in forward and backward, each half of 4095 x 4096 bf16 numbers from either of 2 ranks; in
    decoding two sums a layer, whose wait is added."""
    layout = ParallelLayout(tensor=2, sequence_parallel=True)
    fast = replace(H100, nvlink=1e30)
    job = training("llama3-8b", layout, 4096, 4)
    slower = seconds_of(job, H100, MEMORY).learn - seconds_of(job, fast, MEMORY).learn
    assert slower == pytest.approx(4 * 10 * 32 * 0.5 * 4095 * 4096 * 2 / (LINK * 450e9), rel=1e-6)
    role = replace(ROLE, learns=False)
    work = Workload((role,), 512, 512, 64, 64, "global_batch", drawing=DRAWING)
    drawn = replace(job, work=work)
    slower = seconds_of(drawn, H100, MEMORY).rollout - seconds_of(drawn, fast, MEMORY).rollout
    assert slower == pytest.approx(512 * 2 * 32 * 2 * 64 * 4096 * 2 / (LINK * 450e9), rel=1e-6)
    alone = replace(drawn, split=replace(drawn.split, layout=ParallelLayout()))
    waits = 512 * 2 * 32 * LATENCY
    assert seconds_of(drawn, fast, MEMORY).rollout > waits
    # Half of what one rank reads, and the waits.
    assert seconds_of(drawn, fast, MEMORY).rollout - waits < seconds_of(alone, fast, MEMORY).rollout


@pytest.mark.parametrize(("tensor", "adapters"), [(1, 8), (8, 1)])
def test_copies_are_reduced_over_the_adapters_of_their_nodes(tensor: int, adapters: int) -> None:
    """4 bytes of gradients and 2 of weights a weight, less a data rank's own share, once a step."""
    layout = ParallelLayout(tensor=tensor, data=16, sequence_parallel=tensor > 1)
    job = training("llama3-8b", layout, 4096, 64)
    half = replace(H100, network=25e9)
    slower = seconds_of(job, half, MEMORY).learn - seconds_of(job, H100, MEMORY).learn
    moved = 15 / 16 * 6 * numbers_of(PRESETS["llama3-8b"], "language", layout, 0)
    assert slower == pytest.approx(moved / (LINK * adapters) * (1 / 25e9 - 1 / 50e9), rel=1e-6)


@pytest.mark.parametrize(("tensor", "link"), [(1, H100.nvlink), (8, H100.network)])
def test_context_ranks_pass_keys_and_values_round(tensor: int, link: float) -> None:
    """Three rounds a layer, of which backward has two; each rank sends 2047.5 tokens of 2 x 8 x 128 numbers in bf16."""
    layout = ParallelLayout(tensor=tensor, context=2, sequence_parallel=tensor > 1)
    job = training("llama3-8b", layout, 4096, 4)
    half = replace(H100, nvlink=H100.nvlink / 2) if tensor == 1 else replace(H100, network=H100.network / 2)
    slower = seconds_of(job, half, MEMORY).learn - seconds_of(job, H100, MEMORY).learn
    passed = 4 * 3 * 32 * 2047.5 * 2 * 8 * 128 * 2 / tensor
    # Beside it gradients and weights of the two copies: half of 4 + 2 bytes a weight.
    reduced = 0.5 * 6 * numbers_of(PRESETS["llama3-8b"], "language", layout, 0)
    assert slower == pytest.approx((passed + reduced) / (LINK * link), rel=1e-6)


def test_context_ranks_share_the_products() -> None:
    """Half of the FLOPs each, at the rate of half the tokens."""
    one, two = (training("llama3-8b", ParallelLayout(context=context), 8192, 800) for context in (1, 2))
    fast = replace(H100, nvlink=1e30)
    rate = (8191 / (8191 + HALF)) / (8191 / 2 / (8191 / 2 + HALF))
    ratio = seconds_of(two, fast, MEMORY).learn / seconds_of(one, fast, MEMORY).learn
    assert ratio == pytest.approx(rate / 2, rel=1e-3)


def test_offloading_moves_bytes_over_pcie() -> None:
    job = training("llama3-8b", ParallelLayout(), 4096, 4)
    stays, goes = (
        seconds_of(job.splitting(replace(job.split, offload=on)), H100, MEMORY).learn for on in (False, True)
    )
    # Weights and the optimiser's state, there and back: 2 + 12 bytes a weight.
    assert goes - stays == pytest.approx(2 * 14 * 8_030_261_248 / (LINK * H100.pcie), rel=1e-6)


def overlapping(job: Job, *, gradients: bool = False, weights: bool = False) -> float:
    return seconds_of(replace(job, overlap=Overlap(gradients, weights)), H100, MEMORY).learn


def test_gradients_are_summed_under_the_last_backward() -> None:
    """4 bytes a weight, less a rank's own sixteenth, over eight adapters; backward is two thirds of a micro-batch."""
    layout = ParallelLayout(data=16)
    job = training("llama3-8b", layout, 4096, 64)
    apart, beside = overlapping(job), overlapping(job, gradients=True)
    weights = PRESETS["llama3-8b"].parameters
    summed = 15 / 16 * 4 * weights / (LINK * 8 * H100.network)
    one, two = (overlapping(training("llama3-8b", layout, 4096, rows)) for rows in (16, 32))
    backward = 2 / 3 * (two - one)  # a micro-batch more
    assert summed < backward
    assert apart - beside == pytest.approx(summed, rel=1e-6)
    # Where it takes longer than backward, what is left of it is waited for.
    slow = replace(H100, network=5e9)
    both = [seconds_of(replace(job, overlap=Overlap(on)), slow, MEMORY).learn for on in (False, True)]
    assert both[0] - both[1] == pytest.approx(backward, rel=1e-6)


def test_weights_are_gathered_under_the_next_forward() -> None:
    job = training("llama3-8b", ParallelLayout(data=16), 4096, 64)
    gathered = 15 / 16 * 2 * PRESETS["llama3-8b"].parameters / (LINK * 8 * H100.network)
    assert overlapping(job) - overlapping(job, weights=True) == pytest.approx(gathered, rel=1e-6)
    # After the last of two steps the policy is drawn from, which waits.
    work = replace(job.work, rows=128, drawing=DRAWING)
    drawn = replace(job, work=work)
    assert overlapping(drawn) - overlapping(drawn, weights=True) == pytest.approx(gathered, rel=1e-6)
    more = replace(job, work=replace(work, rows=192))
    assert overlapping(more) - overlapping(more, weights=True) == pytest.approx(2 * gathered, rel=1e-6)
    # An optimiser that is not distributed has all of its weights.
    whole = replace(job, work=replace(job.work, roles=(replace(ROLE, distributed=False),)))
    assert overlapping(whole) == overlapping(whole, weights=True)


@pytest.mark.parametrize(("job", "published"), PUBLISHED, ids=["8B", "70B", "70B SFT"])
def test_published_rates_are_near_with_overlap_too(job: Job, published: int) -> None:
    """As theirs does, and still within a quarter."""
    tokens = job.work.rows * job.work.width
    rate = tokens / overlapping(job, gradients=True, weights=True) / job.split.layout.world_size
    assert rate == pytest.approx(published, rel=0.25)


def test_a_faster_gpu_is_faster() -> None:
    job = training("llama3-8b", ParallelLayout(data=8), 4096, 64)
    times = [seconds_of(job, gpu_named(name), MEMORY).total for name in ("a100-80gb", "h100-80gb", "b200-180gb")]
    assert times == sorted(times, reverse=True)
