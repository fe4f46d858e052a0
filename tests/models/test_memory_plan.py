"""Bytes of a rank: by hand for Llama 3 8B, 70B and 405B, and as the models that are built have them."""

from __future__ import annotations

import pytest

from megarlhf.models.compute import ComputeConfig, resolve
from megarlhf.models.memory_plan import (
    Head,
    Held,
    Learns,
    cache_bytes_per_token,
    cache_row_bytes,
    held,
    numbers_of,
    pieces_of,
    pinned_bytes,
    rows_that_fit,
    saved_bytes,
    weight_sizes,
)
from megarlhf.models.spec import PRESETS, ModelSpec
from megarlhf.models.transformer import build_chunks
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.models import LAYOUTS, name_of
from tests.helpers.ranks import run_ranks

B8, B70, B405 = (PRESETS[name] for name in ("llama3-8b", "llama3-70b", "llama3.1-405b"))
TINY = ModelSpec(vocab_size=131, hidden_size=32, layers=4, heads=4, kv_heads=2, ffn_size=64, head_dim=8)


def test_8b_on_one_rank() -> None:
    # qkv 4096 x (32 + 2 x 8) x 128, proj 4096 x 4096, fc1 2 x 14336 x 4096, fc2 14336 x 4096, two norms of 4096
    layer = 25_165_824 + 16_777_216 + 117_440_512 + 58_720_256 + 8_192
    assert layer == 218_112_000
    # embedding and head 128256 x 4096 each, a final norm
    assert numbers_of(B8, "language", ParallelLayout(), 0) == 32 * layer + 2 * 525_336_576 + 4_096 == 8_030_261_248
    assert B8.parameters == 8_030_261_248
    # A scalar head has 4096 numbers in place of the vocabulary's.
    assert numbers_of(B8, "scalar", ParallelLayout(), 0) == 8_030_261_248 - 525_336_576 + 4_096


def test_8b_on_two_tensor_and_four_data_ranks() -> None:
    layout = ParallelLayout(tensor=2, data=4)
    # Matrices are halved, norms are not: 218,103,808 / 2 + 8,192 a layer, 262,668,288 of either end, and 4,096.
    numbers = 32 * (109_051_904 + 8_192) + 2 * 262_668_288 + 4_096
    assert numbers_of(B8, "language", layout, 0) == numbers == 4_015_263_744
    # bf16 weights, fp32 gradients, and of masters and two moments in fp32 a quarter: 12 bytes a number over 4 ranks.
    assert held(numbers, 2, Learns(distributed=True, copies=4)) == Held(
        weights=8_030_527_488,
        gradients=16_061_054_976,
        masters=4_015_263_744,
        moments=8_030_527_488,
        staged=12 * numbers,
        gathered=16_061_054_976 + 4_015_263_744,
    )
    assert held(numbers, 2) == Held(weights=8_030_527_488)


def test_70b_on_eight_tensor_and_four_pipeline_ranks() -> None:
    layout = ParallelLayout(tensor=8, pipeline=4, data=2)
    # (83,886,080 + 67,108,864 + 469,762,048 + 234,881,024) / 8 + 2 x 8192 a layer; 20 layers a stage
    stage = 20 * (106_954_752 + 16_384)
    vocabulary = 131_334_144  # 128256 x 8192 / 8
    ranks = [numbers_of(B70, "language", layout, rank) for rank in range(4)]
    assert ranks == [stage + vocabulary, stage, stage, stage + vocabulary + 8_192]
    assert ranks[3] == 2_270_765_056


