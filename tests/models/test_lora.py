"""Adapters: what they compute, their gradients, what they leave alone, in every layout and by both kinds of layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.batch.rollouts import PolicyRows
from megarlhf.checkpoint.model_directory import describe_model, load_model
from megarlhf.errors import ConfigError
from megarlhf.models.lora import MODULES, LoraConfig, adapted
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import TrainableRole
from megarlhf.models.spec import preset
from megarlhf.models.transformer import named_parameters
from megarlhf.models.unadapted import UnadaptedRole
from megarlhf.parallel.gradients import gradient_buffers, main_grad
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import InTokens
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig, value_loss
from tests.helpers.adapters import LORA, adapted_learner, whole_adapters
from tests.helpers.models import frozen, language_model, learner, name_of, ragged_rollout, score_model, settings
from tests.helpers.ranks import run_ranks, run_with_engine
from tests.trainers.test_splits import LR, RELATIVE, STEPS, VOCAB, WEIGHTS, Split, lessons

PPO = PPOConfig.model_validate({"run_dir": "unused", "sampling": {"temperature": 0.7}})
ROWS = ragged_rollout(8, vocab=VOCAB)
SPLITS = [
    Split(ParallelLayout(tensor=2), 4, distributed=True),
    Split(ParallelLayout(tensor=2, sequence_parallel=True), 2),
    Split(ParallelLayout(pipeline=2), 2, distributed=True),
    Split(ParallelLayout(pipeline=2, virtual_pipeline=2), InTokens(64)),
    Split(ParallelLayout(data=2), InTokens(46), distributed=True),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    language_model(folder / "language", seed=1)
    score_model(folder / "scalar", seed=3)
    return str(folder / "language"), str(folder / "scalar")


def frozen_bits(role: TrainableRole) -> dict[str, Tensor]:
    """A copy of every weight of this rank that must not learn."""
    with role.resident("weights"):
        pairs = [(name, p) for name, p in named_parameters(role.chunks) if not p.requires_grad]
        return {name: parameter.detach().clone() for name, parameter in pairs}


def learn(split: Split, language: str, scalar: str) -> dict[str, Any]:
    """Steps of actor and critic by adapters: what they report, the adapters, and what the models say then."""
    mesh = start(split.layout, seed=1)
    result: dict[str, Any] = {}
    for name, directory in (("actor", language), ("critic", scalar)):
        optim = OptimConfig(lr=LR, weight_decay=0.1, max_grad_norm=0.5, distributed=split.distributed)
        role = adapted_learner(directory, settings(mesh, split.micro_batch), mesh, optim)
        reference = UnadaptedRole("reference", role)
        before, at_start = frozen_bits(role), reference.score(ROWS)
        heads = {key for key, p in named_parameters(role.chunks) if p.requires_grad and ".lora." not in key}
        assert heads == ({"output_layer.weight"} if name == "critic" and role.model.post_process else set())
        loss = policy_loss(role, PPO) if name == "actor" else value_loss(role, PPO)
        updates = [role.update(lessons(i)[name == "critic"], loss) for i in range(STEPS)]
        assert all(update.stepped for update in updates)
        after = frozen_bits(role)
        assert all(torch.equal(after[key], weight) for key, weight in before.items()), "a frozen weight has learnt"
        if name == "actor":  # a critic's head learns
            assert torch.equal(reference.score(ROWS), at_start), "the reference has learnt"
        result[name] = {
            "steps": [{"loss": u.means.loss, "norm": u.grad_norm, **u.means.metrics} for u in updates],
            "adapters": whole_adapters(role),
            "scores": role.score(ROWS),
            "reference": at_start,
        }
    return result


@pytest.fixture(scope="module")
def on_one_rank(models: tuple[str, str]) -> dict[str, Any]:
    return run_ranks(learn, 1, Split(ParallelLayout(), 8), *models)[0]


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_split_learns_the_same_adapters(split: Split, models: tuple[str, str], on_one_rank: dict[str, Any]) -> None:
    for told in run_ranks(learn, split.layout.world_size, split, *models):
        for role, expected in on_one_rank.items():
            got = told[role]
            for ours, theirs in zip(got["steps"], expected["steps"], strict=True):
                assert ours == pytest.approx(theirs, rel=RELATIVE, abs=1e-6), role
            assert got["adapters"].keys() == expected["adapters"].keys()
            for key, tensor in expected["adapters"].items():
                assert float((got["adapters"][key] - tensor).abs().max()) < WEIGHTS, f"{role} {key}"
            for what in ("scores", "reference"):
                torch.testing.assert_close(got[what], expected[what], atol=1e-4, rtol=0, msg=f"{role} {what}")


def first_word(layout: ParallelLayout, directory: str) -> tuple[float, bool, list[bool]]:
    """Before anything is learnt: how far the model is from its base, whether the head learns, and which weights do."""
    mesh = start(layout, seed=1)
    base = frozen(directory, LabelLogprobs(0.7), mesh)
    found = describe_model(directory)
    role = TrainableRole("learner", found.spec, found.head, LabelLogprobs(0.7), settings(mesh), mesh)
    load_model(role, directory, seed=1)
    role.learn_adapters(LORA, seed=1)
    role.prepare(OptimConfig(), 10)
    learns = {name for name, p in named_parameters(role.chunks) if p.requires_grad}
    drawn = [bool(each.adapter.a.abs().max() > 0) for each in adapted(role.chunks)]
    return float((role.score(ROWS) - base.score(ROWS)).abs().max()), all(".lora." in name for name in learns), drawn


@pytest.mark.parametrize("layout", [ParallelLayout(tensor=2), ParallelLayout(pipeline=2)], ids=name_of)
def test_at_first_the_model_is_its_base_to_the_bit(layout: ParallelLayout, models: tuple[str, str]) -> None:
    for gap, only_adapters, drawn in run_ranks(first_word, 2, layout, models[0]):
        assert gap == 0.0
        assert only_adapters
        assert all(drawn)
        assert len(drawn) == (16 if layout.tensor == 2 else 8)


def gradients_of(role: TrainableRole, rows: PolicyRows) -> dict[str, Tensor]:
    """Of the policy loss."""
    with role.resident("weights", "gradients"):
        role.accumulate(rows, policy_loss(role, PPO), role.settings.cut)
        learnt = [(name, main_grad(p)) for name, p in named_parameters(role.chunks) if p.requires_grad]
        return {name: gradient.clone() for name, gradient in learnt if gradient is not None}


def by_the_chain_rule(directory: str) -> dict[str, float]:
    """Of each adapter's gradient, how far it is from what the whole weight's gradient G says, over its size.

    W' = W + s B A, so dB = s G A^T and dA = s B^T G.
    """
    mesh = start(ParallelLayout(), seed=1)
    rows, _ = lessons(0)
    role = adapted_learner(directory, settings(mesh), mesh, OptimConfig(distributed=False))
    ours = gradients_of(role, rows)
    each = {f"decoder.layers.{one.number}.{MODULES[one.adapter.target]}": one for one in adapted(role.chunks)}
    factors = {name: (one.adapter.a.detach().clone(), one.adapter.b.detach().clone()) for name, one in each.items()}
    whole = adapted_learner(directory, settings(mesh), mesh, OptimConfig(distributed=False))
    whole.merge()
    for chunk in whole.chunks:
        chunk.requires_grad_(True)
    whole.prepare(OptimConfig(distributed=False), 10)
    theirs = gradients_of(whole, rows)
    gaps = {}
    for name, (a, b) in factors.items():
        gradient = theirs[f"{name}.weight"]
        expected = {"a": LORA.scale * b.t() @ gradient, "b": LORA.scale * gradient @ a.t()}
        for part, wanted in expected.items():
            gaps[f"{name}.{part}"] = float((ours[f"{name}.lora.{part}"] - wanted).norm() / wanted.norm())
    return gaps


def test_gradients_are_those_of_the_whole_weight_by_the_chain_rule(models: tuple[str, str]) -> None:
    gaps = run_ranks(by_the_chain_rule, 1, models[0])[0]
    assert len(gaps) == 32
    assert max(gaps.values()) < 1e-5


def recomputed(directory: str) -> list[float]:
    """Of each adapter's gradient, how far it is from that without recomputing, over its size."""
    mesh = start(ParallelLayout(), seed=1)
    rows, _ = lessons(0)
    found = []
    for recompute in (False, True):
        shared = settings(mesh)
        shared = replace(shared, compute=replace(shared.compute, recompute=recompute))
        found.append(gradients_of(adapted_learner(directory, shared, mesh, OptimConfig(distributed=False)), rows))
    return [float((found[1][name] - gradient).norm() / gradient.norm()) for name, gradient in found[0].items()]


