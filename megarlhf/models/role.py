"""A model with a part to play: frozen or trainable, resident or away. Knows nothing about PPO."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from numpy.typing import NDArray
from torch import Tensor

from megarlhf.batch.base import TokenRows
from megarlhf.models.compute import Compute
from megarlhf.models.fp8 import drop_fp8_copies, fp8_copies
from megarlhf.models.lora import LoraConfig, attach, draw, merge
from megarlhf.models.memory_plan import Held, Learns, held
from megarlhf.models.optim import OptimConfig, build_optimizer, build_schedule, ddp_config, guarded_step
from megarlhf.models.readings import Reading
from megarlhf.models.spec import ModelSpec
from megarlhf.models.transformer import HeadKind, LlamaModel, build_chunks
from megarlhf.parallel.collectives import check_divides, gather, own_part, own_share
from megarlhf.parallel.gradients import gather_head, gather_weights, gradient_buffers
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Cut, InTokens, Loss, LossSums, States, ends_of
from megarlhf.parallel.offload import Offloader, resident_bytes, unique_storages
from megarlhf.parallel.pipeline import LossMeans, forward_backward, forward_only

Part = Literal["weights", "gradients", "optimizer"]
Offload = Literal["host", "none"]


@dataclass(frozen=True)
class RoleSettings:
    """What all roles of a run share."""

    compute: Compute
    cut: Cut
    """What one forward takes on one data rank."""
    offload: Offload


@dataclass(frozen=True)
class _Own:
    """What a data rank has of a global batch.

    Shapes:   at [b, T + 1] bool, on the host: where its sequences are read; back [rows of the batch]: where each row is
              in what is gathered of all data ranks, None where it is in its place.
    """

    rows: TokenRows
    at: Tensor
    back: Tensor | None


class Role:
    """A model on the mesh, its weights moved to the host while it is not resident."""

    def __init__(
        self, name: str, spec: ModelSpec, head: HeadKind, reading: Reading, settings: RoleSettings, mesh: Mesh
    ) -> None:
        self.name = name
        self.spec = spec
        self.head: HeadKind = head
        self.reading = reading
        self.settings = settings
        self.mesh = mesh
        self.chunks = build_chunks(spec, head, settings.compute, mesh)
        self.lora: LoraConfig | None = None
        self.version = 0
        """Counts the times that weights were loaded or moved by a step: what was made of them before is out of date."""
        self._offloaders = {part: Offloader(keep_contents=part != "gradients") for part in self.parts}

    @property
    def parts(self) -> tuple[Part, ...]:
        """What this role keeps in memory."""
        return ("weights",)

    @property
    def model(self) -> LlamaModel:
        """The chunk that holds the head where this rank is the last stage."""
        return self.chunks[-1]

    def tensors(self, part: Part) -> list[Tensor]:
        """This rank's tensors of `part`; none where the role has no such part."""
        return [p.data for chunk in self.chunks for p in chunk.parameters()] if part == "weights" else []

    @property
    def learns(self) -> Learns | None:
        """How the role learns, if it does."""
        return None

    @property
    def planned(self) -> Held:
        """Bytes of each part on this rank, resident or not (state: once it exists)."""
        parameters = [parameter for chunk in self.chunks for parameter in chunk.parameters()]
        numbers = sum(parameter.numel() for parameter in parameters)
        learnt = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        return held(numbers, self.settings.compute.dtype.itemsize, self.learns, learnt)

    def adapt(self, lora: LoraConfig) -> None:
        """Put adapters beside the model's matrices, their numbers to be loaded or drawn."""
        attach(self.chunks, lora)
        self.lora = lora

    def merge(self) -> None:
        """Make the adapters part of the model's own weights."""
        merge(self.chunks)
        self.lora = None

    def resident_bytes(self) -> int:
        """Bytes of this role on the device now."""
        copies = fp8_copies(self.chunks) if self.settings.compute.fp8 else []
        return resident_bytes([*copies, *(tensor for part in self.parts for tensor in self.tensors(part))])

    def score(self, batch: TokenRows) -> Tensor:
        """What the role's reading says of every row: [B, T] or [B] fp32.

        Ranks:    collective over the mesh; every rank passes the same batch and gets the same numbers.
        """
        return self.read(batch, self.reading)

    def read(self, batch: TokenRows, reading: Reading, *, dealt_as: Role | None = None) -> Tensor:
        """What another reading says of every row. Ranks as in `score`.

        dealt_as: whose cost decides which rows a data rank has where they are packed; this role's by default.
        """
        own = self._begin(batch, reading, passes=1, dealt_as=dealt_as)
        with self.resident("weights"):
            # Fewer rows than data ranks leave some without any.
            rows, at = own.rows, own.at
            numbers = (
                self._numbers_at(rows, at, reading) if len(rows) else torch.zeros(at.shape, device=self.mesh.device)
            )
        scores = gather(reading.scores(numbers, rows), self.mesh, "data")
        return scores if own.back is None else scores[own.back.to(scores.device)]

    def _numbers_at(self, own: TokenRows, at: Tensor, reading: Reading) -> Tensor:
        return forward_only(
            self.chunks,
            own,
            at,
            lambda states, rows: reading(self.model, states, rows),
            mesh=self.mesh,
            cut=self.settings.cut,
        )

    @contextmanager
    def resident(self, *parts: Part) -> Iterator[None]:
        """Hold `parts` (default: weights) on the device inside the block. Nested blocks move nothing twice."""
        wanted: Sequence[Part] = parts if parts else ["weights"]
        arrived: list[Part] = [part for part in wanted if self._offloaders[part].is_away]
        for part in arrived:
            self._offloaders[part].to_device()
        try:
            yield
        finally:
            for part in arrived:
                self._send_away(part)

    def leave(self) -> None:
        """Move everything to the host until `resident` asks for it; with `offload: none` everything stays."""
        if self.settings.offload == "host":
            for part in self.parts:
                if not self._offloaders[part].is_away:
                    self._send_away(part)

    def _send_away(self, part: Part) -> None:
        self._offloaders[part].to_host(self._movable(part))
        if part == "weights" and self.settings.compute.fp8:
            drop_fp8_copies(self.chunks)

    def _begin(self, batch: TokenRows, reading: Reading, *, passes: int, dealt_as: Role | None = None) -> _Own:
        """This data rank's rows of a global batch, which is counted as work.

        passes: of the whole batch through the model, for which it is counted; backward is two.
        """
        at = reading.at(batch).cpu()
        reads: NDArray[np.bool_] = np.asarray(at)
        costs = self._costs(reads, len(batch))
        self.mesh.work.spend(tokens=int(ends_of(reads).sum()), flops=passes * sum(costs))
        part, back = own_part(len(batch), self.mesh), None
        if isinstance(self.settings.cut, InTokens) and self.mesh.size("data") > 1:
            part, back = own_share(dealt_as._costs(reads, len(batch)) if dealt_as else costs, self.mesh)
        own, trail = batch.rows(part), self.mesh.trail
        trail.role, trail.work, trail.part = self.name, own, self.mesh.data_rank
        return _Own(own, at.view(len(batch), -1, at.shape[1])[part].flatten(0, 1), back)

    def _costs(self, reads: NDArray[np.bool_], rows: int) -> list[int]:
        """Of each row, the FLOPs of one forward. reads [sequences, T + 1]: the positions that are read."""
        ends = ends_of(reads).reshape(rows, -1)
        projected = reads.reshape(rows, -1).sum(axis=1) if self.head == "language" else np.zeros(rows, dtype=np.int64)
        keys = (ends * (ends + 1) // 2).sum(axis=1)
        each = zip(ends.sum(axis=1).tolist(), keys.tolist(), projected.tolist(), strict=True)
        return [self.spec.forward_flops(*numbers) for numbers in each]

    def _movable(self, part: Part) -> list[Tensor]:
        """`tensors(part)` without those whose storage belongs to the weights."""
        if part == "weights":
            return self.tensors(part)
        weights = {storage.data_ptr() for storage in unique_storages(self.tensors("weights"))}
        return [tensor for tensor in self.tensors(part) if tensor.untyped_storage().data_ptr() not in weights]


class FrozenRole(Role):
    """A role that is only ever read: the reference, the reward model."""

    def __init__(
        self, name: str, spec: ModelSpec, head: HeadKind, reading: Reading, settings: RoleSettings, mesh: Mesh
    ) -> None:
        super().__init__(name, spec, head, reading, settings, mesh)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()


@dataclass(frozen=True)
class Update:
    """What one optimiser step did."""

    means: LossMeans
    grad_norm: float
    learning_rate: float
    stepped: bool
    """False when the loss or the gradient was not finite and every rank left its weights alone."""


class TrainableRole(Role):
    """A role with gradients and an optimiser: the actor, the critic, a model under supervision."""

    def __init__(
        self, name: str, spec: ModelSpec, head: HeadKind, reading: Reading, settings: RoleSettings, mesh: Mesh
    ) -> None:
        super().__init__(name, spec, head, reading, settings, mesh)
        self.wrapped: list[DistributedDataParallel] = []
        self._blocks = 0
        """Of `resident` that are open."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """What this role keeps in memory."""
        return ("weights", "gradients", "optimizer")

    def learn_adapters(self, lora: LoraConfig, seed: int) -> None:
        """Have adapters learn in place of the model's own weights, which are loaded; they add nothing yet.

        A scalar head learns as well. seed: the run's; a role draws numbers of its own from it.
        """
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            if self.head == "scalar" and chunk.post_process:
                chunk.output_layer.requires_grad_(True)
        self.adapt(lora)
        draw(self.chunks, self.spec, (seed, self.name), self.mesh.tensor_rank, self.mesh.size("tensor"))

    def prepare(self, optim: OptimConfig, steps: int) -> None:
        """Wrap for training and build the optimiser, once the weights are loaded. `steps`: optimiser steps to come."""
        self.optim = optim
        ddp, config = ddp_config(optim, self.settings.compute), self.model.config
        self.wrapped = [
            DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0, pg_collection=self.mesh.groups)
            for i, chunk in enumerate(self.chunks)
        ]
        if ddp.overlap_grad_reduce:
            self.model.says_gradients = True
            alone: Any = [wrapped.no_sync for wrapped in self.wrapped]
            config.no_sync_func = alone if len(alone) > 1 else alone[0]
        self._gather()
        config.finalize_model_grads_func = partial(finalize_model_grads, pg_collection=self.mesh.groups)
        self.optimizer = build_optimizer(optim, self.wrapped, self.settings.compute, self.mesh)
        self.schedule = build_schedule(optim, self.optimizer, steps)

    @property
    def learns(self) -> Learns:
        """How the role learns."""
        return Learns(self.optim.distributed, self.mesh.size("loss"))

    def tensors(self, part: Part) -> list[Tensor]:
        """This rank's tensors of `part`."""
        if part == "weights":
            return super().tensors(part)
        if part == "gradients":
            return [buffer for wrapped in self.wrapped for buffer in gradient_buffers(wrapped)]
        state = [value for _, values in self.optimizer.state.items() for value in values.values()]
        masters = self.optimizer.get_parameters()
        here = self.mesh.device.type  # the hybrid optimiser has some on the host
        every = [tensor for tensor in [*masters, *state] if isinstance(tensor, Tensor) and tensor.ndim]
        return [tensor for tensor in every if tensor.device.type == here]

    @contextmanager
    def resident(self, *parts: Part) -> Iterator[None]:
        """As of any role. Where gathering overlaps, a step leaves weights to the next forward inside the same block;
        who else asks for them finds them whole."""
        self._gather()
        self._blocks += 1
        try:
            with super().resident(*parts):
                yield
                self._gather()
        finally:
            self._blocks -= 1

    def _gather(self) -> None:
        """Collective over the data ranks where a step left weights to be gathered."""
        if self.settings.compute.overlap_param_gather:
            for wrapped in self.wrapped:
                gather_weights(wrapped)

    def update(self, batch: TokenRows, loss: Loss) -> Update:
        """One optimiser step on `batch`, the global one.

        Ranks:    collective over the mesh; every rank passes the same batch and gets the same result.
        Raises:   ValueError where the rows do not divide over data ranks.
        """
        with super().resident(*self.parts):
            for wrapped in self.wrapped:
                wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
            means = self.accumulate(batch, loss, self.settings.cut)
            norm, stepped = guarded_step(self.optimizer, means.loss, self.optim.max_grad_norm)
            if not self._blocks:
                self._gather()
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if stepped:
            self.version += 1
            self.schedule.step(increment=1)
        return Update(means=means, grad_norm=norm, learning_rate=learning_rate, stepped=stepped)

    def accumulate(self, batch: TokenRows, loss: Loss, cut: Cut, *, everywhere: bool = False) -> LossMeans:
        """Add the gradient of the mean loss over the global `batch` to the role's buffers, which must be resident.

        cut: what one forward takes on one data rank; which rows that has is for the settings to say. everywhere: all of
        the gradient on every rank that has the weight, and not the shard alone that it takes its step on.
        Ranks and errors as in `update`.
        """
        check_divides(batch, self.mesh)
        # Of frozen weights backward makes no gradients; the adapters' own products are few.
        own = self._begin(batch, self.reading, passes=3 if self.lora is None else 2)

        def judge(states: States, rows: TokenRows) -> LossSums:
            if self.settings.compute.overlap_param_gather:
                gather_head(self.wrapped[-1], self.model.head_weight)
            return loss(states, rows)

        return forward_backward(self.wrapped, own.rows, own.at, judge, mesh=self.mesh, cut=cut, everywhere=everywhere)
