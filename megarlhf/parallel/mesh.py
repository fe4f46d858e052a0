"""The live process groups of a run; the one file that touches `megatron.core.parallel_state`."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, get_args

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import FileStore, HashStore  # type: ignore[attr-defined]

from megarlhf.errors import LayoutError
from megarlhf.observe.trail import Trail
from megarlhf.observe.work import Work
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.rng import seed_model_parallel

Axis = Literal["tensor", "pipeline", "context", "data", "model", "loss", "world"]
"""`model` is tensor x pipeline: the ranks that hold one copy of a model; `loss` is context x data: those that hold the
same weights, over whose tokens a gradient is summed."""


NCCL_GRACE_S = 60.0
"""Seconds that a run has to write down what it did when a GPU no longer answers."""
LOOPBACK = "127.0.0.1"
STORE = "MEGARLHF_STORE"
"""Environment variable: the file in which the ranks of one machine meet; without it they meet at MASTER_ADDR."""


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the layout, and its groups. Built once by `start`, handed down ever after."""

    layout: ParallelLayout
    device: torch.device
    rank: int
    groups: ProcessGroupCollection
    trail: Trail = field(default_factory=Trail, compare=False)
    """What this rank is doing, for the case that it fails."""
    work: Work = field(default_factory=Work, compare=False)
    """What the run has done."""
    patience_s: float = field(default=600.0, compare=False)
    """Seconds until a collective gives up."""
    _others: dict[ParallelLayout, Mesh] = field(default_factory=dict, compare=False, repr=False)
    """Of the same ranks in other layouts: groups are made once, and last as long as the process group."""

    @property
    def tensor_rank(self) -> int:
        """Place among the ranks that share each matrix."""
        return self.groups.tp.rank()

    @property
    def pipeline_rank(self) -> int:
        """Stage of the pipeline."""
        return self.groups.pp.rank()

    @property
    def data_rank(self) -> int:
        """Which copy of the model this rank belongs to."""
        return self.groups.dp.rank()

    @property
    def context_rank(self) -> int:
        """Which chunks of a sequence this rank has."""
        return self.groups.cp.rank()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which prints and writes files."""
        return self.rank == 0

    def group(self, axis: Axis) -> dist.ProcessGroup:
        """The process group of this rank along `axis`."""
        match axis:
            case "tensor":
                return self.groups.tp
            case "pipeline":
                return self.groups.pp
            case "context":
                return self.groups.cp
            case "data":
                return self.groups.dp
            case "model":
                return self.groups.mp
            case "loss":
                return self.groups.dp_cp
            case "world":
                world = dist.group.WORLD
                if world is None:
                    raise RuntimeError("no process group is initialised; build the mesh with parallel.mesh.start().")
                return world
        raise ValueError(f"axis must be one of {get_args(Axis)}, not {axis!r}")

    def ranks(self, axis: Axis) -> list[int]:
        """The ranks along `axis`, this one among them, by their numbers in the world."""
        return dist.get_process_group_ranks(self.group(axis))

    def entering(self, collective: str, axis: Axis) -> dist.ProcessGroup:
        """The group along `axis`, once the trail says that this rank goes into a collective over it."""
        self.trail.join(collective, axis)
        return self.group(axis)

    def size(self, axis: Axis) -> int:
        """Ranks along `axis`."""
        return self.group(axis).size()

    @property
    def drawing(self) -> Mesh:
        """The same ranks while they draw rollouts, when context ranks are data ranks. Nothing is made anew."""
        if self.layout.context == 1:
            return self
        groups = copy(self.groups)
        # The group of this rank by itself is that of an axis that there is not.
        groups.dp, groups.cp = self.groups.dp_cp, self.groups.ep
        return replace(self, layout=self.layout.drawing, groups=groups)

    def arranged(self, layout: ParallelLayout) -> Mesh:
        """The same ranks in another layout, tensor x data alone. Megatron's global state stays that of this one.

        So whatever is built on it takes its groups from here; what asks `parallel_state` hears of the other layout.
        Ranks:    collective over the mesh, once a layout.
        Raises:   LayoutError where the layout is of other ranks; ValueError where it has stages.
        """
        layout.check_world(self.layout.world_size)
        if layout.pipeline > 1 or layout.context > 1:
            raise ValueError(
                f"a second mesh has tensor and data ranks alone, but pipeline={layout.pipeline} and "
                f"context={layout.context}; set both to 1."
            )
        if layout not in self._others:
            groups = _tensor_data_groups(layout, alone=self.groups.ep, patience_s=self.patience_s)
            self._others[layout] = replace(self, layout=layout, groups=groups, _others={})
        return self._others[layout]


def _tensor_data_groups(
    layout: ParallelLayout, *, alone: dist.ProcessGroup, patience_s: float
) -> ProcessGroupCollection:
    """Groups of tensor x data ranks, numbered as Megatron numbers them: tensor ranks are neighbours.

    alone: the group of this rank by itself, for the axes that there are none of.
    """
    ranks = torch.arange(layout.world_size).view(layout.data, layout.tensor)
    patience = timedelta(seconds=patience_s)
    tensor, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=patience)
    data, _ = dist.new_subgroups_by_enumeration(ranks.t().tolist(), timeout=patience)
    ours = {"tp": tensor, "mp": tensor, "tp_cp": tensor, "dp": data, "dp_cp": data}
    # A group less for embeddings: without stages nobody else has a copy of them.
    return ProcessGroupCollection(**ours, pp=alone, cp=alone, ep=alone, embd=None, pos_embd=None)


def local_device() -> torch.device:
    """This rank's GPU, or the CPU where there is none.

    Raises:   LayoutError when this machine shows several GPUs, and fewer than it has ranks.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus == 1:  # as Slurm's --gpus-per-task=1 shows it: each rank's own GPU is its number 0
        return torch.device("cuda", 0)
    if rank >= gpus:
        raise LayoutError(
            f"LOCAL_RANK={rank} but {gpus} GPUs are visible; start at most {gpus} ranks on this machine, or show each "
            "rank its own GPU alone (CUDA_VISIBLE_DEVICES)."
        )
    return torch.device("cuda", rank)


