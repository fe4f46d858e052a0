"""Adapters go with the weights to rollouts in another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.models.lora import adapted, adapters_off
from megarlhf.models.optim import OptimConfig
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import RolloutConfig, SamplingConfig
from tests.helpers.adapters import adapted_learner
from tests.helpers.models import language_model, settings
from tests.helpers.ranks import run_ranks
from tests.rollout.worlds import EOS, PAD, prompts

SAMPLING = SamplingConfig(temperature=0.7, max_new_tokens=6)


def roll(layout: ParallelLayout, drawn_in: dict[str, int] | None, directory: str, off: bool = False) -> Any:
    """Tokens and the sampler's log-probs of an actor with adapters, and how far they are from the trainer's."""
    mesh = start(layout, seed=1)
    role = adapted_learner(directory, settings(mesh), mesh, OptimConfig())
    cfg = RolloutConfig.model_validate({"layout": drawn_in})
    sampler = RolloutEngine(role, eos_ids=(EOS,), pad_id=PAD, max_sequence_length=40, settings=cfg)
    if off:
        with adapters_off(role.chunks):
            return sampler.generate(prompts(), SAMPLING, seed=7).tokens, None, None, None
    rollout = sampler.generate(prompts(), SAMPLING, seed=7)
    gap = (rollout.sampler_logprobs - role.score(rollout))[rollout.response_mask].abs().max()
    copies = [len(list(adapted(copy.chunks))) for copy in sampler.copies]
    return rollout.tokens, rollout.sampler_logprobs, float(gap), copies


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("model")
    language_model(folder, seed=1, vocab_size=160)
    return str(folder)


def test_the_same_tokens_are_drawn_with_adapters_in_another_layout(directory: str) -> None:
    tokens, logprobs, gap, _ = run_ranks(roll, 1, ParallelLayout(), None, directory)[0]
    assert gap < 1e-5
    without = run_ranks(roll, 1, ParallelLayout(), None, directory, True)[0][0]
    assert tokens.shape != without.shape or not torch.equal(tokens, without)
    for layout in (ParallelLayout(tensor=2), ParallelLayout(pipeline=2)):
        for told in run_ranks(roll, 2, layout, {"tensor": 1, "data": 2}, directory):
            assert torch.equal(told[0], tokens)
            torch.testing.assert_close(told[1], logprobs, atol=1e-5, rtol=0)
            assert told[2] < 1e-5
            assert told[3] == [16]  # four of each of four layers
