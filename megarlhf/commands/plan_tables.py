"""What `megarlhf plan` prints: bytes by role and phase, the verdict, the fastest layouts, and what was assumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from rich import box
from rich.table import Table

from megarlhf.models.phases import LEARNING, elsewhere, role_bytes, rows_at_once
from megarlhf.models.recompute import Recompute
from megarlhf.models.step_time import ASSUMPTIONS
from megarlhf.models.workload import Job, RoleWork, Split
from megarlhf.parallel.micro_batches import InTokens
from megarlhf.runtime.layouts import Machine, Option, best_of_each
from megarlhf.runtime.layouts import option as planned

SHOWN = 6
"""Layouts."""
HOW: tuple[Recompute, ...] = ("none", "selective", "full")
"""What of compute.recompute is compared."""
NOT_COUNTED = (
    "memory: every row at its greatest length; attention keeps no scores (Transformer Engine, flash-attn or SDPA); "
    "numbers a token and channel or less are left out, and so are CUDA graphs"
)
PACKED = (
    "micro_batch_tokens: time is that of rows of the greatest length, as many in a budget as it holds, each with "
    "attention to itself alone; memory that of a full budget, of which as great a part is read as of such a row"
)


def pages(
    trainer: str, shown: Option, found: Sequence[Option], machine: Machine, *, own: bool
) -> Iterator[Table | str]:
    """own: `shown` is the run's own layout; else the fastest, or the smallest where none fits."""
    whose = "its own layout" if own else "the fastest layout" if shown.fits else "the smallest layout"
    layers = "Transformer Engine" if shown.job.arithmetic.engine else "local"
    yield f"{trainer} on {shown.gpus} x {machine.gpu.name}, {layers} layers, in {whose}: {said(shown)}\n"
    yield _roles(shown)
    yield _phases(shown)
    yield from _other(shown, machine)
    yield f"\n{verdict(shown, machine)}\n"
    best = best_of_each(found, SHOWN)
    if best:
        yield _layouts(best, machine)
        for line in assumptions(shown.job):
            yield f"* {line}"


def assumptions(job: Job) -> list[str]:
    """Under which the numbers hold."""
    return [*ASSUMPTIONS, NOT_COUNTED, *([PACKED] if isinstance(job.split.cut, InTokens) else [])]


def said(option: Option) -> str:
    """A split in words."""
    split, layout = option.split, option.split.layout
    axes = [f"{name} {value}" for name, value in layout if not isinstance(value, bool) and value > 1]
    words = [" x ".join(axes) or "one rank", f"{split.counted} {split.count:,}"]
    words += ["sequence parallel"] if layout.sequence_parallel else []
    words += _again(split.recompute)
    words += [f"drawn in {_drawn_in(split)}"] if split.elsewhere is not None else []
    return ", ".join([*words, f"offload {'host' if split.offload else 'none'}"])


def _drawn_in(split: Split) -> str:
    """The layout of rollouts."""
    return f"tensor {split.drawing.tensor} x data {split.drawing.data}"


def _again(recompute: Recompute) -> list[str]:
    """What is computed again, if anything is."""
    if isinstance(recompute, int):
        return [f"recompute of {recompute} layers" if recompute > 1 else "recompute of 1 layer"]
    return [] if recompute == "none" else [f"{recompute} recompute"]


def _spared(split: Split) -> str:
    """How memory is."""
    return " and ".join([*_again(split.recompute), *(["offload"] if split.offload else [])]) or "nothing"


def verdict(option: Option, machine: Machine) -> str:
    """Whether it fits, and by how much."""
    peak, most = option.peak, machine.memory
    left = (most - peak.total) / 2**30
    room = f"{machine.gpu.memory:g} GiB less {machine.spare:g} to spare"
    what = f"peak {_gib(peak.total)} GiB in {peak.name}, of {_gib(most)} GiB ({room})"
    if not option.fits and left >= 0:
        return f"DOES NOT FIT: the cache has no room for two responses; {what}"
    return f"fits: {what}, {left:.1f} GiB left" if option.fits else f"DOES NOT FIT: {what}, {-left:.1f} GiB too much"


def _roles(option: Option) -> Table:
    job = option.job
    table = _table(
        "each role, GiB a GPU", "role", "starts from", "parameters", "weights", "gradients", "masters", "moments"
    )
    for role in job.work.roles:
        of = role_bytes(job, role, _largest(job, role))
        sizes = [_gib(size) if size else "-" for size in (of.weights, of.gradients, of.masters, of.moments)]
        table.add_row(role.name, role.init, f"{job.specs[role.name].parameters / 1e9:.2f}e9", *sizes)
    return table


def _largest(job: Job, role: RoleWork) -> int:
    """The pipeline rank on which a role keeps most."""
    return max(range(job.split.layout.pipeline), key=lambda rank: role_bytes(job, role, rank).all)


def _phases(option: Option) -> Table:
    parts = ("weights", "gradients", "optimiser", "activations", "logits", "cache*", "all")
    table = _table("each phase, GiB on the GPU where it takes most", "phase", *parts)
    for phase in option.phases:
        each = (phase.weights, phase.gradients, phase.optimiser, phase.activations, phase.logits, phase.cache)
        style = "bold" if phase is option.peak else None
        sizes = [_gib(size) if size else "-" for size in (*each, phase.total)]
        table.add_row(phase.name, *sizes, style=style)
    table.caption = "* keys and values of rollouts, which take what is there; of a save, what is gathered"
    return table


