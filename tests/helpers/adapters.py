"""Tiny Llamas that learn by adapters, and their adapters put together over ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from megarlhf.checkpoint.model_directory import describe_model, load_model
from megarlhf.models.lora import BY_INPUT, LoraConfig, adapted
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs, PositionValues
from megarlhf.models.role import RoleSettings, TrainableRole
from megarlhf.parallel.collectives import gather, gather_objects
from megarlhf.parallel.mesh import Mesh

LORA = LoraConfig(rank=3, alpha=12.0)


def adapted_learner(
    directory: str, shared: RoleSettings, mesh: Mesh, optim: OptimConfig, lora: LoraConfig = LORA
) -> TrainableRole:
    """The model in `directory` with adapters; B is drawn too, so that nothing is 0 by accident."""
    found = describe_model(directory)
    reading = LabelLogprobs(0.7) if found.head == "language" else PositionValues()
    role = TrainableRole("learner", found.spec, found.head, reading, shared, mesh)
    load_model(role, directory, seed=1)
    role.learn_adapters(lora, seed=1)
    part, parts = mesh.tensor_rank, mesh.size("tensor")
    for each in adapted(role.chunks):
        rows = len(each.adapter.b) * (1 if each.adapter.target in BY_INPUT else parts)
        random = torch.Generator().manual_seed(each.number * 10 + len(each.adapter.target))
        whole = 0.05 * torch.randn(rows, lora.rank, generator=random)
        if each.adapter.target == "fc1":
            whole = torch.cat([half.chunk(parts)[part] for half in whole.chunk(2)])
        elif each.adapter.target == "qkv":
            whole = whole.chunk(parts)[part]
        each.adapter.b.data.copy_(whole)
    role.prepare(optim, 10)
    return role


def whole_adapters(role: TrainableRole) -> dict[str, Tensor]:
    """Every A and B put together over tensor and pipeline ranks; what is whole must be the same on all of them."""
    mine: dict[str, Tensor] = {}
    with role.resident("weights"), torch.no_grad():
        for each in adapted(role.chunks):
            by_input, adapter = each.adapter.target in BY_INPUT, each.adapter
            for name, tensor, cut in (("a", adapter.a, by_input), ("b", adapter.b, not by_input)):
                parts = list(gather(tensor.detach()[None].clone(), role.mesh, "tensor"))
                key = f"{each.number}.{adapter.target}.{name}"
                if not cut:
                    assert all(torch.equal(part, parts[0]) for part in parts), key
                    mine[key] = parts[0]
                elif adapter.target == "fc1":
                    mine[key] = torch.cat([part.chunk(2)[half] for half in (0, 1) for part in parts])
                else:
                    mine[key] = torch.cat(parts, dim=int(by_input))
    whole: dict[str, Tensor] = {}
    for told in gather_objects(mine, role.mesh, "world"):
        for key, tensor in told.items():
            assert key not in whole or torch.equal(whole[key], tensor), f"{key} differs between ranks"
            whole[key] = tensor
    return whole