def start(layout: ParallelLayout, *, seed: int, timeout_s: float = 600.0) -> Mesh:
    """Join the process group and build the mesh. Collective: every rank of the run calls it once.

    Ranks:    reads RANK and WORLD_SIZE, and MASTER_ADDR and MASTER_PORT or STORE; a process without them is a world of
              its own.
    Raises:   LayoutError when the ranks present are not those the layout needs.
    """
    layout.check()
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience_s = _patience(device, timeout_s)
    if not dist.is_initialized():
        _init_process_group(device, patience_s)
    layout.check_world(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=patience_s / 60,  # type: ignore[arg-type] (ends in a timedelta)
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    seed_model_parallel(seed)
    if not gc.get_freeze_count():
        # Half a million objects of imported modules would be walked at each collection; every save has several.
        gc.collect()
        gc.freeze()
    return Mesh(layout, device, dist.get_rank(), groups, work=Work(layout.world_size), patience_s=patience_s)


def _patience(device: torch.device, timeout_s: float) -> float:
    """Seconds until a collective gives up. Over NCCL the process ends with it, so the watchdog must come first."""
    return 2 * timeout_s + NCCL_GRACE_S if device.type == "cuda" else timeout_s


def stop() -> None:
    """Leave the process group. Collective."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def leave() -> None:
    """Leave the process group if this process is in one, so that it can start another."""
    if dist.is_initialized():
        stop()


@contextmanager
def own_scratch(scratch: dict[Any, Tensor]) -> Iterator[None]:
    """Inside, `scratch` is where Megatron-Core keeps the tensors that it gathers into, grown as they are needed.

    Those of inference mode cannot be written to outside of it; those that a CUDA graph was captured with must stay.
    """
    shared = parallel_state.get_global_memory_buffer()
    before, shared.buffer = shared.buffer, scratch
    try:
        yield
    finally:
        shared.buffer = before


def loopback_interface() -> str:
    """The network interface that no other machine reaches.

    Raises:   LayoutError where there is none.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            return name
    raise LayoutError(f"no network interface has the address {LOOPBACK}; bring loopback up.")


def _init_process_group(device: torch.device, timeout_s: float) -> None:
    gpu = device if device.type == "cuda" else None
    options: Any = {"backend": "nccl" if gpu else "gloo", "timeout": timedelta(seconds=timeout_s), "device_id": gpu}
    if "RANK" not in os.environ:
        # A world of one needs no address and no port; gloo would listen on whichever the host's name stands for.
        os.environ["GLOO_SOCKET_IFNAME"] = loopback_interface()
        dist.init_process_group(store=HashStore(), rank=0, world_size=1, **options)
    elif STORE in os.environ:
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(store=FileStore(os.environ[STORE], ranks), rank=rank, world_size=ranks, **options)
    else:
        dist.init_process_group(**options)
