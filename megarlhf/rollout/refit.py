"""Rollouts in another layout: a second copy of the weights, filled from the model that learns before it is drawn from.

    trained in     tensor 2 x pipeline 2     rank 0 [ layers 1-2, left half ]     rank 2 [ layers 3-4, left half ]
    drawn from in  tensor 2 x data 2         rank 0 [ all layers, left half ]     rank 2 [ all layers, left half ]

Each rank takes from itself what it has, and the rest from one that has it. `shards.py` says what that is; it is decided
once, and carried out in parts of BUCKET bytes, so that little memory is taken beside both models.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megarlhf.errors import TrainingError
from megarlhf.models.memory_plan import BUCKET
from megarlhf.models.role import FrozenRole, Part, Role
from megarlhf.models.transformer import named_parameters
from megarlhf.observe.metrics import Metrics
from megarlhf.parallel.collectives import all_reduce, exchange, gather_objects
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.offload import Offloader
from megarlhf.rollout.shards import Move, Places, checksum, cut_of, moves_of, numbers_a_word

Weights = Mapping[str, Tensor]
"""This rank's, by name."""


@dataclass
class Refits:
    """What refits have cost since it was last asked."""

    count: int = 0
    seconds: float = 0.0
    received: int = 0
    """Bytes that came from another rank, over all ranks."""

    def metrics(self) -> Metrics:
        """Nothing where there was none; and start afresh."""
        if not self.count:
            return {}
        told = {
            "refit/count": float(self.count),
            "refit/seconds": self.seconds,
            "refit/gb_per_s": self.received / self.seconds / 1e9,
        }
        self.count, self.seconds, self.received = 0, 0.0, 0
        return told


@dataclass(frozen=True)
class _Plan:
    """This rank's part of a refit.

    Ranks:    made by all together; the buckets are of the same weights on each.
    """

    buckets: tuple[tuple[Move, ...], ...]
    rows: dict[str, int]
    """Of each whole weight, along the dimension that it is cut along, without padding."""
    together: dict[str, int]
    """As `numbers_a_word` says."""
    received: int
    """Bytes from other ranks, over all ranks."""


class RolloutCopy(FrozenRole):
    """The weights of `source` in another layout, on the device only while they are drawn from.

    keep: they stay between rollouts, and are filled again once `source` has learnt.
    Memory:   this rank's part of the weights, and while they arrive BUCKET bytes more and the part of `source`, which
              leaves again where it came from.
    """

    def __init__(self, source: Role, layout: ParallelLayout, *, keep: bool) -> None:
        mesh = source.mesh.arranged(layout)
        super().__init__("rollout copy", source.spec, source.head, source.reading, source.settings, mesh)
        if source.lora is not None:
            self.adapt(source.lora)
        self.refits = Refits()
        self._source = source
        self._keep = keep
        self._holds: int | None = None
        """The version of `source`; None of nothing."""
        # What goes is made anew, so that it need not wait on the host.
        self._offloaders: dict[Part, Offloader] = {"weights": Offloader(keep_contents=False)}
        self.leave()

    @contextmanager
    def resident(self, *parts: Part) -> Iterator[None]:
        """Inside, the weights are those that `source` has now. Collective over the world."""
        try:
            self._arrive()
            yield
        finally:
            if not self._keep:
                self.leave()

    def leave(self) -> None:
        """Give the memory back, whatever `offload` says of others."""
        self._holds = None
        if not self._offloaders["weights"].is_away:
            self._send_away("weights")

    def _arrive(self) -> None:
        if self._holds == self._source.version:
            return
        self._holds = None
        if self._offloaders["weights"].is_away:
            self._offloaders["weights"].to_device()
        with self._source.resident("weights"), torch.no_grad():
            self._refit()
        self._holds = self._source.version

    def _refit(self) -> None:
        """Move the weights, check them, and book what it took."""
        plan = self._plan  # which is made once, and not timed
        began = self._now()
        theirs, ours = (dict(named_parameters(role.chunks)) for role in (self._source, self))
        for bucket in plan.buckets:
            _carry_out(bucket, theirs, ours, self)
        self._check(theirs, ours)
        self.refits.seconds += self._now() - began
        self.refits.received += plan.received
        self.refits.count += 1

    def _now(self) -> float:
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @cached_property
    def _plan(self) -> _Plan:
        theirs, ours = (dict(named_parameters(role.chunks)) for role in (self._source, self))
        here, there = (_places(role, names) for role, names in ((self._source, theirs), (self, ours)))
        rows = {name: _rows(name, weight, self) for name, weight in ours.items()}
        moves = list(moves_of(self.mesh.rank, rows, here, there))
        arriving = sum(_bytes(move, ours[move.name]) for move in moves if move.source != self.mesh.rank == move.target)
        received = all_reduce(torch.tensor(arriving, device=self.mesh.device), self.mesh, "world")
        parts = (here.parts, there.parts)
        together = {name: numbers_a_word(name, weight, rows[name], parts) for name, weight in ours.items()}
        return _Plan(_buckets(moves, ours), rows, together, int(received))

    def _check(self, theirs: Weights, ours: Weights) -> None:
        """Compare checksums of each whole weight, of every copy of either model.

        Raises:   TrainingError, on every rank alike, naming the first weight of which two copies differ.
        """
        sums = [self._checksums(theirs, self._source), self._checksums(ours, self)]
        # The largest of a number's complements is the complement of the smallest.
        both = torch.stack([torch.maximum(*(each[row] for each in sums)) for row in (0, 1)])
        high, low = all_reduce(both, self.mesh, "world", "max")
        wrong = [name for name, differs in zip(self._plan.rows, (high != ~low).tolist(), strict=True) if differs]
        if wrong:
            raise TrainingError(
                f"refit of the {self._source.name} to rollout.layout: {len(wrong)} of {len(self._plan.rows)} weights "
                f"differ from those that learn, or between copies of the model, {wrong[0]} first; set "
                "rollout.layout=null to draw in the layout of training, and check the network and memory of these "
                "machines."
            )

    def _checksums(self, weights: Weights, role: Role) -> Tensor:
        """[2, weights] int64: of each whole weight, and their complements; the least there is where there is none."""
        plan, mesh = self._plan, role.mesh
        part, parts = mesh.tensor_rank, mesh.size("tensor")
        numbers = torch.zeros(len(plan.rows), dtype=torch.int64, device=mesh.device)
        for at, (name, rows) in enumerate(plan.rows.items()):
            if name in weights:
                numbers[at] = checksum(name, weights[name], rows, part, parts, together=plan.together[name])
        held = torch.tensor([name in weights for name in plan.rows], device=mesh.device)
        whole = torch.tensor([cut_of(name) is None for name in plan.rows], device=mesh.device)
        numbers = torch.where(whole, numbers, all_reduce(numbers, mesh, "tensor"))
        return torch.stack([numbers, ~numbers]).masked_fill(~held, torch.iinfo(torch.int64).min)


