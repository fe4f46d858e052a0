"""Ways to split a run over GPUs: which are allowed, which fit, and how long each would take."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import log2

from megarlhf.errors import ConfigError, LayoutError
from megarlhf.models.gpus import GIB, Gpu
from megarlhf.models.phases import PhaseBytes, phases_of, rows_at_once
from megarlhf.models.recompute import Recompute, check_recompute, most_layers
from megarlhf.models.step_time import Seconds, model_flops, rollout_seconds, seconds_of
from megarlhf.models.workload import Job, Split
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.micro_batches import Cut, InRows, InTokens, sequence_multiple
from megarlhf.rollout.sampling import RolloutConfig, RolloutLayout, check_drawn_by, check_rolls_out
from megarlhf.runtime.checks import check_batch, check_cut

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
"""Rows; where tokens are counted, a budget holds so many of the greatest length."""
TENSOR = (1, 2, 4, 8)
VIRTUAL = (1, 2, 3, 4, 5, 6, 8, 10)
CONTEXT = (2, 4, 8, 16, 32)
CHUNK = 256
"""Tokens of a sequence's chunk below which context ranks are not tried: products of so few are slow."""


@dataclass(frozen=True)
class Machine:
    """What a run is planned for."""

    gpu: Gpu
    spare: float
    """GiB of each GPU that are kept free."""

    @property
    def memory(self) -> int:
        """Bytes of a GPU that the run may use."""
        return self.gpu.bytes - int(self.spare * GIB)