def test_layers_that_are_computed_again_have_gradients_over_a_frozen_embedding(models: tuple[str, str]) -> None:
    gaps = run_ranks(recomputed, 1, models[0])[0]
    assert len(gaps) == 32
    assert max(gaps) < 1e-6


def kept(layout: ParallelLayout, dtype: str, directory: str) -> dict[str, tuple[int, int]]:
    """Bytes of each part, planned and there, with adapters and without."""
    mesh = start(layout, seed=1)
    optim, shared = OptimConfig(distributed=False), settings(mesh, dtype=dtype)
    roles = {
        "adapters": adapted_learner(directory, shared, mesh, optim),
        "whole": learner(directory, LabelLogprobs(0.7), shared, mesh, optim),
    }
    found = {}
    for name, role in roles.items():
        role.update(lessons(0)[0], policy_loss(role, PPO))
        state, weights = (sum(t.nbytes for t in role.tensors(part)) for part in ("optimizer", "weights"))
        buffers = [buffer for wrapped in role.wrapped for buffer in gradient_buffers(wrapped)]
        found[f"{name} gradients"] = role.planned.gradients, sum(buffer.nbytes for buffer in buffers)
        found[f"{name} optimiser"] = role.planned.optimiser, state
        found[f"{name} weights"] = role.planned.weights, weights
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_frozen_weights_have_no_gradients_and_no_state(dtype: str, models: tuple[str, str]) -> None:
    found = run_ranks(kept, 2, ParallelLayout(tensor=2), dtype, models[0])[0]
    learnt = found["adapters gradients"][0] // 4
    # Of four layers on one of two ranks: A is whole and B cut for qkv and fc1, the other way round for proj and fc2.
    assert learnt == 4 * 3 * ((32 + 64 // 2) + (32 // 2 + 32) + (32 + 128 // 2) + (64 // 2 + 32))
    for name in ("adapters", "whole"):
        # fp32 weights are their own masters, which the plan does not count again.
        again = found[f"{name} gradients"][0] if dtype == "float32" else 0
        for part, more in (("weights", 0), ("gradients", 0), ("optimiser", again)):
            planned, there = found[f"{name} {part}"]
            assert planned + more == there, f"{name} {part}"
    assert 3 * found["adapters optimiser"][1] < found["whole optimiser"][1]


def by_the_engine(layout: ParallelLayout, directory: str, with_engine: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs and gradients by local layers or by Transformer Engine's."""
    mesh = start(layout, seed=1)
    rows, _ = lessons(0)
    shared = settings(mesh)
    if with_engine:
        shared = replace(shared, compute=replace(shared.compute, transformer_engine=True))
    role = adapted_learner(directory, shared, mesh, OptimConfig(distributed=False))
    return role.score(ROWS), gradients_of(role, rows)


def test_transformer_engines_layers_take_adapters_as_ours_do(models: tuple[str, str]) -> None:
    for layout in (ParallelLayout(tensor=2), ParallelLayout(tensor=2, sequence_parallel=True)):
        ours = run_ranks(by_the_engine, 2, layout, models[0], False)
        theirs = run_with_engine(by_the_engine, 2, layout, models[0], True)
        for (scores, gradients), (others, wanted) in zip(theirs, ours, strict=True):
            torch.testing.assert_close(scores, others, atol=1e-5, rtol=0)
            assert gradients.keys() == wanted.keys()
            for name, gradient in gradients.items():
                assert float((gradient - wanted[name]).norm()) < 1e-5 * float(wanted[name].norm()), name


def test_a_rank_that_no_matrix_has_is_refused() -> None:
    spec = preset("tiny-xs")  # 64 wide, 4 heads of 16, 2 groups, ffn 192
    LoraConfig(rank=64).check(spec, "actor.lora")
    with pytest.raises(ConfigError, match=r"actor\.lora\.rank=65 is more than 64, .* qkv, .*at most 64"):
        LoraConfig(rank=65).check(spec, "actor.lora")


@pytest.mark.parametrize("targets", [[], ["qkv", "qkv"], ["q_proj"]])
def test_targets_that_mean_nothing_are_refused(targets: list[str]) -> None:
    with pytest.raises(ValueError, match="fc2"):
        LoraConfig.model_validate({"targets": targets})
