"""The numbers of every Llama 3, against what Meta publishes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megarlhf.errors import ConfigError, LayoutError
from megarlhf.models.attention import rope_frequencies
from megarlhf.models.spec import PRESETS, ModelSpec, preset
from megarlhf.parallel.layout import ParallelLayout
from tests.helpers.models import STRETCHED, llama_config

PUBLISHED = {
    "llama3-8b": 8.03e9,
    "llama3-70b": 70.55e9,
    "llama3.1-8b": 8.03e9,
    "llama3.1-70b": 70.55e9,
    "llama3.1-405b": 405.85e9,
    "llama3.2-1b": 1.236e9,
    "llama3.2-3b": 3.213e9,
    "llama3.3-70b": 70.55e9,
}
"""Parameters on the model cards, in the digits they give."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    spec = preset(name)
    last_digit = 1e6 if PUBLISHED[name] < 5e9 else 1e7
    assert abs(spec.parameters - PUBLISHED[name]) <= last_digit / 2
    assert spec.vocab_size == 128_256
    assert (spec.rope_theta, spec.norm_eps, spec.kv_heads) == (500_000.0, 1e-5, 8)
    assert spec.head_dim == spec.hidden_size // spec.heads


def test_every_size_is_there() -> None:
    assert {name for name in PRESETS if not name.startswith("tiny")} == set(PUBLISHED)
    assert all(preset(name).rope_scaling is None for name in ("llama3-8b", "llama3-70b"))
    factors = {name: scaling.factor for name, spec in PRESETS.items() if (scaling := spec.rope_scaling) is not None}
    assert factors == {
        **dict.fromkeys(("llama3.1-8b", "llama3.1-70b", "llama3.1-405b", "llama3.3-70b"), 8.0),
        **dict.fromkeys(("llama3.2-1b", "llama3.2-3b"), 32.0),
    }
    assert {name for name, spec in PRESETS.items() if spec.tie_embeddings} == {"llama3.2-1b", "llama3.2-3b"}
    with pytest.raises(ConfigError, match=r"'llama4' is unknown; choose one of llama3-8b, "):
        preset("llama4")


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_as_transformers_counts(tied: bool, tmp_path: Path) -> None:
    config = llama_config(tie_word_embeddings=tied, head_dim=16)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert ModelSpec.from_hf(tmp_path).parameters == sum(parameter.numel() for parameter in model.parameters())