def _other(option: Option, machine: Machine) -> Iterator[str]:
    job, of = option.job, elsewhere(option.job)
    ranks = min(option.gpus, machine.gpu.node)
    yield from (_recompute(option, how, machine) for how in HOW if how != option.split.recompute)
    if of.away:
        pinned = f"{_gib(ranks * of.pinned)} as torch pins it, in powers of two"
        yield f"host: {_gib(ranks * of.away)} GiB on a node of {ranks} while every model waits there ({pinned});"
        yield f"      {_gib(ranks * of.staged)} GiB more while a state is saved"
    model = f"{_gib(of.model)} GiB the model"
    yield f"disk: {_gib(of.state)} GiB a saved state (keep_last + 1 while one is written), {model}"
    if isinstance(job.split.cut, InTokens):
        yield _filled(job, job.split.cut.tokens)
    if job.work.drawing is not None and option.fits:
        yield f"rollout: {rows_at_once(job, option.memory)} responses at once on each data rank"


def _filled(job: Job, budget: int) -> str:
    """How much of a budget of tokens rows of the greatest length take."""
    role = next(role for role in job.work.roles if role.learns)
    rows = job.together(role)
    taken = job.work.tokens(role, rows).computed
    return (
        f"micro-batches: {rows} of the longest {'row' if rows == 1 else 'rows'} take {taken:,} of {budget:,} tokens, "
        f"{taken / budget:.0%}"
    )


def _recompute(option: Option, how: Recompute, machine: Machine) -> str:
    """What another setting of compute.recompute would make of the learning phases."""
    other = planned(option.job.splitting(replace(option.split, recompute=how)), machine)
    pairs = [(was, now) for was, now in zip(option.phases, other.phases, strict=True) if was.phase in LEARNING]
    said = ", ".join(f"{was.name} {_gib(was.activations)} -> {_gib(now.activations)}" for was, now in pairs)
    peak = f"{_gib(option.peak.total)} -> {_gib(other.peak.total)}"
    return f"with compute.recompute={how} activations: {said} GiB; the peak {peak}"


def _layouts(best: Sequence[Option], machine: Machine) -> Table:
    draws = best[0].job.work.drawing is not None
    title = "the fastest layouts that fit: GiB at the peak, seconds of an iteration, tokens/s a GPU, % of the bf16 peak"
    phases = [*(("rollout",) if draws else ()), "score", "train" if not draws else "optimise", "all"]
    other = any(each.split.elsewhere is not None for each in best)
    where = ["drawn*"] if other else []
    table = _table(title, "tp x pp x cp x dp", *where, "micro", "spared by", "peak", *phases, "tok/s", "MFU")
    table.caption = "* in which layout rollouts are drawn, tp x dp; -: in that of training" if other else None
    for each in best:
        split, seconds = each.split, each.seconds
        layout = split.layout
        virtual = f" (virtual {layout.virtual_pipeline})" if layout.virtual_pipeline > 1 else ""
        timed = [*((seconds.rollout,) if draws else ()), seconds.score, seconds.learn, seconds.total]
        table.add_row(
            f"{layout.tensor} x {layout.pipeline} x {layout.context} x {layout.data}{virtual}",
            *([f"{split.drawing.tensor} x {split.drawing.data}" if split.elsewhere else "-"] if other else []),
            f"{split.count:,}",
            _spared(split),
            _gib(each.peak.total),
            *(f"{second:.1f}" for second in timed),
            f"{tokens_per_second(each):,.0f}",
            f"{100 * utilisation(each, machine):.0f}",
        )
    return table


def tokens_per_second(option: Option) -> float:
    """Of prompts and responses, a GPU."""
    work = option.job.work
    return work.rows * work.sequences * work.width / option.seconds.total / option.gpus


def utilisation(option: Option, machine: Machine) -> float:
    """Model FLOPs of the iteration over the peak of all GPUs in its seconds."""
    return option.flops / option.seconds.total / option.gpus / machine.gpu.flops


def as_json(shown: Option, found: Sequence[Option], machine: Machine, *, own: bool) -> dict[str, Any]:
    """The same for a program, in bytes and seconds."""
    return {
        "gpu": machine.gpu.name,
        "gpus": shown.gpus,
        "own_layout": own,
        "usable_bytes": machine.memory,
        "fits": shown.fits,
        "shown": _as_json(shown, machine),
        "host_and_disk_bytes": vars(elsewhere(shown.job)),
        "layouts": [_as_json(each, machine) for each in best_of_each(found, SHOWN)],
        "assumptions": assumptions(shown.job),
    }


def _as_json(option: Option, machine: Machine) -> dict[str, Any]:
    split = option.split
    timed = {"seconds": {**vars(option.seconds), "total": option.seconds.total}, "mfu": utilisation(option, machine)}
    return {
        "layout": dict(split.layout),
        split.counted: split.count,
        "rollout_layout": None if split.elsewhere is None else dict(split.elsewhere),
        "recompute": split.recompute,
        "offload": split.offload,
        "peak_bytes": option.peak.total,
        "phases": [{**vars(phase), "total": phase.total} for phase in option.phases],
        **(timed if option.fits else {}),
    }


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for column in columns:
        words = column in ("starts from", "spared by")
        table.add_column(column, justify="left" if words else "right", no_wrap=not words)
    return table


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f}"
