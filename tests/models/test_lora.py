"""Adapters: what they compute, their gradients, what they leave alone, in every layout and by both kinds of layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.models.optim import OptimConfig
from megarlhf.models.role import TrainableRole
from megarlhf.models.transformer import named_parameters
from megarlhf.models.unadapted import UnadaptedRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import InTokens
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig, value_loss
from tests.helpers.adapters import adapted_learner, whole_adapters
from tests.helpers.models import language_model, ragged_rollout, score_model, settings
from tests.helpers.ranks import run_ranks
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
