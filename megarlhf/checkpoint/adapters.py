"""Adapters in files: beside a model's weights in a checkpoint, which any layout loads, and as PEFT keeps them.

A checkpoint has `decoder.layers.mlp.linear_fc1.lora.a` [layers, rank, in] and `.b` [layers, out, rank], the rows of b
in the order of the weight's own: so what a tensor rank, or a conversion, reads of both is cut alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from safetensors.torch import save
from torch import Tensor

from megarlhf.checkpoint.hf_names import LAYER, shape_of
from megarlhf.checkpoint.hf_pieces import Piece
from megarlhf.models.lora import BY_INPUT, MODULES, LoraConfig, adapted, sides
from megarlhf.models.role import Role
from megarlhf.models.spec import ModelSpec

ADAPTER = "adapter"
"""Folder of a model directory with the adapters in PEFT's form."""
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"


def sharded_adapters(role: Role) -> dict[str, dict[str, Any]]:
    """Of each model chunk, what Megatron needs to save or load those parts of adapters that tensor ranks share.

    Megatron's layers name their own weights' parts; all else in them passes for whole, as the other part of each is.
    """
    groups = role.mesh.groups
    found: dict[str, dict[str, Any]] = {f"chunk{index}": {} for index in range(len(role.chunks))}
    for chunk, name, number, _, adapter in adapted(role.chunks):
        part, axis = ("a", 1) if adapter.target in BY_INPUT else ("b", 0)
        layers = ((0, number, role.spec.layers),)
        sharded = make_tp_sharded_tensor_for_checkpoint(
            adapter.a if part == "a" else adapter.b,
            f"decoder.layers.{MODULES[adapter.target]}.lora.{part}",
            axis,
            prepend_offsets=layers,
            tp_group=groups.tp,
            dp_cp_group=groups.dp_cp,
        )
        if adapter.target == "fc1":
            sharded = apply_swiglu_sharded_factory(sharded, layers)
        found[f"chunk{chunk}"][f"{name}.lora.{part}"] = sharded
    return found


def adapter_sizes(spec: ModelSpec, lora: LoraConfig | None) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of adapters in a checkpoint, by its key."""
    found: dict[str, tuple[int, ...]] = {}
    if lora is None:
        return found
    for target in lora.targets:
        out, into = sides(target, spec)
        key = f"decoder.layers.{MODULES[target]}.lora"
        found |= {f"{key}.a": (spec.layers, lora.rank, into), f"{key}.b": (spec.layers, out, lora.rank)}
    return found


class Beside(NamedTuple):
    """The adapter of one weight in one layer, as it lies in a checkpoint."""

    a: Piece
    b: Piece


def beside(spec: ModelSpec, lora: LoraConfig | None) -> dict[tuple[str, int], Beside]:
    """Every adapter, by the key of its weight and the layer."""
    sizes = adapter_sizes(spec, lora)

    def piece(key: str, layer: int) -> Piece:
        return Piece(key, sizes[key], (layer, 0, 0), (1, *sizes[key][1:]), ())

    weights = [f"decoder.layers.{MODULES[target]}" for target in (lora.targets if lora else ())]
    return {
        (f"{weight}.weight", layer): Beside(piece(f"{weight}.lora.a", layer), piece(f"{weight}.lora.b", layer))
        for weight in weights
        for layer in range(spec.layers)
    }


def merged(box: Tensor, piece: Piece, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`box`, the numbers of `piece` of a weight, with its part of scale * B A; summed in fp32 and rounded once."""
    _, first, left = piece.offset
    _, rows, columns = piece.shape
    own = a[0, :, left : left + columns].float(), b[0, first : first + rows].float()
    return box[0].float().addmm_(own[1], own[0], alpha=scale).to(box.dtype)[None]


def write_peft(
    directory: Path,
    read: Callable[[Piece], Tensor],
    spec: ModelSpec,
    lora: LoraConfig,
    base: str,
    head: Tensor | None,
) -> None:
    """Write adapters as `peft.PeftModel.from_pretrained` loads them onto the base model. Not collective.

    read: the numbers of a piece of a checkpoint. base: where the model without adapters came from. head: the weight of
    a scalar head, which was trained with them.
    Raises:   OSError where the disk refuses.
    """
    tensors: dict[str, Tensor] = {} if head is None else {"base_model.model.score.weight": head}
    for (key, layer), (a, b) in beside(spec, lora).items():
        tensors |= dict(_as_peft(key.removeprefix("decoder.layers."), layer, read(a)[0], read(b)[0], spec))
    directory.mkdir()
    # Not `save_file`, whose files nobody else may read.
    (directory / PEFT_WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
    modules = [_parts(f"{MODULES[target]}.weight") for target in lora.targets]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if head is None else "SEQ_CLS",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [part.rpartition(".")[2] for parts in modules for part in parts],
        "modules_to_save": None if head is None else ["score"],
        "inference_mode": True,
    }
    (directory / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _parts(weight: str) -> list[str]:
    """The Hugging Face modules in a layer that make up one of Megatron's weights."""
    return [name.removesuffix(".weight") for name in LAYER[weight][1]]


def _as_peft(weight: str, layer: int, a: Tensor, b: Tensor, spec: ModelSpec) -> Iterator[tuple[str, Tensor]]:
    """A [rank, in] and B [out, rank] of one weight as PEFT's tensors: A again for each module, B's rows to whom they
    belong."""
    parts = _parts(weight)
    rows = [shape_of(f"{part}.weight", spec)[0] for part in parts]
    if LAYER[weight][0] == "query_groups":
        # Each key-value head follows the query heads that read it.
        grouped = b.unflatten(0, (spec.kv_heads, -1)).split([count // spec.kv_heads for count in rows], dim=1)
        pieces = [piece.flatten(0, 1) for piece in grouped]
    else:
        pieces = list(b.split(rows))
    for part, piece in zip(parts, pieces, strict=True):
        name = f"base_model.model.model.layers.{layer}.{part}"
        yield f"{name}.lora_A.weight", a.clone()
        yield f"{name}.lora_B.weight", piece.contiguous()
