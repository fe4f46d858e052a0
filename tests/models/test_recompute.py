"""What backward computes again changes no bit of a gradient, and is memory that is not there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.errors import LayoutError
from megarlhf.models.memory_plan import pieces_of
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs, PositionValues
from megarlhf.models.recompute import (
    Recompute,
    check_recompute,
    megatron_recompute,
    most_layers,
    whole_layers,
)
from megarlhf.models.role import TrainableRole
from megarlhf.models.spec import PRESETS
from megarlhf.parallel.gradients import gradient_buffers
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import Cut, InRows, InTokens
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig, value_loss
from tests.helpers.models import language_model, learner, name_of, score_model, settings
from tests.helpers.ranks import run_ranks, run_with_engine
from tests.trainers.test_splits import lessons
from tools.memory_bench.cases import Case
from tools.memory_bench.measure import measured

PPO = PPOConfig.model_validate({"run_dir": "unused"})
INTERLEAVED = ParallelLayout(pipeline=2, virtual_pipeline=2)
LAYOUTS = [ParallelLayout(), ParallelLayout(tensor=2, sequence_parallel=True), ParallelLayout(pipeline=2), INTERLEAVED]


def chosen(layout: ParallelLayout) -> list[Recompute]:
    """Every kind, of chunks of 4, 2 or 1 layers: all of them by number too."""
    return ["none", "selective", "full", *range(1, most_layers(PRESETS["tiny-xs"], layout) + 1)]


def gradients(
    layout: ParallelLayout, cut: Cut, engine: bool, fp8: Any, language: str, scalar: str
) -> dict[str, list[Tensor]]:
    """Buffers of an actor and a critic after a step, and how often layers and MLPs ran, by setting."""
    mesh = start(layout, seed=1)
    shared, found = settings(mesh, cut), {}
    for recompute in chosen(layout):
        compute = dataclasses.replace(shared.compute, recompute=recompute, transformer_engine=engine, fp8=fp8)
        of = dataclasses.replace(shared, compute=compute)
        roles = [
            learner(language, LabelLogprobs(1.0), of, mesh, OptimConfig()),
            learner(scalar, PositionValues(), of, mesh, OptimConfig()),
        ]
        ran = [0, 0]
        for role in roles:
            count_runs(role, ran)
        given, values = lessons(0)
        roles[0].update(given, policy_loss(roles[0], PPO))
        roles[1].update(values, value_loss(roles[1], PPO))
        buffers = [buffer.clone() for role in roles for each in role.wrapped for buffer in gradient_buffers(each)]
        found[str(recompute)] = [*buffers, torch.tensor(ran)]
    return found


def count_runs(role: TrainableRole, ran: list[int]) -> None:
    """Add to `ran` how often layers, and MLPs of layers, are run."""

    def counting(which: int) -> Any:
        def count(*_: object) -> None:
            ran[which] += 1

        return count

    for chunk in role.chunks:
        layers: Any = chunk.decoder.layers
        for layer in layers:
            layer.self_attention.linear_qkv.register_forward_pre_hook(counting(0))
            layer.mlp.linear_fc1.register_forward_pre_hook(counting(1))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    language_model(folder / "language", seed=1)
    score_model(folder / "scalar", seed=3)
    return str(folder / "language"), str(folder / "scalar")


CASES_OF_GRADIENTS = [
    *[(layout, InRows(2), False, None) for layout in LAYOUTS],
    (ParallelLayout(), InTokens(64), False, None),
    (ParallelLayout(pipeline=2), InRows(2), True, "hybrid"),
]


@pytest.mark.parametrize(
    ("layout", "cut", "engine", "fp8"),
    CASES_OF_GRADIENTS,
    ids=[f"{name_of(case[0])}-{case[1]}-{'engine' if case[2] else 'local'}-{case[3]}" for case in CASES_OF_GRADIENTS],
)
def test_gradients_are_the_same_to_the_bit(
    layout: ParallelLayout, cut: Cut, engine: bool, fp8: Any, models: tuple[str, str]
) -> None:
    run = run_with_engine if engine else run_ranks
    for rank in run(gradients, layout.world_size, layout, cut, engine, fp8, *models):
        *expected, plain = rank["none"]
        assert all(bool(buffer.any()) for buffer in expected)
        for recompute, (*buffers, ran) in rank.items():
            for buffer, reference in zip(buffers, expected, strict=True):
                assert torch.equal(buffer, reference), recompute
            assert_ran(recompute, ran.tolist(), plain.tolist(), layout, fp8)


def assert_ran(recompute: str, ran: list[int], plain: list[int], layout: ParallelLayout, fp8: Any) -> None:
    """Layers ran as often as the setting says: each once a micro-batch, and what backward computes again twice."""
    pieces = pieces_of(PRESETS["tiny-xs"], layout, 0)
    layers = sum(piece.layers for piece in pieces)
    value: Any = int(recompute) if recompute.isdigit() else recompute
    again = sum(whole_layers(value, piece.layers) for piece in pieces)
    share = [1 + again / layers, 1 + (again / layers if recompute != "selective" else 1)]
    assert [count * part for count, part in zip(plain, share, strict=True)] == ran


def test_memory_falls_as_planned() -> None:
    """Bytes that torch's allocator gave out in a step, by setting; the plan says the same order."""
    found, planned = [], []
    for recompute in ("none", 3, "selective", 6, "full"):
        case = Case("falling", ParallelLayout(), recompute=recompute)
        found.append(run_ranks(measured, 1, case)[0]["train"]["peak"])
        planned.append(case.planned()["train"].total)
    assert found == sorted(found, reverse=True)
    assert planned == sorted(planned, reverse=True)
    assert found[-1] < 0.55 * found[0]


@pytest.mark.parametrize(
    ("layers", "layout", "said"),
    [
        (
            9,
            {"pipeline": 4},
            "a stage of actor.init has 8 of its 32 (layout.pipeline=4, layout.virtual_pipeline=1); set",
        ),
        (5, {"pipeline": 4, "virtual_pipeline": 2}, "a chunk of a stage of actor.init has 4 of its 32"),
        (33, {}, "compute.recompute to at most 32, or to full."),
    ],
)
def test_more_layers_than_there_are_is_refused(layers: int, layout: dict[str, int], said: str) -> None:
    split, spec = ParallelLayout.model_validate(layout), PRESETS["llama3-8b"]
    with pytest.raises(LayoutError) as caught:
        check_recompute(layers, spec, split, "actor.init")
    assert said in str(caught.value)
    most = int(str(caught.value).split("at most ")[1].split(",")[0])
    check_recompute(most, spec, split)  # what the message asks for
    for named in ("none", "selective", "full"):
        check_recompute(named, spec, split)


def test_the_ends_of_405b_may_have_a_layer_less() -> None:
    check_recompute(8, PRESETS["llama3.1-405b"], ParallelLayout(pipeline=16))
    with pytest.raises(LayoutError, match="at most 8"):
        check_recompute(9, PRESETS["llama3.1-405b"], ParallelLayout(pipeline=16))
    assert [whole_layers(8, layers) for layers in (7, 8, 9)] == [7, 8, 8]


def test_megatron_s_words() -> None:
    """Fields of its configuration, and modules that its layer knows."""
    assert megatron_recompute("none") == {}
    fields = megatron_recompute("selective")
    assert fields == {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    assert megatron_recompute(5) == {
        "recompute_granularity": "full",
        "recompute_method": "block",
        "recompute_num_layers": 5,
    }