def _places(role: Role, weights: Weights) -> Places:
    """Who has what of the role. Collective over the world."""
    told = gather_objects((role.mesh.tensor_rank, [*weights]), role.mesh, "world")
    return Places(role.mesh.size("tensor"), [part for part, _ in told], [names for _, names in told])


def _rows(name: str, weight: Tensor, role: Role) -> int:
    """Of the whole weight of which this rank has its part."""
    cut = cut_of(name)
    if cut is None:
        return weight.shape[0]
    whole = weight.shape[cut.dim] * role.mesh.size("tensor")
    padded = name in ("embedding.word_embeddings.weight", "output_layer.weight")
    return role.spec.vocab_size if padded else whole


def _bytes(move: Move, weight: Tensor) -> int:
    return weight.numel() // weight.shape[move.dim] * move.length * weight.element_size()


def _buckets(moves: Sequence[Move], ours: Weights) -> tuple[tuple[Move, ...], ...]:
    """The moves of weights that lie next to each other, whole weights of at most BUCKET bytes together, or one."""
    buckets: list[list[Move]] = []
    room = 0
    by_name: dict[str, list[Move]] = {name: [] for name in ours}
    for move in moves:
        by_name[move.name].append(move)
    for name, weight in ours.items():
        size = weight.numel() * weight.element_size()
        if size > room or not buckets:
            buckets.append([])
            room = BUCKET
        buckets[-1] += by_name[name]
        room -= size
    return tuple(map(tuple, buckets))


def _carry_out(moves: Sequence[Move], theirs: Weights, ours: Weights, role: Role) -> None:
    rank = role.mesh.rank
    sends = [
        (theirs[move.name].narrow(move.dim, move.start, move.length).contiguous(), move.target)
        for move in moves
        if move.source == rank != move.target
    ]
    places = [
        (ours[move.name].narrow(move.dim, move.to, move.length), move.source)
        for move in moves
        if move.source != rank == move.target
    ]
    arrivals = [(place if place.is_contiguous() else torch.empty_like(place).contiguous(), of) for place, of in places]
    exchange(sends, arrivals, role.mesh)
    for (place, _), (arrived, _) in zip(places, arrivals, strict=True):
        if arrived is not place:
            place.copy_(arrived)
    for move in moves:
        if move.source == move.target:
            place = ours[move.name].narrow(move.dim, move.to, move.length)
            place.copy_(theirs[move.name].narrow(move.dim, move.start, move.length))
