"""What Megatron is told of weights that are shards."""

from __future__ import annotations

from megarlhf.models.spec import PRESETS
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.models import blank
from tests.helpers.ranks import run_ranks

DIMENSION_AND_STRIDE = {
    "embedding.word_embeddings": (0, 1),
    "linear_qkv": (0, 1),
    "linear_proj": (1, 1),
    # A shard has its part of the gate, then its part of what the gate lets through: another layout cuts both.
    "linear_fc1": (0, 2),
    "linear_fc2": (1, 1),
    "output_layer": (0, 1),
}


def marks() -> dict[str, tuple[int, int]]:
    model = blank(PRESETS["tiny-xs"], "language", start(ParallelLayout(tensor=2), seed=1)).model
    return {
        name: (parameter.partition_dim, parameter.partition_stride)  # type: ignore[attr-defined]
        for name, parameter in model.named_parameters()
        if vars(parameter).get("tensor_model_parallel")
    }


def test_every_shard_says_how_it_was_cut() -> None:
    for found in run_ranks(marks, 2):
        for part, mark in DIMENSION_AND_STRIDE.items():
            seen = {value for name, value in found.items() if part in name}
            assert seen == {mark}, part
        assert all(any(part in name for part in DIMENSION_AND_STRIDE) for name in found)
