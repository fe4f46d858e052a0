"""Bytes of the most loaded GPU in each phase of an iteration: what is resident then, and what passes through it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from megarlhf.models.activations import Passing, Shape, learning, scoring
from megarlhf.models.memory_plan import (
    BUCKET,
    CUDA_BLOCK_TOKENS,
    Held,
    Learns,
    adapter_sizes,
    cache_bytes_per_token,
    cache_row_bytes,
    held,
    layer_sizes,
    learnt_of,
    numbers_of,
    pieces_of,
    pinned_bytes,
    rows_that_fit,
    saved_bytes,
    weight_sizes,
)
from megarlhf.models.workload import Drawing, Job, RoleWork
from megarlhf.parallel.layout import ParallelLayout

SAMPLING_BYTES = 20
"""A row and column of the vocabulary while tokens are drawn: logits in half precision, three fp32 tensors made of them
and a running sum in fp64."""
FP8_COPIES = 2
"""Bytes a weight of the layers, beside the weight itself: as it is, and transposed. Source: Transformer Engine."""


LEARNING = ("optimise", "train")
"""The phases in which something learns: of a run that draws rollouts, and of any other."""
NOTHING = Passing(0, 0, 0)


@dataclass(frozen=True)
class PhaseBytes:
    """Bytes of a phase on the pipeline rank where they are most."""

    phase: str
    role: str
    rank: int
    """Of the pipeline."""
    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    cache: int = 0
    """Of keys and values, or what a save gathers."""

    @property
    def name(self) -> str:
        """Phase and role."""
        return f"{self.phase} {self.role}"

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimiser + self.activations + self.logits + self.cache


def role_bytes(job: Job, role: RoleWork, rank: int) -> Held:
    """What a role keeps on pipeline rank `rank`."""
    layout, spec, lora = job.split.layout, job.specs[role.name], role.lora
    if role.beside:
        return Held(0)
    numbers = numbers_of(spec, role.head, layout, rank) + sum(adapter_sizes(spec, layout, rank, lora))
    learnt = learnt_of(spec, role.head, layout, rank, lora)
    return held(numbers, job.arithmetic.itemsize, learns_of(job, role), learnt)


def read_from(job: Job, role: RoleWork) -> RoleWork:
    """The role whose weights are there while this one is read: itself, but for a reference without any."""
    return next((each for each in job.work.roles if each.name == role.beside), role)


def learns_of(job: Job, role: RoleWork) -> Learns | None:
    """How a role learns, if it does."""
    return Learns(role.distributed, job.split.layout.drawing.data) if role.learns else None


def phases_of(job: Job, memory: int) -> list[PhaseBytes]:
    """Every phase in the order of an iteration; `memory`: bytes of a GPU that the run may use."""
    last = job.split.layout.pipeline - 1
    # Ranks between have the layers of the second, and keep fewer micro-batches.
    by_rank = [list(_phases(job, rank, memory)) for rank in sorted({0, min(1, last), last})]
    return [max(same, key=lambda phase: phase.total) for same in zip(*by_rank, strict=True)]


def _phases(job: Job, rank: int, memory: int) -> Iterator[PhaseBytes]:
    drawing = job.work.drawing
    if drawing is None:
        yield from _taught(job, rank)
        return
    if job.split.elsewhere is not None:
        yield _refit(job, rank)
    drawn = _rollout(job, drawing, rank, memory)
    yield drawn
    copy, cache = (copy_bytes(job), drawn.cache) if drawing.keep else (0, 0)
    for phase in _taught(job, rank):
        yield replace(phase, weights=phase.weights + copy, cache=phase.cache + cache)


def _taught(job: Job, rank: int) -> Iterator[PhaseBytes]:
    """The phases in which nothing is drawn."""
    work = job.work
    for role in work.roles:
        if role.scores:
            passing = scoring(shape_of(job, role), role.head, job.fullest(role, work.rows), rank)
            yield _phase(job, "score", role, rank, passing, here=())
    learnt = LEARNING[work.drawing is None]
    for role in work.roles:
        if role.learns:
            tokens = job.fullest(role, work.step_rows)
            micro_batches = math.ceil(job.micro_batches(role, work.step_rows))
            passing = learning(shape_of(job, role), role.head, tokens, rank, micro_batches, role.loss)
            yield _phase(job, learnt, role, rank, passing, here=("gradients", "optimiser"))
    for role in work.roles:
        if role.learns:
            gathered = role_bytes(job, role, rank).gathered
            yield _phase(job, "save", role, rank, NOTHING, here=("optimiser",), cache=gathered)


def shape_of(job: Job, role: RoleWork) -> Shape:
    """The role's model as it is cut."""
    return Shape(job.specs[role.name], job.split.layout, job.arithmetic)


