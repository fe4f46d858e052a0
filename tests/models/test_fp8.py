"""FP8 with a stand-in for Transformer Engine: fresh copies of weights, sizes that products take, memory given back."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch

from megarlhf.batch.rollouts import Rollout
from megarlhf.errors import LayoutError
from megarlhf.gates.cheap import sampler_gate
from megarlhf.gates.gate import FP8
from megarlhf.models.fp8 import fp8_copies
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import RoleSettings, TrainableRole
from megarlhf.models.spec import preset
from megarlhf.parallel.layout import FP8_MULTIPLES, ParallelLayout
from megarlhf.parallel.mesh import Mesh, start
from megarlhf.parallel.micro_batches import InTokens, sequence_multiple
from megarlhf.rollout import engine as engine_module
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import SamplingConfig
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig
from tests.helpers.models import learner, name_of, ragged_rollout, settings
from tests.helpers.ranks import run_with_engine
from tests.rollout.worlds import EOS, PAD, prompts
from tests.trainers.test_splits import lessons

SAMPLING = SamplingConfig(temperature=1.0, max_new_tokens=12)
PPO = PPOConfig.model_validate({"run_dir": "unused", "sampling": SAMPLING})
ROWS = ragged_rollout(8)
MICRO_BATCH = 3
"""Divides neither 8 rows nor 16 positions."""


def actors(mesh: Mesh, *formats: Literal["hybrid", "e4m3"] | None) -> list[TrainableRole]:
    """The same model in each format; peaked enough that a step shows in its log-probs."""
    shared = settings(mesh, MICRO_BATCH)
    return [actor(mesh, shared, fp8) for fp8 in formats]


def actor(mesh: Mesh, shared: RoleSettings, fp8: Literal["hybrid", "e4m3"] | None) -> TrainableRole:
    compute = dataclasses.replace(shared.compute, transformer_engine=True, fp8=fp8)
    role = learner(
        "tiny-xs", LabelLogprobs(1.0), dataclasses.replace(shared, compute=compute), mesh, OptimConfig(lr=3e-3)
    )
    with torch.no_grad():
        role.model.output_layer.weight.mul_(20.0)
    role.optimizer.reload_model_params()
    return role


def sample_and_learn() -> dict[str, Any]:
    mesh = start(ParallelLayout(), seed=1)
    (role,) = actors(mesh, "hybrid")
    on_gpu = dataclasses.replace(mesh, device=torch.device("cuda"))
    engine = RolloutEngine(role, eos_ids=[EOS], pad_id=PAD, max_sequence_length=40)
    engine.mesh = on_gpu
    renew, gates = role.model.set_is_first_microbatch, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "CUDA_BLOCK_TOKENS", 16)
        patch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))

        def drawn() -> Rollout:
            return engine.generate(prompts(), SAMPLING, seed=7, group_size=3)

        gates["before"] = sampler_gate(role, drawn())
        assert role.update(lessons(0)[0], policy_loss(role, PPO)).stepped
        patch.setattr(role.model, "set_is_first_microbatch", lambda: None)
        stale = drawn()  # what rollouts were like
        patch.setattr(role.model, "set_is_first_microbatch", renew)
        gates["after"] = sampler_gate(role, drawn())
        gates["stale"] = sampler_gate(role, stale)
    return {name: (gate.value, gate.holds) for name, gate in gates.items()}


def test_a_rollout_is_drawn_from_the_weights_of_the_last_step() -> None:
    assert all(torch.tensor(bound).isfinite() for bound in dataclasses.astuple(FP8))
    gates = run_with_engine(sample_and_learn, 1)[0]
    assert gates["before"][1]
    assert gates["after"][1]
    assert not gates["stale"][1]
    assert gates["stale"][0] > 4 * gates["after"][0]


def score_and_learn(layout: ParallelLayout) -> tuple[float, float, float]:
    """How far FP8 takes log-probs and a step's gradient norm from those without it."""
    mesh = start(layout, seed=1)
    rounded, exact = actors(mesh, "hybrid", None)
    gap = (rounded.score(ROWS) - exact.score(ROWS))[ROWS.response_mask].abs().mean()
    norms = [role.update(lessons(0)[0], policy_loss(role, PPO)).grad_norm for role in (rounded, exact)]
    return float(gap), norms[0] / norms[1], float(rounded.resident_bytes() > exact.resident_bytes())


LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2, sequence_parallel=True),
    ParallelLayout(context=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_ragged_micro_batches_are_filled_up(layout: ParallelLayout) -> None:
    """Rows of 5 to 22 tokens, three at a time: 3 x 21 positions were refused."""
    for gap, ratio, copies_count in run_with_engine(score_and_learn, layout.world_size, layout):
        assert 1e-4 < gap < 0.1
        assert ratio == pytest.approx(1.0, abs=0.1)
        assert copies_count


def pack_with_engine(layout: ParallelLayout) -> dict[str, Any]:
    """What Transformer Engine's layers say and learn of rows in lines of their own and of packs; and of FP8 packs."""
    mesh = start(layout, seed=1)
    shared, found = settings(mesh, MICRO_BATCH), {}
    packed = dataclasses.replace(shared, cut=InTokens(64))
    roles = {"padded": actor(mesh, shared, None), "packed": actor(mesh, packed, None)}
    for name, role in {**roles, "fp8": actor(mesh, packed, "hybrid")}.items():
        score = role.score(ROWS)
        found[name] = score, role.update(lessons(0)[0], policy_loss(role, PPO)).grad_norm
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_with_engine(pack_with_engine, 1, ParallelLayout())[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_packs_go_through_transformer_engine_as_rows_do(layout: ParallelLayout, alone: dict[str, Any]) -> None:
    for found in run_with_engine(pack_with_engine, layout.world_size, layout):
        (padded, norm), (packed, norm_packed), (rounded, norm_rounded) = found.values()
        torch.testing.assert_close(padded, alone["padded"][0], atol=2e-5, rtol=0)
        assert norm == pytest.approx(alone["padded"][1], rel=2e-5)
        torch.testing.assert_close(packed, padded, atol=2e-5, rtol=0)
        assert norm_packed == pytest.approx(norm, rel=2e-5)
        # Packs are filled up to 16 positions a rank, which products of FP8 numbers take.
        assert 1e-4 < float((rounded - packed)[ROWS.response_mask].abs().mean()) < 0.1
        assert norm_rounded == pytest.approx(norm, rel=0.2)


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tensor=4, sequence_parallel=True)], ids=name_of)
@pytest.mark.parametrize("rows", range(1, 18))
@pytest.mark.parametrize("of", FP8_MULTIPLES.values())
def test_the_least_padding_that_fp8_takes(rows: int, layout: ParallelLayout, of: int) -> None:
    ranks = layout.tensor
    multiple = sequence_multiple(rows, layout, of)
    fits = [length for length in range(1, of * ranks + 1) if length % ranks == 0 and rows * length // ranks % of == 0]
    assert multiple == fits[0]
    assert sequence_multiple(rows, layout, 1) == ranks


def leave_and_return() -> dict[str, Any]:
    (role,) = actors(start(ParallelLayout(), seed=1), "e4m3")
    before = role.score(ROWS)
    weights = sum(parameter.numel() * 4 for parameter in role.model.parameters())
    copies = len(fp8_copies(role.chunks))
    resident = role.resident_bytes()
    role.leave()
    away = role.resident_bytes(), len(fp8_copies(role.chunks))
    same = torch.equal(role.score(ROWS), before)
    return {"copies": copies, "more": resident > weights, "away": away, "same": same, "again": role.resident_bytes()}


def test_copies_leave_the_device_with_their_role() -> None:
    found = run_with_engine(leave_and_return, 1)[0]
    assert found["copies"] == 2 * 4 * 4  # numbers and scale of four matrices in four layers
    assert found["more"]
    assert found["away"] == (0, 0)
    assert found["same"]
    assert found["again"] == 0  # what came for the scoring has left with it


def odd_sizes() -> str:
    mesh = start(ParallelLayout(tensor=2), seed=1)
    shared = settings(mesh)
    compute = dataclasses.replace(shared.compute, transformer_engine=True, fp8="e4m3")
    spec = preset("tiny-xs").model_copy(update={"ffn_size": 176})
    with pytest.raises(LayoutError) as caught:
        TrainableRole("actor", spec, "language", LabelLogprobs(1.0), dataclasses.replace(shared, compute=compute), mesh)
    return str(caught.value)


def test_sizes_that_fp8_cannot_take_are_refused_before_a_model_is_built() -> None:
    assert "ffn_size / layout.tensor=88" in run_with_engine(odd_sizes, 2)[0]