def test_both_spellings_of_rope_are_read(tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters; releases before it, and Meta's own files, rope_theta and rope_scaling."""
    llama_config(rope_parameters=STRETCHED).save_pretrained(tmp_path)
    new = ModelSpec.from_hf(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    path.write_text(json.dumps({**config, "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}))
    assert ModelSpec.from_hf(tmp_path) == new
    assert (new.rope_theta, new.rope_scaling is not None and new.rope_scaling.original_max_positions) == (1e4, 16)
    path.write_text(json.dumps({**config, "rope_theta": 1e4, "rope_scaling": None}))
    assert ModelSpec.from_hf(tmp_path).rope_scaling is None


@pytest.mark.parametrize("name", ["llama3-8b", "llama3.1-8b", "llama3.2-1b"])
def test_frequencies_are_those_of_transformers(name: str) -> None:
    spec = preset(name)
    rope: dict = {"rope_type": "default", "rope_theta": spec.rope_theta}
    if spec.rope_scaling is not None:
        rope = {
            "rope_type": "llama3",
            "rope_theta": spec.rope_theta,
            "factor": spec.rope_scaling.factor,
            "low_freq_factor": spec.rope_scaling.low_freq_factor,
            "high_freq_factor": spec.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": spec.rope_scaling.original_max_positions,
        }
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.heads,
        max_position_embeddings=spec.max_positions,
        rope_parameters=rope,
    )
    if spec.rope_scaling is None:
        exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim
        expected = (spec.rope_theta**-exponents).float()
    else:
        expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    torch.testing.assert_close(rope_frequencies(spec), expected, rtol=1e-6, atol=0)


def test_layouts_that_do_not_divide_are_named() -> None:
    spec = preset("llama3.2-3b")  # 24 heads, 8 groups, 28 layers
    spec.check_layout(ParallelLayout(tensor=8, pipeline=7, virtual_pipeline=2))
    for layout, message in (
        (ParallelLayout(tensor=16), r"actor heads=24 .*layout\.tensor=16"),
        (ParallelLayout(tensor=12), r"actor query groups=8 .*layout\.tensor=12"),
        (ParallelLayout(pipeline=8), r"actor layers=28 .*layout\.pipeline=8"),
        (ParallelLayout(pipeline=7, virtual_pipeline=3), r"actor layers=28 .*pipeline.*=21"),
    ):
        with pytest.raises(LayoutError, match=message):
            spec.check_layout(layout, "actor")
    odd = preset("tiny-xs").model_copy(update={"ffn_size": 129})
    with pytest.raises(LayoutError, match=r"model ffn_size=129 .*layout\.tensor=2"):
        odd.check_layout(ParallelLayout(tensor=2))


def test_vocabulary_is_padded_to_a_multiple() -> None:
    spec = preset("tiny-xs").model_copy(update={"vocab_size": 131})
    assert [spec.padded_vocab(ranks) for ranks in (1, 2, 4, 131)] == [131, 132, 132, 131]


@pytest.mark.parametrize(("change", "message"), [({"kv_heads": 3}, "kv_heads=3"), ({"head_dim": 15}, "head_dim=15")])
def test_impossible_shapes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelSpec.model_validate({**preset("tiny-xs").model_dump(), **change})


def test_flops_of_a_forward_by_hand() -> None:
    """hidden 8, 2 heads and 1 group of 4, ffn 16, 3 layers, 10 tokens of which 6 reach 11 columns, 5 keys each."""
    spec = ModelSpec(vocab_size=11, hidden_size=8, layers=3, heads=2, kv_heads=1, ffn_size=16, head_dim=4)
    query, key, value, out = 8 * 8, 8 * 4, 8 * 4, 8 * 8
    matrices = query + key + value + out + 3 * 8 * 16
    attention = 2 * (2 * 4 * 5)  # scores and mixture: heads x width x keys, in multiply-adds
    expected = 10 * 3 * 2 * (matrices + attention) + 6 * 2 * 8 * 11
    assert spec.forward_flops(tokens=10, keys=50, projected=6) == expected


@pytest.mark.parametrize(("stages", "pieces"), [(2, [63, 63]), (4, [31, 32, 32, 31]), (8, [15, *[16] * 6, 15])])
def test_the_layers_of_405b_are_dealt_out_with_embedding_and_head(stages: int, pieces: list[int]) -> None:
    """126 layers and two ends are 128: 8, 16 and 32 nodes of 8 GPUs hold them, where 126 divides by 7 and 9 only."""
    spec = preset("llama3.1-405b")
    spec.check_layout(ParallelLayout(tensor=8, pipeline=stages))
    dealt = [spec.layers_of(stages, first=i == 0, last=i == stages - 1) for i in range(stages)]
    assert dealt == pieces
    assert sum(dealt) == 126
    spec.check_layout(ParallelLayout(tensor=8, pipeline=16, virtual_pipeline=2))
    with pytest.raises(LayoutError, match=r"layers=126 is not divisible by layout.pipeline=10"):
        spec.check_layout(ParallelLayout(tensor=8, pipeline=10))
    with pytest.raises(LayoutError, match=r"layers=4 is not divisible by layout.pipeline=6"):  # stages without a layer
        preset("tiny-s").check_layout(ParallelLayout(pipeline=6))


def test_fp8_wants_multiples_of_16_in_every_rank() -> None:
    for name in ("llama3-8b", "llama3.1-405b", "llama3.2-1b"):
        preset(name).check_fp8(ParallelLayout(tensor=8), 16)
    odd = preset("tiny-xs").model_copy(update={"ffn_size": 200})
    with pytest.raises(LayoutError, match=r"multiples of 16, but ffn_size / layout.tensor=200; set compute.fp8=off"):
        odd.check_fp8(ParallelLayout(), 16)
