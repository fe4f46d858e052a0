"""Seconds of an iteration in a layout, by a model whose assumptions are few, and printed beside what it says.

    products     FLOPs / (peak x MATMUL x n / (n + HALF)), n tokens of a micro-batch on a rank
    tensor       4 collectives a layer forward, 6 backward, of the residual stream, over NVLink, not overlapped
    recompute    the same share of a forward's products and collectives once more
    pipeline     (m + (p - 1) / v) times the slowest stage, m micro-batches; messages between stages
    context      keys and values passed round a ring, backward twice, not overlapped
    data         fp32 gradients reduced, weights gathered, once an optimiser step; with compute.overlap_* what is left
                 of that after the backward of a micro-batch, after the forward of one
    refit        what a rank has not itself comes over a link, checksums read both models once
    decoding     a step reads weights and cache once; tensor ranks sum twice a layer; stages work in turn
    offloading   weights there and back in every phase, optimiser state in learning, over PCIe
    judges' programs, the sandbox, saving and logging take no time

Source:   counts as in Narayanan et al. 2021 (arXiv 2104.04473) and Korthikanti et al. 2022 (arXiv 2205.05198). MATMUL
          lies between what Llama 3's published rates of training give (`tests/models/test_step_time.py`); not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megarlhf.models.gpus import Gpu
from megarlhf.models.memory_plan import FP32, cache_bytes_per_token, numbers_of, pieces_of
from megarlhf.models.phases import copy_bytes, read_from, role_bytes, rows_at_once
from megarlhf.models.recompute import most_layers, whole_layers
from megarlhf.models.workload import Drawing, Job, RoleWork
from megarlhf.parallel.layout import ParallelLayout

MATMUL = 0.62
"""Of a GPU's peak, that large products reach with what lies between them."""
FP8_MATMUL = 0.45
"""The same of the FP8 peak."""
HALF = 256
"""Tokens of a micro-batch on a rank with which products reach half of that."""
LINK = 0.75
"""Of a link's peak, that collectives and copies reach."""
HBM = 0.7
"""Of a GPU's memory bandwidth, that decoding reaches."""
LATENCY = 15e-6
"""Seconds of a small sum over the ranks of a node."""
LAUNCHES = 150e-6
"""Seconds of a layer's kernel launches in a decode step that was not captured."""

ASSUMPTIONS = (
    (
        f"products reach {MATMUL:.0%} of the bf16 peak ({FP8_MATMUL:.0%} of FP8's) with many tokens, half of that with "
        f"{HALF} a micro-batch"
    ),
    f"links reach {LINK:.0%} of their peak, decoding {HBM:.0%} of the memory's",
    (
        "nothing overlaps, but with compute.overlap_grad_reduce the sum of gradients with the backward of a step's "
        "last micro-batch, with overlap_param_gather the gathering of weights with the forward of the next step's first"
    ),
    "a copy in another layout is filled once an iteration, from ranks as far away as stages are",
    f"a sum over a node takes {LATENCY * 1e6:.0f} us at least, decoding a layer without graphs {LAUNCHES * 1e6:.0f}",
    "every prompt and response has its greatest length; judges that are no models take no time",
)


@dataclass(frozen=True)
class Seconds:
    """Of an iteration, by phase."""

    rollout: float
    score: float
    learn: float

    @property
    def total(self) -> float:
        """Of all phases."""
        return self.rollout + self.score + self.learn


def seconds_of(job: Job, gpu: Gpu, memory: int) -> Seconds:
    """What an iteration takes; `memory`: bytes of a GPU that the run may use."""
    work = job.work
    score = sum(role.scores * _forward(job, role, gpu) for role in work.roles)
    return Seconds(
        rollout_seconds(job, gpu, memory), score, sum(_learning(job, role, gpu) for role in work.roles if role.learns)
    )


def model_flops(job: Job) -> int:
    """Of an iteration, over all GPUs, by the convention of `observe/work.py`: backward is twice forward, where
    adapters learn once, and neither padding nor recomputation counts."""
    work, total = job.work, 0
    for role in work.roles:
        passes = role.scores + (role.passes * work.passes if role.learns else 0)
        total += passes * _rows_flops(job, role, work.rows)
    if work.drawing is not None:
        spec, prompts, rows = job.specs[work.roles[0].name], work.drawing.prompts, work.rows
        given, whole = _keys(work.prompt_tokens), _keys(work.width)
        total += spec.forward_flops(
            prompts * work.prompt_tokens + rows * (work.response_tokens - 1),
            prompts * given + rows * (whole - given),
            projected=rows * work.response_tokens,
        )
    return total


def _rows_flops(job: Job, role: RoleWork, rows: int) -> int:
    """Of one forward pass over so many rows."""
    work, sequences = job.work, rows * job.work.sequences
    width = work.width - (role.head == "language")
    projected = sequences * work.response_tokens if role.head == "language" else 0
    return job.specs[role.name].forward_flops(sequences * width, sequences * _keys(width), projected)