def test_405b_on_eight_tensor_and_sixteen_pipeline_ranks() -> None:
    layout = ParallelLayout(tensor=8, pipeline=16, data=4)
    # 126 layers, an embedding and a head are 128: 8 a stage, so that the first and the last have 7 layers.
    assert [pieces_of(B405, layout, rank)[0].layers for rank in (0, 1, 14, 15)] == [7, 8, 8, 7]
    layer = (301_989_888 + 268_435_456 + 1_744_830_464 + 872_415_232) // 8 + 32_768
    vocabulary = 262_668_288  # 128256 x 16384 / 8
    ranks = [numbers_of(B405, "language", layout, rank) for rank in range(16)]
    assert ranks == [7 * layer + vocabulary, *[8 * layer] * 14, 7 * layer + vocabulary + 16_384]
    assert ranks[1] == 3_187_933_184
    # The most loaded rank, bf16, a quarter of 12 bytes: 2 + 4 + 3 bytes a number.
    assert held(ranks[1], 2, Learns(True, 4)).all == 9 * 3_187_933_184


@pytest.mark.parametrize(("spec", "count"), [(B8, 8_030_261_248), (B70, 70_553_706_496), (B405, 405_853_388_800)])
def test_ranks_add_up_to_the_model(spec: ModelSpec, count: int) -> None:
    for pipeline in (1, 2):
        layout = ParallelLayout(pipeline=pipeline)
        assert sum(numbers_of(spec, "language", layout, rank) for rank in range(pipeline)) == spec.parameters == count


def test_precision_and_sharing() -> None:
    whole, shared = held(1000, 4, Learns(False, 8)), held(1000, 4, Learns(True, 8))
    # fp32 weights are their own masters; undistributed state is whole on each data rank, and nothing is gathered.
    assert (whole.weights, whole.gradients, whole.masters, whole.moments) == (4000, 4000, 0, 8000)
    assert (whole.staged, whole.gathered) == (0, 0)
    assert (shared.moments, shared.gathered) == (1000, 4000 + 500)
    assert held(1000, 2, Learns(True, 8)).masters == 500


def test_a_saved_state_is_eighteen_bytes_a_weight_of_bf16() -> None:
    # bf16 weights, their fp32 twins, and the optimiser's three of fp32: 2 + 4 + 12.
    learns = Learns(distributed=True, copies=4)
    assert 4 * saved_bytes(held(1000, 2, learns), learns) == 18_000


def test_the_cache_of_a_row() -> None:
    # Keys and values of 32 layers, 8 / 2 query groups of 128 in bf16; rows of 1536 tokens are 6 blocks.
    per_token = cache_bytes_per_token(B8, 32, 2, 2)
    assert per_token == 2 * 32 * 4 * 128 * 2 == 65_536
    assert cache_row_bytes(1536, 256, per_token) == 1536 * 65_536
    assert cache_row_bytes(1537, 256, per_token) == 1792 * 65_536
    # Of 10.5 rows' memory and 0.8 of it, 8 fit, one of which is padding's.
    assert rows_that_fit(105, 0.8, 10) == 7
    assert rows_that_fit(0, 0.8, 10) == 0


def test_pinned_blocks_are_powers_of_two() -> None:
    assert pinned_bytes([1, 2, 3, 4, 5, 0]) == 1 + 2 + 4 + 4 + 8


def built(layout: ParallelLayout) -> dict[str, tuple[int, int, list[int]]]:
    """The pipeline rank, and the weights that the models of this rank have, by head and tying."""
    mesh = start(layout, seed=1)
    compute = resolve(ComputeConfig(), mesh.device)
    found = {}
    heads: list[tuple[Head, bool]] = [("language", False), ("language", True), ("scalar", False), ("scalar", True)]
    for head, tied in heads:
        spec = TINY.model_copy(update={"tie_embeddings": tied})
        sizes = [p.numel() for chunk in build_chunks(spec, head, compute, mesh) for p in chunk.parameters()]
        planned = sorted(weight_sizes(spec, head, layout, mesh.pipeline_rank))
        assert sorted(sizes) == planned
        found[f"{head} {tied}"] = sum(sizes), numbers_of(spec, head, layout, mesh.pipeline_rank)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_weights_are_those_of_the_models_that_are_built(layout: ParallelLayout) -> None:
    for rank in run_ranks(built, layout.world_size, layout):
        assert all(made == planned for made, planned in rank.values())
