"""Forward and backward passes over any layout, on Megatron-Core's schedules; the one place that divides losses.

Losses are sums; they and their gradients are divided once, by the count over all micro-batches and data ranks, so no
split can change the result. Context ranks compute the same loss, and each a part of its gradient.

Interleaved stages get micro-batches of one shape: with two pipeline ranks the next stage and the one before are the
same rank, and Megatron-Core 0.16.1 then takes the shape of an activation for that of a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func  # pyright: ignore[reportMissingTypeStubs]
from megatron.core.pipeline_parallel.p2p_communication import (  # pyright: ignore[reportMissingTypeStubs]
    P2PCommunicator,
)
from torch import Tensor

from megarlhf.batch.base import RowsT
from megarlhf.parallel.collectives import all_reduce, broadcast, broadcast_object
from megarlhf.parallel.layout import fp8_multiple
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Cut, Loss, LossSums, MicroBatch, Read, Shapes, split


@dataclass(frozen=True)
class LossMeans:
    """The loss and its metrics over the whole batch, equal on every rank."""

    loss: float
    count: int
    metrics: dict[str, float]


def forward_only(chunks: Sequence[Any], batch: RowsT, at: Tensor, read: Read[RowsT], *, mesh: Mesh, cut: Cut) -> Tensor:
    """Run the model over `batch` without gradients and return what `read` says at the positions `at`.

    Shapes:   at [B, T + 1] bool, of the batch's sequences. Returns [B, T + 1] fp32, 0 where nothing is read.
    Ranks:    the same tensor on every tensor, context and pipeline rank; data ranks pass their own rows.
    """
    parts = split(batch, at, _shapes(chunks, mesh, cut), may_repeat=True)
    result = torch.zeros(at.shape, dtype=torch.float32, device=mesh.device)

    def keep(hidden: Tensor, part: MicroBatch[RowsT]) -> tuple[Tensor, Tensor, None]:
        part.place(read(part.states(hidden, mesh.group("context")), part.rows), result)
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int, device=hidden.device), None

    with torch.no_grad():
        _schedule(chunks, parts, keep, mesh, forward_only=True)
    return broadcast(result, mesh, "pipeline", source=mesh.layout.pipeline - 1)


def forward_backward(
    chunks: Sequence[Any], batch: RowsT, at: Tensor, loss: Loss[RowsT], *, mesh: Mesh, cut: Cut, everywhere: bool
) -> LossMeans:
    """Accumulate the gradient of the mean loss over the global batch into the chunks' gradient buffers.

    everywhere: all of it on every rank; else, with the distributed optimiser, on each its shard, the rest of its own.
    Shapes:   batch: this data rank's B rows of the global batch; at [B, T + 1] bool, of its sequences.
    Ranks:    collective over the mesh; the returned means are equal on every rank.
    """
    parts = split(batch, at, _shapes(chunks, mesh, cut), may_repeat=False)
    losses: list[LossSums] = []

    def judge(hidden: Tensor, part: MicroBatch[RowsT]) -> tuple[Tensor, Tensor, None]:
        sums = loss(part.states(hidden, mesh.group("context")), part.rows)
        losses.append(replace(sums, total=sums.total.detach()))
        # Megatron sums counts over the context ranks too, each of which has seen the whole.
        count = sums.count if mesh.context_rank == 0 else 0
        return sums.total, torch.tensor(count, dtype=torch.int, device=hidden.device), None

    _schedule(chunks, parts, judge, mesh, forward_only=False, everywhere=everywhere)
    return _means(losses, mesh)


def _shapes(chunks: Sequence[Any], mesh: Mesh, cut: Cut) -> Shapes:
    config = chunks[0].config
    multiple = fp8_multiple(config.fp8, config.fp8_recipe)
    return Shapes(cut, mesh.layout, multiple, mesh.device, mesh.context_rank)


def _schedule(
    chunks: Sequence[Any],
    parts: list[MicroBatch[RowsT]],
    judge: Callable[[Tensor, MicroBatch[RowsT]], tuple[Tensor, Tensor, None]],
    mesh: Mesh,
    *,
    forward_only: bool,
    everywhere: bool = False,
) -> None:
    def forward_step(rows: Iterator[MicroBatch[RowsT]], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        part = next(rows)
        return part.forward(model), lambda hidden: judge(hidden, part)

    config = chunks[0].config
    virtual = config.virtual_pipeline_model_parallel_size
    run = cast(Callable[..., Any], get_forward_backward_func(mesh.layout.pipeline, virtual))
    rows, positions = parts[0].inputs.shape
    run(
        forward_step_func=forward_step,
        data_iterator=[iter(parts) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(parts),
        # The shape of every micro-batch between interleaved stages; other stages tell each other. Of all context ranks.
        seq_length=positions * mesh.layout.context,
        micro_batch_size=rows,
        forward_only=forward_only,
        force_all_reduce=everywhere,
        p2p_communicator=P2PCommunicator(mesh.group("pipeline"), config),
        pg_collection=mesh.groups,
    )


def _means(losses: Sequence[LossSums], mesh: Mesh) -> LossMeans:
    """Sums over micro-batches and data ranks, known on the last stage only, over the global count; told to every stage.

    One transfer to the host: until then everything is summed where it was computed.
    """
    last = mesh.layout.pipeline - 1
    sums: dict[str, float] = {}
    if mesh.pipeline_rank == last:
        names = ["loss", *losses[0].metrics]
        rows = [torch.stack([x.double() for x in (each.total, *each.metrics.values())]) for each in losses]
        counts = rows[0].new_tensor([sum(each.count for each in losses), sum(each.metric_count for each in losses)])
        everything = torch.cat([torch.stack(rows).sum(0), counts])
        told = cast(list[float], all_reduce(everything, mesh, "data").tolist())  # pyright: ignore[reportUnknownMemberType]
        sums = dict(zip([*names, "count", "metric_count"], told, strict=True))
    sums = broadcast_object(sums, mesh, "pipeline", source=last)
    count, metric_count = int(sums.pop("count")), int(sums.pop("metric_count"))
    loss = sums.pop("loss") / max(count, 1)
    return LossMeans(loss, count, {name: value / max(metric_count, 1) for name, value in sums.items()})