def _keys(tokens: int) -> int:
    return tokens * (tokens + 1) // 2


def _stage(job: Job, role: RoleWork, gpu: Gpu, passes: float, collectives: float) -> float:
    """Seconds of a micro-batch on the slowest stage. passes: forwards' worth of products; collectives: of a layer."""
    layout, spec, of = job.split.layout, job.specs[role.name], job.arithmetic
    rows = job.together(role)
    tokens = job.work.tokens(role, rows).computed / layout.context
    whole = _rows_flops(job, role, rows)
    projection = 2 * job.work.tokens(role, rows).read * spec.vocab_size * spec.hidden_size
    head = projection if role.head == "language" else 0
    rate = (gpu.fp8 * FP8_MATMUL if job.fp8 and gpu.fp8 else gpu.flops * MATMUL) * tokens / (tokens + HALF)
    slowest = 0.0
    for rank in {0, min(1, layout.pipeline - 1), layout.pipeline - 1}:
        pieces = pieces_of(spec, layout, rank)
        layers = sum(piece.layers for piece in pieces)
        flops = (whole - head) * layers / spec.layers + (head if pieces[-1].last else 0)
        stream = of.itemsize * tokens * spec.hidden_size
        share = (layout.tensor - 1) / layout.tensor
        summed = collectives * layers * share * stream / (LINK * gpu.nvlink)
        sent = 2 * layout.virtual_pipeline * stream / (LINK * _between_stages(job, gpu)) if layout.pipeline > 1 else 0.0
        # A pass is one round of the ring, of whose keys and values each rank sends all but its own.
        ring = passes * layers * (layout.context - 1) * of.itemsize * tokens * 2 * spec.kv_heads * spec.head_dim
        passed = ring / layout.tensor / (LINK * _round_ring(job, gpu))
        slowest = max(slowest, passes * flops / layout.tensor / layout.context / rate + summed + passed + sent)
    return slowest


def _round_ring(job: Job, gpu: Gpu) -> float:
    """Bytes a second from one context rank to the next, tensor ranks apart."""
    layout = job.split.layout
    return gpu.nvlink if layout.tensor * layout.context <= gpu.node else gpu.network


def _between_stages(job: Job, gpu: Gpu) -> float:
    """Bytes a second from stage to stage: neighbours of the pipeline are tensor x context x data ranks apart."""
    layout = job.split.layout
    return gpu.nvlink if layout.world_size <= gpu.node else gpu.network


