"""Which Hugging Face tensors make up each Megatron parameter, and how they are cut over tensor ranks.

Names are Megatron-Core's inside one LlamaModel, with layers numbered over the whole model; both layer kinds
(Transformer Engine and local) use the same names.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from megarlhf.errors import CheckpointError
from megarlhf.models.spec import ModelSpec
from megarlhf.models.transformer import HeadKind

Cut = Literal["whole", "columns", "vocabulary", "query_groups", "gate_up"]
"""How a tensor rank's part is taken: all of it; columns; vocabulary rows, padded; rows of its query groups, query,
key and value of each group together; rows of gate and of up, gate first."""

OURS = "megarlhf"
"""Key of what transformers has no place for: a reward model's score_offset, score_scale and score_wrong, and
what model directories keep besides."""

LAYER: dict[str, tuple[Cut, list[str]]] = {
    "input_layernorm.weight": ("whole", ["input_layernorm.weight"]),
    "self_attention.linear_qkv.weight": (
        "query_groups",
        ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    ),
    "self_attention.linear_proj.weight": ("columns", ["self_attn.o_proj.weight"]),
    "pre_mlp_layernorm.weight": ("whole", ["post_attention_layernorm.weight"]),
    "mlp.linear_fc1.weight": ("gate_up", ["mlp.gate_proj.weight", "mlp.up_proj.weight"]),
    "mlp.linear_fc2.weight": ("columns", ["mlp.down_proj.weight"]),
}


@dataclass(frozen=True)
class Source:
    """The Hugging Face tensors behind one Megatron parameter."""

    names: tuple[str, ...]
    cut: Cut


def source_of(parameter: str, spec: ModelSpec, head: HeadKind) -> Source:
    """Where the Megatron parameter `parameter` (layers numbered over the whole model) comes from.

    Raises:   KeyError for a name no Llama has.
    """
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter)
    if match:
        cut, names = LAYER[match[2]]
        return Source(tuple(f"model.layers.{match[1]}.{name}" for name in names), cut)
    if parameter == "embedding.word_embeddings.weight":
        return Source(("model.embed_tokens.weight",), "vocabulary")
    if parameter == "decoder.final_layernorm.weight":
        return Source(("model.norm.weight",), "whole")
    if parameter == "output_layer.weight":
        if head == "scalar":
            return Source(("score.weight",), "whole")
        tied = spec.tie_embeddings
        return Source(("model.embed_tokens.weight" if tied else "lm_head.weight",), "vocabulary")
    raise KeyError(parameter)


def shape_of(name: str, spec: ModelSpec) -> tuple[int, ...]:
    """The shape of the Hugging Face tensor `name`."""
    hidden, ffn, width = spec.hidden_size, spec.ffn_size, spec.head_dim
    kind = re.sub(r"^model\.layers\.\d+\.", "", name)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "lm_head.weight": (spec.vocab_size, hidden),
        "score.weight": (1, hidden),
        "model.norm.weight": (hidden,),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (spec.heads * width, hidden),
        "self_attn.k_proj.weight": (spec.kv_heads * width, hidden),
        "self_attn.v_proj.weight": (spec.kv_heads * width, hidden),
        "self_attn.o_proj.weight": (hidden, spec.heads * width),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    return shapes[kind]


def tensor_names(spec: ModelSpec, head: HeadKind) -> list[str]:
    """Every Hugging Face tensor of the model, in file order."""
    names = ["model.embed_tokens.weight"]
    for layer in range(spec.layers):
        names += [f"model.layers.{layer}.{name}" for _, sources in LAYER.values() for name in sources]
    names.append("model.norm.weight")
    if head == "scalar":
        names.append("score.weight")
    elif not spec.tie_embeddings:
        names.append("lm_head.weight")
    return names


def cut_for_rank(tensors: list[Tensor], cut: Cut, spec: ModelSpec, rank: int, ranks: int) -> Tensor:
    """Tensor rank `rank`'s part of a Megatron parameter made from whole Hugging Face `tensors`."""
    if cut == "whole":
        return tensors[0]
    if cut == "columns":
        return tensors[0].chunk(ranks, dim=1)[rank]
    if cut == "gate_up":
        return torch.cat([tensor.chunk(ranks, dim=0)[rank] for tensor in tensors])
    if cut == "vocabulary":
        padding = spec.padded_vocab(ranks) - spec.vocab_size
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, padding)).chunk(ranks, dim=0)[rank]
    # Query groups: each key-value head with the query heads that read it.
    grouped = [tensor.unflatten(0, (spec.kv_heads, -1)) for tensor in tensors]
    return torch.cat(grouped, dim=1).chunk(ranks, dim=0)[rank].flatten(0, 1)


class Normalisation(NamedTuple):
    """What is known of a reward model's scores, by the names of `ModelDescription`'s fields."""

    score_offset: float = 0.0
    score_scale: float = 1.0
    score_wrong: float | None = None


def normalisation(config: dict[str, Any], path: Path) -> Normalisation:
    """What `hf_config` wrote into `config` about a reward model's scores; offset 0 and scale 1 if it did not.

    Raises:   CheckpointError naming `path` when they are not finite numbers, or the scale is not positive.
    """
    ours = config.get(OURS, {"score_offset": 0.0, "score_scale": 1.0})
    try:
        offset, scale = float(ours["score_offset"]), float(ours["score_scale"])
        wrong = None if ours.get("score_wrong") is None else float(ours["score_wrong"])
    except (LookupError, AttributeError, TypeError, ValueError, OverflowError):
        offset, scale, wrong = math.nan, math.nan, None
    if not (math.isfinite(offset) and math.isfinite(scale) and scale > 0 and math.isfinite(wrong or 0.0)):
        raise CheckpointError(
            f"{path}: {OURS}={ours!r} should hold a score_offset, a positive score_scale and, if known, score_wrong, "
            "all finite; correct it."
        )
    return Normalisation(offset, scale, wrong)
