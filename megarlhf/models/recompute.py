"""Activations that backward computes again instead of having them kept: which, and in Megatron-Core's words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from megarlhf.errors import LayoutError
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.layout import ParallelLayout

Recompute = Literal["none", "selective", "full"] | Annotated[int, Field(ge=1, strict=True)]
"""Nothing, every layer's MLP, every layer whole, or so many layers of a stage whole."""


def whole_layers(recompute: Recompute, layers: int) -> int:
    """Of a piece of so many layers, those of which only the input is kept: its first."""
    if isinstance(recompute, int):
        return min(recompute, layers)
    return layers if recompute == "full" else 0


def most_layers(spec: ModelSpec, layout: ParallelLayout) -> int:
    """Layers of the longest stage, or of its longest chunk where stages are interleaved."""
    stages = layout.stages
    return max(spec.layers_of(stages, first=at == 0, last=at == stages - 1) for at in range(stages))


def check_recompute(recompute: Recompute, spec: ModelSpec, layout: ParallelLayout, name: str = "model") -> None:
    """Raise LayoutError where more layers are to be computed again than a stage of the model `name` has."""
    most = most_layers(spec, layout)
    if isinstance(recompute, int) and recompute > most:
        piece = "stage" if layout.virtual_pipeline == 1 else "chunk of a stage"
        raise LayoutError(
            f"compute.recompute={recompute} layers, but a {piece} of {name} has {most} of its {spec.layers} "
            f"(layout.pipeline={layout.pipeline}, layout.virtual_pipeline={layout.virtual_pipeline}); set "
            f"compute.recompute to at most {most}, or to full."
        )


def megatron_recompute(recompute: Recompute) -> dict[str, Any]:
    """The settings of a TransformerConfig.

    `selective` is the MLP: Megatron's own choice, attention's core, saves the scores, which no kernel here keeps.
    """
    if isinstance(recompute, int):
        return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": recompute}
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]} if recompute == "selective" else {}