def _between_copies(job: Job, gpu: Gpu) -> float:
    """Bytes a second of a ring over the copies of a weight, which leaves a node over its members' adapters there."""
    layout = job.split.layout
    if layout.tensor * layout.drawing.data <= gpu.node:
        return gpu.nvlink
    return min(gpu.nvlink, gpu.network * max(1, gpu.node // layout.tensor))


def _bubbles(job: Job, micro_batches: float) -> float:
    """How many times the slowest stage a pass takes."""
    layout = job.split.layout
    return micro_batches + (layout.pipeline - 1) / layout.virtual_pipeline


def _moved(job: Job, role: RoleWork, gpu: Gpu, *, all_parts: bool) -> float:
    """Seconds to bring a role's bytes and take them away again."""
    if not job.split.offload:
        return 0.0
    ends, there = (0, job.split.layout.pipeline - 1), read_from(job, role)
    of = max((role_bytes(job, there, rank) for rank in ends), key=lambda each: each.all)
    return 2 * (of.weights + (of.optimiser if all_parts else 0)) / (LINK * gpu.pcie)


def _forward(job: Job, role: RoleWork, gpu: Gpu) -> float:
    """Of one pass over an iteration's rows."""
    micro_batches = job.micro_batches(role, job.work.rows)
    return _bubbles(job, micro_batches) * _stage(job, role, gpu, 1, 4) + _moved(job, role, gpu, all_parts=False)


def _learning(job: Job, role: RoleWork, gpu: Gpu) -> float:
    layout, work = job.split.layout, job.work
    steps = work.passes * work.rows / work.step_rows
    micro_batches = job.micro_batches(role, work.step_rows)
    products, collectives = _again(job, role)
    forward = _stage(job, role, gpu, 1, 4)
    stage = _stage(job, role, gpu, role.passes + products, 10 + 4 * collectives)
    # Gradients are zeroed, masters and moments read and written.
    of = max((role_bytes(job, role, rank) for rank in (0, layout.pipeline - 1)), key=lambda each: each.all)
    updated = job.arithmetic.itemsize * of.gradients // FP32
    stepped = (2 * of.gradients + 2 * of.optimiser + updated) / (HBM * gpu.hbm)
    others, link = layout.drawing.data, LINK * _between_copies(job, gpu)
    share = (others - 1) / others
    summed = (1 if role.distributed else 2) * share * of.gradients / link
    gathered = share * updated / link if role.distributed else 0.0
    waited = _exposed(job, steps, summed, gathered, forward, stage - forward)
    return steps * (_bubbles(job, micro_batches) * stage + stepped) + waited + _moved(job, role, gpu, all_parts=True)


def _exposed(job: Job, steps: float, summed: float, gathered: float, forward: float, backward: float) -> float:
    """Seconds of `steps` that nothing but copies travel. After a phase's last step nothing is left to gather beside:
    what is drawn or read next waits, but where a step is all that there is, over and over."""
    overlap = job.overlap
    summing = max(0.0, summed - backward) if overlap.gradients else summed
    last = 1 if job.work.drawing is not None else 0
    beside = (steps - last) * max(0.0, gathered - forward) + last * gathered
    return steps * summing + (beside if overlap.weights else steps * gathered)


def _again(job: Job, role: RoleWork) -> tuple[float, float]:
    """What backward computes again, as parts of a forward: of its products, and of its collectives."""
    spec, recompute = job.specs[role.name], job.split.recompute
    if recompute == "selective":
        width = job.work.width
        mlp = 6 * spec.hidden_size * spec.ffn_size * spec.layers * width
        return mlp / spec.forward_flops(width, _keys(width), projected=0), 0.5
    layers = most_layers(spec, job.split.layout)
    share = whole_layers(recompute, layers) / layers
    return share, share


def rollout_seconds(job: Job, gpu: Gpu, memory: int) -> float:
    """Of the rollout, in the layout that it is drawn in; infinite where the cache has no room."""
    drawing = job.work.drawing
    return 0.0 if drawing is None else _refit(job, gpu) + _rollout(job, drawing, gpu, memory)


def _refit(job: Job, gpu: Gpu) -> float:
    """Of filling a copy in another layout, once an iteration; its sources are as far away as stages are."""
    other, copy = job.split.elsewhere, copy_bytes(job)
    if other is None:
        return 0.0
    ends = (0, job.split.layout.pipeline - 1)
    source = max(role_bytes(job, job.work.roles[0], rank).weights for rank in ends)
    arriving = copy * (1 - _had_already(job.split.layout, other))
    return arriving / (LINK * _between_stages(job, gpu)) + (source + 2 * copy) / (HBM * gpu.hbm)


def _had_already(layout: ParallelLayout, other: ParallelLayout) -> float:
    """The part of its copy that a rank has itself, of the rank that has least: of its stage's layers, the rows that its
    places among the tensor ranks of both layouts have in common."""
    common = []
    for rank in range(math.lcm(layout.tensor, other.tensor)):
        here, there = rank % layout.tensor, rank % other.tensor
        last = min((here + 1) / layout.tensor, (there + 1) / other.tensor)
        common.append(max(0.0, last - max(here / layout.tensor, there / other.tensor)))
    return min(common) * other.tensor / layout.pipeline


def _rollout(job: Job, drawing: Drawing, gpu: Gpu, memory: int) -> float:
    work, layout, role, of = job.work, job.split.drawing, job.work.roles[0], job.arithmetic
    spec, at_once = job.specs[role.name], rows_at_once(job, memory)
    if not at_once:
        return float("inf")
    prompts = -(-drawing.prompts // layout.data)
    given = spec.forward_flops(prompts * work.prompt_tokens, prompts * _keys(work.prompt_tokens), prompts)
    prefill = given / layout.tensor / (gpu.flops * MATMUL)
    # Each rank of a stage waits for the others: a token passes all stages before the next.
    weights = of.itemsize * sum(numbers_of(spec, role.head, layout, rank) for rank in range(layout.pipeline))
    rows = -(-work.rows // layout.data)
    waves, middle = -(-rows // at_once), work.prompt_tokens + work.response_tokens / 2
    per_token = cache_bytes_per_token(spec, spec.layers, layout.tensor, of.itemsize)
    read = (weights + at_once * middle * per_token) / (HBM * gpu.hbm)
    products = spec.forward_flops(at_once, round(at_once * middle), at_once) / layout.tensor / (gpu.flops * MATMUL)
    stream = of.itemsize * at_once * spec.hidden_size
    summed = 0.0
    if layout.tensor > 1:
        summed = 2 * spec.layers * (LATENCY + 2 * stream / (LINK * gpu.nvlink))
    launched = 0.0 if drawing.graphs else spec.layers * LAUNCHES
    sampled = 5 * FP32 * at_once * spec.vocab_size / (HBM * gpu.hbm)
    step = max(read, products, launched) + summed + sampled
    return prefill + waves * work.response_tokens * step + _moved(job, role, gpu, all_parts=False)
