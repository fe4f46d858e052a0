"""Collectives over a named axis of the mesh; each is a no-op when the axis has one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from megarlhf.batch.base import Batch, RowsT, TokenRows
from megarlhf.errors import MegarlhfError
from megarlhf.parallel.mesh import Axis, Mesh
from megarlhf.parallel.packing import dealt

T = TypeVar("T")
ReduceOp = Literal["sum", "max", "min"]
OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


def all_reduce(tensor: torch.Tensor, mesh: Mesh, axis: Axis, op: ReduceOp = "sum") -> torch.Tensor:
    """The reduction of `tensor` over `axis`, equal on each of its ranks. The input is left as it is."""
    if mesh.size(axis) == 1:
        return tensor
    result = tensor.clone()
    dist.all_reduce(result, op=OPS[op], group=mesh.entering("all_reduce", axis))
    return result


def gather(tensor: torch.Tensor, mesh: Mesh, axis: Axis) -> torch.Tensor:
    """The `axis` ranks' tensors in rank order, joined along dimension 0, the only one in which they may differ."""
    size = mesh.size(axis)
    if size == 1:
        return tensor
    rows = torch.zeros(size, dtype=torch.int64, device=tensor.device)
    rows[mesh.group(axis).rank()] = tensor.shape[0]
    counts = all_reduce(rows, mesh, axis).tolist()
    # gloo gathers equal shapes only: pad to the longest, cut after.
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded, group=mesh.entering("all_gather", axis))
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def broadcast(tensor: torch.Tensor, mesh: Mesh, axis: Axis, source: int = 0) -> torch.Tensor:
    """`tensor` of the rank `source` along `axis`, on every one of its ranks. All pass tensors of one shape and type."""
    if mesh.size(axis) == 1:
        return tensor
    result = tensor.contiguous().clone()
    dist.broadcast(result, group=mesh.entering("broadcast", axis), group_src=source)
    return result


def broadcast_object(value: T, mesh: Mesh, axis: Axis, source: int = 0) -> T:
    """A small Python value of the rank `source` along `axis`, on every one of its ranks."""
    if mesh.size(axis) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=mesh.entering("broadcast", axis), group_src=source)
    return box[0]


def gather_objects(value: T, mesh: Mesh, axis: Axis) -> list[T]:
    """Small Python values of the ranks along `axis`, in their order; equal on every one of its ranks."""
    if mesh.size(axis) == 1:
        return [value]
    values: list[Any] = [None] * mesh.size(axis)
    dist.all_gather_object(values, value, group=mesh.entering("all_gather", axis))
    return values


def on_main(work: Callable[[], T], mesh: Mesh) -> T:
    """What `work` returns on rank 0, where alone it is done; every rank raises the MegarlhfError that it raises there.

    Raises:   whatever else it raises, on rank 0 alone.
    """
    done: Any = None
    if mesh.is_main:
        try:
            done = work()
        except MegarlhfError as error:
            done = error
    done = broadcast_object(done, mesh, "world")
    if isinstance(done, MegarlhfError):
        raise done
    return done


def barrier(mesh: Mesh) -> None:
    """Wait until every rank of the mesh has come here."""
    if mesh.size("world") > 1:
        dist.barrier(group=mesh.entering("barrier", "world"))


def exchange(
    sends: Sequence[tuple[torch.Tensor, int]], receives: Sequence[tuple[torch.Tensor, int]], mesh: Mesh
) -> None:
    """Send tensors to ranks and fill tensors with what ranks send, all at once; ranks by their numbers in the world.

    What goes from one rank to another arrives in the order in which it was sent. All tensors are contiguous.
    """
    group = mesh.entering("exchange", "world")
    jobs = [dist.P2POp(dist.isend, tensor, rank, group) for tensor, rank in sends]
    jobs += [dist.P2POp(dist.irecv, tensor, rank, group) for tensor, rank in receives]
    for work in dist.batch_isend_irecv(jobs) if jobs else ():
        work.wait()


def gather_rows(batch: RowsT, mesh: Mesh) -> RowsT:
    """The data ranks' rows in rank order, as one batch padded to the longest T; equal on every rank of the mesh."""
    if mesh.size("data") == 1:
        return batch
    width = torch.tensor(batch.tokens.shape[1], device=mesh.device)
    return _gather_field(batch.padded_to(int(all_reduce(width, mesh, "data", op="max")) - 1), mesh)


def own_part(count: int, mesh: Mesh) -> slice:
    """This data rank's part of `count` rows that every rank holds: consecutive ones, at most one more than of others.

    Fewer rows than data ranks leave some without any.
    """
    share, more = divmod(count, mesh.size("data"))
    first = mesh.data_rank * share + min(mesh.data_rank, more)
    return slice(first, first + share + (mesh.data_rank < more))


def own_share(costs: Sequence[int], mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
    """This data rank's rows of those that every rank holds, dealt so that what they cost is nearly even.

    Shapes:   costs: of each row. Returns (rows [own], back [rows]) int64 on the host: gathered rows are in the order of
              the batch at `back`.
    """
    parts = dealt(costs, mesh.size("data"))
    rows = torch.cat([torch.from_numpy(part) for part in parts])
    return torch.from_numpy(parts[mesh.data_rank]), rows.argsort()


def check_divides(batch: TokenRows, mesh: Mesh) -> None:
    """Raise ValueError unless the rows of a batch to learn from divide over data ranks, which take steps together."""
    if left := len(batch) % mesh.size("data"):
        raise ValueError(f"{len(batch)} rows do not divide over {mesh.size('data')} data ranks; {left} are left over.")


def _gather_field(value: Any, mesh: Mesh) -> Any:
    if isinstance(value, Batch):
        return type(value).unchecked({name: _gather_field(field, mesh) for name, field in vars(value).items()})
    if isinstance(value, tuple):
        return sum(gather_objects(value, mesh, "data"), ())
    return gather(value, mesh, "data")
