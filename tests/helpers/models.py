"""Tiny Llamas on real ranks, and their weights put together: for the tests of models, checkpoints and trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from megarlhf.batch.rollouts import Rollout
from megarlhf.checkpoint.hf_names import source_of
from megarlhf.checkpoint.model_directory import describe_model, load_model
from megarlhf.models.compute import ComputeConfig, resolve
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs, Reading
from megarlhf.models.role import FrozenRole, Role, RoleSettings, TrainableRole
from megarlhf.models.spec import ModelSpec
from megarlhf.models.transformer import HeadKind, named_parameters
from megarlhf.parallel.collectives import gather
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Cut, InRows

STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
"""Llama 3.1's stretching, of a context so short that the rows of a test feel it."""

LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2),
    ParallelLayout(tensor=2, sequence_parallel=True),
    ParallelLayout(pipeline=2),
    ParallelLayout(pipeline=2, virtual_pipeline=2),
    ParallelLayout(tensor=2, pipeline=2),
    ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True),
    ParallelLayout(pipeline=3),
]
"""Every way to split one model over at most four ranks; three stages of four layers have 1, 2 and 1."""


def name_of(layout: ParallelLayout) -> str:
    """A layout as a test id: tp2-pp2-sp."""
    parts = {
        "tp": layout.tensor,
        "pp": layout.pipeline,
        "cp": layout.context,
        "dp": layout.data,
        "vp": layout.virtual_pipeline,
    }
    named = [f"{name}{value}" for name, value in parts.items() if value > 1]
    return "-".join(named + ["sp"] * layout.sequence_parallel) or "one"


def llama_config(**changes: Any) -> LlamaConfig:
    """Four layers of width 32 with grouped-query attention; 131 is odd, so two tensor ranks pad the vocabulary."""
    settings = {
        "vocab_size": 131,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**settings, **changes})


def hf_model(kind: type, directory: Path, *, seed: int = 0, **changes: Any) -> Any:
    """A Hugging Face Llama with weights far from any symmetry, saved to `directory`."""
    config = llama_config(**changes, **({"num_labels": 1} if kind is LlamaForSequenceClassification else {}))
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    model.save_pretrained(directory)
    return model


def language_model(directory: Path, **changes: Any) -> LlamaForCausalLM:
    """A language model in `directory`."""
    return hf_model(LlamaForCausalLM, directory, **changes)


def score_model(directory: Path, **changes: Any) -> LlamaForSequenceClassification:
    """A model with a scalar head in `directory`."""
    return hf_model(LlamaForSequenceClassification, directory, **changes)


def policy_and_judge(folder: Path) -> None:
    """A language model in `folder`/actor and a model with a scalar head in `folder`/judge, for the built-in task."""
    shape = {"vocab_size": 160, "max_position_embeddings": 128}
    language_model(folder / "actor", seed=4, **shape)
    score_model(folder / "judge", seed=5, **shape)


def ragged_rollout(rows: int = 8, *, vocab: int = 131, seed: int = 3) -> Rollout:
    """Rows of 5 to 22 tokens, of which 1 to 4 are prompt; padding is 0, which no text contains."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 22, (rows,), generator=generator)
    lengths[:2] = torch.tensor([22, 5])
    prompts = torch.randint(1, 5, (rows,), generator=generator)
    tokens = torch.randint(1, vocab, (rows, 22), generator=generator)
    tokens[torch.arange(22) >= lengths[:, None]] = 0
    terminated = torch.arange(rows) % 3 > 0
    return Rollout(tokens, prompts, lengths, terminated, torch.zeros(rows, 21), torch.arange(rows), ("",) * rows)


def settings(mesh: Mesh, cut: int | Cut = 4, dtype: str = "float32", offload: str = "host") -> RoleSettings:
    """What the roles of a test share."""
    compute = resolve(ComputeConfig.model_validate({"dtype": dtype}), mesh.device)
    how = InRows(cut) if isinstance(cut, int) else cut
    return RoleSettings(compute=compute, cut=how, offload="host" if offload == "host" else "none")


def frozen(directory: str, reading: Reading, mesh: Mesh, cut: int | Cut = 4) -> FrozenRole:
    """The model in `directory`, to be read."""
    found = describe_model(directory)
    role = FrozenRole("reference", found.spec, found.head, reading, settings(mesh, cut), mesh)
    load_model(role, directory, seed=1)
    return role


def learner(
    directory: str, reading: Reading, shared: RoleSettings, mesh: Mesh, optim: OptimConfig, steps: int = 10
) -> TrainableRole:
    """The model in `directory`, ready to learn."""
    found = describe_model(directory)
    role = TrainableRole("learner", found.spec, found.head, reading, shared, mesh)
    load_model(role, directory, seed=1)
    role.prepare(optim, steps)
    return role


def blank(spec: ModelSpec, head: HeadKind, mesh: Mesh) -> FrozenRole:
    """A model whose weights are all NaN: what a load forgets shows."""
    role = FrozenRole("blank", spec, head, LabelLogprobs(1.0), settings(mesh), mesh)
    for chunk in role.chunks:
        for parameter in chunk.parameters():
            parameter.fill_(float("nan"))
    return role


def whole_weights(role: Role) -> dict[str, Tensor]:
    """The model's weights under their Hugging Face names, put together over tensor and pipeline ranks.

    The inverse of what loading does, written on its own. Asserts on the way that what several ranks hold (norms, the
    scalar head, tied embeddings, every weight of a data rank's twin) is bitwise the same on all of them.
    """
    mine: dict[str, Tensor] = {}
    with role.resident("weights"), torch.no_grad():
        for name, parameter in named_parameters(role.chunks):
            origin = source_of(name, role.spec, role.head)
            parts = gather(parameter.detach()[None].clone(), role.mesh, "tensor")
            for key, tensor in zip(origin.names, _joined(list(parts), origin.cut, role.spec), strict=True):
                assert key not in mine or torch.equal(mine[key], tensor), f"{key} differs between first and last stage"
                mine[key] = tensor
    weights: dict[str, Tensor] = {}
    for stage in _every(mine, role.mesh, "pipeline"):
        for key, tensor in stage.items():
            assert key not in weights or torch.equal(weights[key], tensor), f"{key} differs between stages"
            weights[key] = tensor
    for twin in _every(weights, role.mesh, "loss"):
        assert all(torch.equal(twin[key], weights[key]) for key in weights), (
            "context or data ranks hold different weights"
        )
    return weights


def _joined(parts: list[Tensor], cut: str, spec: ModelSpec) -> list[Tensor]:
    match cut:
        case "whole":
            assert all(torch.equal(part, parts[0]) for part in parts), "tensor ranks hold different copies"
            return [parts[0]]
        case "columns":
            return [torch.cat(parts, dim=1)]
        case "vocabulary":
            return [torch.cat(parts)[: spec.vocab_size]]
        case "gate_up":
            return [torch.cat([part.chunk(2)[i] for part in parts]) for i in range(2)]
    width, readers = spec.head_dim, spec.heads // spec.kv_heads
    groups = torch.cat(parts).unflatten(0, (spec.kv_heads, (readers + 2) * width))
    return [piece.flatten(0, 1) for piece in groups.split([readers * width, width, width], dim=1)]


def _every(value: Any, mesh: Mesh, axis: Any) -> list[Any]:
    if mesh.size(axis) == 1:
        return [value]
    values = [None] * mesh.size(axis)
    torch.distributed.all_gather_object(values, value, group=mesh.group(axis))
    return values


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference between two models, once they have the same tensors."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