def _phase(
    job: Job, phase: str, role: RoleWork, rank: int, passing: Passing, *, here: Collection[str], cache: int = 0
) -> PhaseBytes:
    """here: which parts are on the device beside the weights. Without offloading all of every role is."""
    away = job.split.offload
    roles = [role_bytes(job, each, rank) for each in ([read_from(job, role)] if away else job.work.roles)]
    copies = _fp8_copies(job, role, job.split.layout, rank)
    return PhaseBytes(
        phase,
        role.name,
        rank,
        weights=sum(each.weights for each in roles) + copies,
        gradients=sum(each.gradients for each in roles) if "gradients" in here or not away else 0,
        optimiser=sum(each.optimiser for each in roles) if "optimiser" in here or not away else 0,
        activations=passing.kept + passing.working,
        logits=passing.logits,
        cache=cache,
    )


def _fp8_copies(job: Job, role: RoleWork, layout: ParallelLayout, rank: int) -> int:
    spec = job.specs[role.name]
    layers = sum(piece.layers for piece in pieces_of(spec, layout, rank))
    return FP8_COPIES * layers * sum(layer_sizes(spec, layout.tensor)[:4]) if job.fp8 else 0


def copy_bytes(job: Job) -> int:
    """Weights of the copy that is drawn from, on every rank; 0 where the model that learns is drawn from."""
    role, other = job.work.roles[0], job.split.elsewhere
    if other is None:
        return 0
    spec = job.specs[role.name]
    numbers = numbers_of(spec, role.head, other, 0) + sum(adapter_sizes(spec, other, 0, role.lora))
    return job.arithmetic.itemsize * numbers


def _refit(job: Job, rank: int) -> PhaseBytes:
    """The copy is filled: the model that learns is there too, and a bucket that is sent and one that arrives."""
    found, copy = _phase(job, "refit", job.work.roles[0], rank, NOTHING, here=()), copy_bytes(job)
    return replace(found, weights=found.weights + copy, activations=2 * min(BUCKET, copy))


def _drawing(job: Job, rank: int, passing: Passing = NOTHING, cache: int = 0) -> PhaseBytes:
    """What is there while responses are drawn. The model that a copy was filled from has left, unless it stays."""
    role, other = job.work.roles[0], job.split.elsewhere
    found = _phase(job, "rollout", role, rank, passing, here=(), cache=cache)
    if other is None:
        return found
    stays = 0 if job.split.offload else sum(role_bytes(job, each, rank).weights for each in job.work.roles)
    return replace(found, weights=stays + copy_bytes(job) + _fp8_copies(job, role, other, 0))


def _drawing_rank(job: Job, rank: int) -> int:
    """The stage that pipeline rank `rank` is while rollouts are drawn."""
    return rank if job.split.elsewhere is None else 0