@dataclass(frozen=True)
class Option:
    """A split, and what it would take."""

    job: Job
    phases: Sequence[PhaseBytes]
    memory: int
    """That the run may use, of a GPU."""
    seconds: Seconds
    flops: int
    """Of the model in an iteration, over all GPUs."""

    @property
    def split(self) -> Split:
        """How the run is cut."""
        return self.job.split

    @property
    def peak(self) -> PhaseBytes:
        """The phase that takes most."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool:
        """Whether every phase does. A cache takes what is there, but must hold a row."""
        draws = self.job.work.drawing is not None
        return self.peak.total <= self.memory and (not draws or rows_at_once(self.job, self.memory) > 0)

    @property
    def gpus(self) -> int:
        """That it needs."""
        return self.split.layout.world_size


def option(job: Job, machine: Machine) -> Option:
    """What a split would take. Its times are infinite where it does not fit."""
    memory = machine.memory
    phases = phases_of(job, memory)
    found = Option(job, phases, memory, Seconds(*[float("inf")] * 3), model_flops(job))
    return replace(found, seconds=seconds_of(job, machine.gpu, memory)) if found.fits else found


def check_split(job: Job) -> None:
    """Raise LayoutError or ConfigError where models, batches or rollouts do not allow a split."""
    work, split = job.work, job.split
    split.layout.check()
    for role in work.roles:
        spec = job.specs[role.name]
        spec.check_layout(split.layout, role.setting)
        spec.check_fp8(split.layout, job.fp8_multiple)
        if role.learns:
            check_recompute(split.recompute, spec, split.layout, role.setting)
    check_batch(work.step_setting, work.step_rows, split.layout, split.cut)
    longest = work.sequences * work.width
    check_cut("a row as long as settings allow", longest, split.cut, split.layout, job.fp8_multiple)
    _check_drawing(job)


def _check_drawing(job: Job) -> None:
    """Raise LayoutError or ConfigError where rollouts cannot be drawn so."""
    work, split = job.work, job.split
    if work.drawing is None:
        return
    other, actor = split.elsewhere, work.roles[0]
    axes = None if other is None else RolloutLayout(tensor=other.tensor, data=other.data)
    rollout = RolloutConfig(keep=work.drawing.keep, layout=axes)
    check_rolls_out(split.layout, rollout, offload="host" if split.offload else "none", fp8=job.fp8)
    check_drawn_by(job.specs[actor.name], split.layout, rollout, actor.setting)


def is_allowed(job: Job) -> bool:
    """Whether `check_split` has nothing to say."""
    return _passes(check_split, job)


def _passes(check: Callable[[Job], None], job: Job) -> bool:
    try:
        check(job)
    except (LayoutError, ConfigError):
        return False
    return True


def options(job: Job, gpus: int, machine: Machine) -> list[Option]:
    """Every split of a run over `gpus` that is allowed, the fastest first and those that do not fit last, smallest
    first; empty where there is none."""
    found = [spared for plain in _allowed(job, gpus, machine) for spared in _sparing(plain, machine)]
    return sorted(found, key=lambda each: (not each.fits, each.seconds.total if each.fits else each.peak.total))


def _allowed(job: Job, gpus: int, machine: Machine) -> Iterator[Job]:
    for layout, offload in product(_layouts(job, gpus, machine.gpu), (True, False)):
        for at, cut in enumerate(_cuts(job, layout)):
            if not at:
                other = _elsewhere(job.splitting(Split(layout, cut, "none", offload)), machine)
            plain = job.splitting(Split(layout, cut, "none", offload, other))
            if is_allowed(plain):
                yield plain


def _elsewhere(plain: Job, machine: Machine) -> ParallelLayout | None:
    """Where a run that draws in a layout of its own is drawn the fastest, memory allowing; else that of training.

    Micro-batches and recomputation do not matter to it.
    """
    if plain.work.elsewhere is None:
        return None
    layout, ranks = plain.split.layout, plain.split.layout.world_size
    sizes = [size for size in TENSOR if size <= machine.gpu.node and ranks % size == 0]
    others = [ParallelLayout(tensor=size, data=ranks // size, elastic=layout.elastic) for size in sizes]
    jobs = [plain.splitting(replace(plain.split, elsewhere=each)) for each in others if each != layout.drawing]
    return min(
        (job for job in [plain, *jobs] if _passes(_check_drawing, job)),
        key=lambda job: rollout_seconds(job, machine.gpu, machine.memory),
        default=plain,
    ).split.elsewhere


def _cuts(job: Job, layout: ParallelLayout) -> list[Cut]:
    """Micro-batches of rows or of tokens, as the run has them; of tokens no more than an optimiser step has."""
    own, work = job.split.cut, job.work
    if isinstance(own, InRows):
        return [InRows(rows) for rows in sorted({*MICRO_BATCHES, own.rows})]
    row, multiple = work.sequences * work.width, sequence_multiple(1, layout, job.fp8_multiple)
    budgets = {-(-rows * row // multiple) * multiple for rows in MICRO_BATCHES if rows * layout.data <= work.step_rows}
    return [InTokens(tokens) for tokens in sorted({*budgets, own.tokens})]


def _sparing(plain: Job, machine: Machine) -> Iterator[Option]:
    """What a split takes with nothing and with all computed again; where only the latter fits, with as little as does.

    Each layer more is less memory and more time, so of numbers of layers the least that fits is the one to know.
    """

    def again(recompute: Recompute) -> Option:
        return option(plain.splitting(replace(plain.split, recompute=recompute)), machine)

    nothing, everything = again("none"), again("full")
    yield nothing
    yield everything
    if nothing.fits or not everything.fits:
        return
    yield again("selective")
    layout = plain.split.layout
    most = min(most_layers(plain.specs[role.name], layout) for role in plain.work.roles if role.learns)
    fewest = bisect_left(range(1, most), True, key=lambda layers: again(layers).fits) + 1
    if fewest < most:
        yield again(fewest)


def _layouts(job: Job, gpus: int, gpu: Gpu) -> Iterator[ParallelLayout]:
    """Tensor ranks stay inside a node, and split activations too, which costs nothing."""
    interleaved = VIRTUAL if job.work.drawing is None else (1,)
    for tensor in (size for size in TENSOR if size <= gpu.node and gpus % size == 0):
        for pipeline in (size for size in range(1, gpus // tensor + 1) if gpus // tensor % size == 0):
            copies = gpus // tensor // pipeline
            contexts = [size for size in CONTEXT if copies % size == 0 and job.work.width >= 2 * size * CHUNK]
            for context, virtual in product([1, *contexts], interleaved if pipeline > 1 else (1,)):
                yield ParallelLayout(
                    tensor=tensor,
                    pipeline=pipeline,
                    context=context,
                    data=copies // context,
                    sequence_parallel=tensor > 1,
                    virtual_pipeline=virtual,
                    elastic=job.split.layout.elastic,
                )


def numbers_of_gpus(job: Job, gpus: int, machine: Machine) -> list[int]:
    """The nearest numbers of GPUs below and above `gpus` over which the run may be split."""
    below = next((count for count in range(gpus - 1, 0, -1) if _any(job, count, machine)), None)
    above = next((count for count in range(gpus + 1, 2 * gpus + 9) if _any(job, count, machine)), None)
    return [count for count in (below, above) if count is not None]


def _any(job: Job, gpus: int, machine: Machine) -> bool:
    return next(_allowed(job, gpus, machine), None) is not None


def fitting_gpus(job: Job, gpus: int, machine: Machine) -> Option | None:
    """The fastest split over the fewest GPUs, a power of two times `gpus`, that fits; None up to 64 times as many."""
    for count in (gpus << power for power in range(1, 7)):
        best = next(iter(options(job, count, machine)), None)
        if best is not None and best.fits:
            return best
    return None


def changes(before: Split, after: Split) -> dict[str, str]:
    """Settings that differ between two splits, as `after` has them."""
    names = _spelled(before)
    return {name: value for name, value in _spelled(after).items() if names.get(name) != value}


def _spelled(split: Split) -> dict[str, str]:
    layout = {f"layout.{name}": str(value).lower() for name, value in split.layout}
    axes, other = "rollout.layout", split.elsewhere
    drawn = {axes: "null"} if other is None else {f"{axes}.tensor": str(other.tensor), f"{axes}.data": str(other.data)}
    return {
        **layout,
        **drawn,
        split.counted: str(split.count),
        "compute.recompute": str(split.recompute),
        "offload": "host" if split.offload else "none",
    }


def nearest(found: Sequence[Option], split: Split) -> Option | None:
    """Of the options that fit, the one that is least far from `split`; of several the fastest."""
    fitting = [each for each in found if each.fits]
    return min(fitting, key=lambda each: (distance(split, each.split), each.seconds.total), default=None)


def distance(one: Split, other: Split) -> float:
    """Between two splits: how often numbers are doubled or halved, and what is switched but sequence parallelism."""
    axes = dict(other.layout)
    sizes = [(size, axes[name]) for name, size in one.layout if not isinstance(size, bool)]
    doubled = sum(abs(log2(a / b)) for a, b in [*sizes, (one.count, other.count)])
    switched = (one.elsewhere is None) != (other.elsewhere is None)
    return doubled + switched + (one.recompute != other.recompute) + (one.offload != other.offload)


def best_of_each(found: Sequence[Option], most: int) -> list[Option]:
    """The fastest option of each layout that fits, up to `most`."""
    by_layout: dict[str, Option] = {}
    for each in found:
        if each.fits:
            by_layout.setdefault(str(each.split.layout), each)
    return list(by_layout.values())[:most]
