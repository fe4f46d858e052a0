"""Forward and backward passes over any layout, on Megatron-Core's schedules; the one place that divides losses.

A batch is split into micro-batches of similar length, each trimmed to its longest row. Losses are sums; they and their
gradients are divided once, by the count over all micro-batches and data ranks, so no split can change the result.

Interleaved stages get micro-batches of one shape instead: with two pipeline ranks the next stage and the one before are
the same rank, and Megatron-Core 0.16.1 then takes the shape of an activation for that of a gradient.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megarlhf.batch.base import RowsT, TokenRows
from megarlhf.parallel.collectives import all_reduce, broadcast, broadcast_object
from megarlhf.parallel.layout import FP8_MULTIPLE, ParallelLayout
from megarlhf.parallel.mesh import Mesh

Read = Callable[[Tensor, Any], Tensor]
"""(hidden [b, s, H], rows) -> what the role reads off them: [b, T] or [b], fp32. Called on the last stage."""

Reads = Callable[[Any], Tensor]
"""rows -> [b, s] bool: the inputs, all T + 1 tokens or the first T, whose final hidden states are read."""

Loss = Callable[[Tensor, Any], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""(hidden [b, s, H], rows) -> (sum, count, sums of metrics that share the count). Called on the last stage."""


@dataclass(frozen=True)
class LossMeans:
    """The loss and its metrics over the whole batch, equal on every rank."""

    loss: float
    count: int
    metrics: dict[str, float]


def forward_only(
    chunks: Sequence[Any],
    batch: TokenRows,
    read: Read,
    *,
    mesh: Mesh,
    micro_batch: int,
    reads: Reads,
    per_token: bool,
) -> Tensor:
    """Run the model over `batch` without gradients and return what `read` says of every row.

    Shapes:   batch of B rows; returns [B, T] where `per_token`, else [B], as `read` does; fp32.
    Ranks:    the same tensor on every tensor and pipeline rank; data ranks pass their own rows.
    """
    order, parts = _split(batch, micro_batch, mesh, may_repeat=True)
    outputs: list[Tensor] = []

    def forward_step(rows: Iterator[TokenRows], model: Any) -> tuple[Tensor, Callable]:
        part = next(rows)
        return _forward(model, part, mesh, reads), lambda hidden: keep(hidden, part)

    def keep(hidden: Tensor, part: TokenRows) -> tuple[Tensor, Tensor, None]:
        outputs.append(read(hidden, part))
        return hidden.new_zeros(()), torch.zeros((), dtype=torch.int, device=hidden.device), None

    with torch.no_grad():
        _schedule(chunks, parts, forward_step, mesh, reads=reads, forward_only=True)
    shape = (len(batch), batch.tokens.shape[1] - 1) if per_token else (len(batch),)
    result = torch.zeros(shape, dtype=torch.float32, device=batch.tokens.device)
    for index, output in zip(order.split(micro_batch), outputs, strict=False):  # no outputs before the last stage
        if per_token:
            result[index, : output.shape[1]] = output
        else:
            result[index] = output
    return broadcast(result, mesh, "pipeline", source=mesh.layout.pipeline - 1)


def forward_backward(
    chunks: Sequence[Any], batch: TokenRows, loss: Loss, *, mesh: Mesh, micro_batch: int, reads: Reads
) -> LossMeans:
    """Accumulate the gradient of the mean loss over the global batch into the chunks' gradient buffers.

    Shapes:   batch: this data rank's B rows of the global batch.
    Ranks:    collective over the mesh; the returned means are equal on every rank.
    """
    _, parts = _split(batch, micro_batch, mesh, may_repeat=False)
    totals: Counter[str] = Counter()

    def forward_step(rows: Iterator[TokenRows], model: Any) -> tuple[Tensor, Callable]:
        part = next(rows)
        return _forward(model, part, mesh, reads), lambda hidden: judge(hidden, part)

    def judge(hidden: Tensor, part: TokenRows) -> tuple[Tensor, Tensor, None]:
        total, count, metrics = loss(hidden, part)
        totals.update(
            {name: float(value) for name, value in {"loss": total.detach(), "count": count, **metrics}.items()}
        )
        return total, count.to(torch.int), None

    _schedule(chunks, parts, forward_step, mesh, reads=reads, forward_only=False)
    return _means(totals, mesh)


