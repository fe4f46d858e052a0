"""Rows of 4096 tokens, shared by two ranks: the same step, in little more than half of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.batch.rollouts import PolicyRows, Rollout
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import Cut, InRows, InTokens
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig
from tests.helpers.models import language_model, learner, settings, whole_weights, worst
from tests.helpers.ranks import run_ranks
from tests.trainers.test_splits import LR, RELATIVE, WEIGHTS
from tools.memory_bench.measure import peak_bytes

TOKENS = 4097
"""Of the longest row, whose last is predicted alone: 4096 positions, 1024 in a chunk."""
PPO = PPOConfig.model_validate({"run_dir": "unused"})


def rows() -> Rollout:
    """A long prompt with a short response, and a row that no number of ranks divides."""
    generator = torch.Generator().manual_seed(3)
    lengths, prompts = torch.tensor([TOKENS, 3002]), torch.tensor([3900, 17])
    tokens = torch.randint(1, 131, (2, TOKENS), generator=generator)
    tokens[torch.arange(TOKENS) >= lengths[:, None]] = 0
    both = torch.arange(2)
    return Rollout(tokens, prompts, lengths, both >= 0, torch.zeros(2, TOKENS - 1), both, ("", ""))


def step(layout: ParallelLayout, cut: Cut, language: str) -> dict[str, Any]:
    """Score the rows and take a step on them; the most bytes that backward and forward held beside the model."""
    mesh = start(layout, seed=1)
    role = learner(language, LabelLogprobs(0.7), settings(mesh, cut), mesh, OptimConfig(lr=LR))
    rollout, noise = rows(), torch.randn(2, TOKENS - 1, generator=torch.Generator().manual_seed(4))
    scored = role.score(rollout)
    lesson, loss = PolicyRows(rollout, scored + 0.1 * noise, noise), policy_loss(role, PPO)
    with role.resident(*role.parts):
        peak = peak_bytes(lambda: role.accumulate(lesson, loss, cut), repeats=1)
    update = role.update(lesson, loss)
    numbers = {"loss": update.means.loss, "norm": update.grad_norm, **update.means.metrics}
    return {"scored": scored, "numbers": numbers, "weights": whole_weights(role), "peak": peak}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("long") / "language"
    language_model(directory, seed=1, max_position_embeddings=8192)
    return str(directory)


@pytest.mark.parametrize("cut", [InRows(1), InTokens(8192)], ids=str)
def test_two_ranks_learn_from_long_rows_what_one_does_in_less_memory(cut: Cut, language: str) -> None:
    (one,) = run_ranks(step, 1, ParallelLayout(), cut, language)
    for rank in run_ranks(step, 2, ParallelLayout(context=2), cut, language):
        scored: Tensor = rank["scored"]
        torch.testing.assert_close(scored, one["scored"], atol=1e-4, rtol=0)
        assert rank["numbers"] == pytest.approx(one["numbers"], rel=RELATIVE, abs=1e-6)
        assert worst(rank["weights"], one["weights"]) < WEIGHTS
        assert rank["peak"] < 0.65 * one["peak"], (rank["peak"], one["peak"])  # seen: 0.54