def _rollout(job: Job, drawing: Drawing, rank: int, memory: int) -> PhaseBytes:
    role, layout = job.work.roles[0], job.split.drawing
    share = -(-drawing.prompts // layout.data) * job.work.prompt_tokens
    columns = job.specs[role.name].vocab_size if _drawing_rank(job, rank) == layout.pipeline - 1 else 0
    shape = Shape(job.specs[role.name], layout, job.arithmetic)
    prefill = round(shape.forward(min(drawing.prefill_tokens, share)))
    rows = rows_at_once(job, memory)
    passing = Passing(0, prefill, SAMPLING_BYTES * rows * columns)
    cache = rows * _cache_row(job, rank)
    return _drawing(job, rank, passing, cache)


def _cache_row(job: Job, rank: int) -> int:
    role, layout = job.work.roles[0], job.split.drawing
    spec = job.specs[role.name]
    layers = sum(piece.layers for piece in pieces_of(spec, layout, _drawing_rank(job, rank)))
    per_token = cache_bytes_per_token(spec, layers, layout.tensor, job.arithmetic.itemsize)
    return cache_row_bytes(job.work.width, CUDA_BLOCK_TOKENS, per_token)


def rows_at_once(job: Job, memory: int) -> int:
    """Responses that a data rank decodes at once: as many as the run asks for and every rank's memory has room for, a
    multiple of what its tensor ranks and FP8 share evenly."""
    drawing, layout = job.work.drawing, job.split.drawing
    if drawing is None:
        return 0
    multiple = layout.tensor * job.fp8_multiple
    fits = []
    for rank in sorted({0, job.split.layout.pipeline - 1}):
        free = memory - _drawing(job, rank).total
        fits.append(rows_that_fit(free, drawing.memory_share, _cache_row(job, rank)) // multiple)
    wanted = min(drawing.rows, -(-job.work.rows // layout.data))
    return multiple * min(-(-wanted // multiple), *fits)


@dataclass(frozen=True)
class Elsewhere:
    """Bytes that are not on a GPU."""

    away: int
    """Of host memory on one rank, while every model waits there."""
    pinned: int
    """The same as torch pins it: each block in a power of two."""
    staged: int
    """More, of host memory on one rank, while the largest learner is saved."""
    state: int
    """Of a saved state on disk, over all ranks."""
    model: int
    """Of the trained model on disk."""


def elsewhere(job: Job) -> Elsewhere:
    """What the most loaded rank has on its host, and the run on its disk."""
    layout, work, itemsize = job.split.layout, job.work, job.arithmetic.itemsize
    first = work.roles[0]
    ranks = range(layout.pipeline)
    held_by = {rank: [role_bytes(job, role, rank) for role in work.roles] for rank in ranks}
    away = [sum(each.weights + each.optimiser for each in roles) for roles in held_by.values()]
    pinned = [sum(_pinned(job, role, rank) for role in work.roles) for rank in ranks]
    state = 0
    for role in work.roles:
        learns = learns_of(job, role)
        if learns is not None:
            parts = (saved_bytes(role_bytes(job, role, rank), learns) for rank in ranks)
            state += layout.tensor * learns.copies * sum(parts)
    return Elsewhere(
        away=max(away) if job.split.offload else 0,
        pinned=max(pinned) if job.split.offload else 0,
        staged=max(each.staged for roles in held_by.values() for each in roles),
        state=state,
        model=itemsize
        * layout.tensor
        * sum(numbers_of(job.specs[first.name], first.head, layout, rank) for rank in ranks),
    )


def _pinned(job: Job, role: RoleWork, rank: int) -> int:
    """Weights that learn are one block, those that are only read one each; of state a rank has its share."""
    layout, itemsize, spec = job.split.layout, job.arithmetic.itemsize, job.specs[role.name]
    if role.beside:
        return 0
    read, learnt = weight_sizes(spec, role.head, layout, rank), adapter_sizes(spec, layout, rank, role.lora)
    learns = learns_of(job, role)
    if learns is None:
        return pinned_bytes([itemsize * size for size in read])
    if role.lora is None:
        read, learnt = [], read
    state = pinned_bytes([4 * size for size in learnt]) * (3 if itemsize < 4 else 2)
    weights = pinned_bytes([*(itemsize * size for size in read), itemsize * sum(learnt)])
    return weights + state // learns.shares