def _split(batch: RowsT, micro_batch: int, mesh: Mesh, *, may_repeat: bool) -> tuple[Tensor, list[RowsT]]:
    """Rows ordered by length, cut into chunks of `micro_batch`: neighbours are equally long, so little is padding.

    Raises:   ValueError when interleaved stages would get unequal chunks and no row `may_repeat` to even them out.
    """
    longest = batch.lengths.reshape(len(batch), -1).amax(dim=1)
    order = longest.argsort(stable=True, descending=True)
    interleaved = mesh.layout.virtual_pipeline > 1
    if interleaved:
        missing = -len(batch) % (micro_batch * mesh.layout.pipeline)
        if missing and not may_repeat:
            raise ValueError(
                f"{len(batch)} rows are not a multiple of micro_batch={micro_batch} x pipeline={mesh.layout.pipeline}, "
                "which interleaved stages need; change micro_batch."
            )
        order = torch.cat([order, order[-1:].expand(missing)])
    parts = [batch.rows(index) for index in order.split(micro_batch)]
    return order, [part.trimmed(int((longest if interleaved else part.lengths).max()) - 1) for part in parts]


def _inputs(part: TokenRows, mesh: Mesh, reads: Reads, *, fp8: bool) -> tuple[Tensor, Tensor]:
    """[b, s] each: the tokens the model sees, and whether the hidden state that comes of one is read."""
    read = reads(part)
    inputs = part.tokens[:, : read.shape[1]]
    multiple = sequence_multiple(len(inputs), mesh.layout, fp8=fp8)
    missing = -inputs.shape[1] % multiple
    inputs, read = (torch.nn.functional.pad(x, (0, missing)) for x in (inputs, read))
    return inputs, read


def sequence_multiple(rows: int, layout: ParallelLayout, *, fp8: bool) -> int:
    """Of what the padded length of `rows` rows must be a multiple: tensor ranks hold equal slices of the sequence under
    sequence parallelism, and what a rank holds, b x s positions, goes into FP8 products."""
    slices = layout.tensor if layout.sequence_parallel else 1
    return slices * (FP8_MULTIPLE // math.gcd(FP8_MULTIPLE, rows) if fp8 else 1)


def _forward(model: Any, part: TokenRows, mesh: Mesh, reads: Reads) -> Tensor:
    """Final hidden states [b, s, H] on the last stage; on the others, what is sent to the next."""
    inputs, read = _inputs(part, mesh, reads, fp8=model.config.fp8 is not None)
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    # "Padding" is what Megatron calls positions that need no work.
    return model(inputs, positions, None, padding_mask=~read)


def _schedule(
    chunks: Sequence[Any],
    parts: list[Any],
    forward_step: Callable,
    mesh: Mesh,
    *,
    reads: Reads,
    forward_only: bool,
) -> None:
    config = chunks[0].config
    run = get_forward_backward_func(mesh.layout.pipeline, config.virtual_pipeline_model_parallel_size)
    rows, positions = _inputs(parts[0], mesh, reads, fp8=config.fp8 is not None)[0].shape
    run(
        forward_step_func=forward_step,
        data_iterator=[iter(parts) for _ in chunks],
        model=list(chunks),
        num_microbatches=len(parts),
        # The shape of every micro-batch between interleaved stages; other stages tell each other.
        seq_length=positions,
        micro_batch_size=rows,
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(mesh.group("pipeline"), config),
        pg_collection=mesh.groups,
    )


def _means(totals: Counter[str], mesh: Mesh) -> LossMeans:
    """Sums over data ranks, known on the last stage only, divided by the global count and told to every stage."""
    sums: dict[str, float] = {}
    if mesh.pipeline_rank == mesh.layout.pipeline - 1:
        values = torch.tensor(list(totals.values()), dtype=torch.float64, device=mesh.device)
        sums = dict(zip(totals, all_reduce(values, mesh, "data").tolist(), strict=True))
    sums = broadcast_object(sums, mesh, "pipeline", source=mesh.layout.pipeline - 1)
    count = int(sums.pop("count"))
    means = {name: value / max(count, 1) for name, value in sums.items()}
    return LossMeans(loss=means.pop("loss"), count=count, metrics=means)
