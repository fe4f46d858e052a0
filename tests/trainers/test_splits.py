"""Losses, gradients and next weights do not depend on how the work is split (invariants 3 and 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.batch.rollouts import Anchored, PolicyRows, ValueRows
from megarlhf.batch.supervised import AnchoredPairs, JudgedSteps, LabelledResponses, PreferencePairs, TokenBatch
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs, PositionValues, SequenceScores, StepScores
from megarlhf.models.role import TrainableRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import InTokens, Loss
from megarlhf.rollout.sampling import SamplingConfig
from megarlhf.trainers import dpo
from megarlhf.trainers.cispo import CISPOConfig
from megarlhf.trainers.critic_free import CriticFreeConfig, critic_free_loss
from megarlhf.trainers.dr_grpo import DrGRPOConfig
from megarlhf.trainers.grpo import GRPOConfig
from megarlhf.trainers.gspo import GSPOConfig
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig, value_loss
from megarlhf.trainers.process_reward import ProcessRewardConfig, step_batch, step_loss
from megarlhf.trainers.reward import RewardConfig, couple, judgement_loss
from megarlhf.trainers.sft import next_token_loss
from tests.helpers.models import (
    STRETCHED,
    language_model,
    learner,
    name_of,
    ragged_rollout,
    score_model,
    settings,
    whole_weights,
    worst,
)
from tests.helpers.ranks import run_ranks

STEPS = 2
"""The second is the first that reads what the optimiser keeps."""
LR = 1e-3
RELATIVE = 2e-5
"""Of losses, metrics and gradient norms: fp32 sums of some thousand terms in another order, two steps deep."""
WEIGHTS = 5e-3 * LR
"""A step moves a weight by LR or less; Adam divides a gradient's rounding error, about 1e-8, by eps = 1e-5 or more."""
VOCAB = 131
ROWS = ragged_rollout(8, vocab=VOCAB)
SHARED = {"run_dir": "unused", "sampling": SamplingConfig(temperature=0.7, max_new_tokens=21)}


@dataclass(frozen=True)
class Split:
    """A layout, rows of a micro-batch or tokens of a pack, and whether optimiser state is sharded."""

    layout: ParallelLayout
    micro_batch: int | InTokens
    distributed: bool = False

    def __str__(self) -> str:
        cut = self.micro_batch
        named = f"micro{cut}" if isinstance(cut, int) else f"packed{cut.tokens}"
        return f"{name_of(self.layout)}-{named}{'-distributed' * self.distributed}"


WHOLE = Split(ParallelLayout(), 8)
SPLITS = [
    Split(ParallelLayout(), 1),
    Split(ParallelLayout(), 3, distributed=True),  # 3 does not divide 8: a short last micro-batch
    Split(ParallelLayout(tensor=2), 4, distributed=True),
    pytest.param(Split(ParallelLayout(tensor=2, sequence_parallel=True), 2), marks=pytest.mark.slow),  # as the last
    Split(ParallelLayout(pipeline=2), 2, distributed=True),
    Split(ParallelLayout(pipeline=2, virtual_pipeline=2), 2, distributed=True),
    Split(ParallelLayout(pipeline=3), 2, distributed=True),  # 1, 2 and 1 of four layers
    Split(ParallelLayout(data=2), 2),
    Split(ParallelLayout(data=2), 4, distributed=True),
    Split(ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True), 2),
    Split(ParallelLayout(pipeline=2, data=2), 2, distributed=True),
    Split(ParallelLayout(tensor=2, data=2, sequence_parallel=True), 2, distributed=True),
    Split(ParallelLayout(context=2), 2, distributed=True),
    Split(ParallelLayout(context=2, pipeline=2), 2),
    pytest.param(Split(ParallelLayout(context=2, data=2), 4, distributed=True), marks=pytest.mark.slow),
    pytest.param(Split(ParallelLayout(context=4), 1), marks=pytest.mark.slow),  # 8 chunks of rows of up to 22 tokens
    # Rows have up to 22 tokens, pairs 44. A budget of 46 takes one pair or two, 64 up to three; 1,000 everything.
    Split(ParallelLayout(), InTokens(46), distributed=True),
    pytest.param(Split(ParallelLayout(), InTokens(1000)), marks=pytest.mark.slow),
    Split(ParallelLayout(tensor=2), InTokens(64), distributed=True),
    Split(ParallelLayout(pipeline=2), InTokens(46)),
    Split(ParallelLayout(pipeline=2, virtual_pipeline=2), InTokens(64), distributed=True),
    Split(ParallelLayout(data=2), InTokens(46), distributed=True),
    Split(ParallelLayout(tensor=2, pipeline=2, sequence_parallel=True), InTokens(46)),
    Split(ParallelLayout(pipeline=2, data=2), InTokens(64)),
    Split(ParallelLayout(tensor=2, data=2, sequence_parallel=True), InTokens(64), distributed=True),
    Split(ParallelLayout(context=2), InTokens(46)),
    Split(ParallelLayout(context=2, tensor=2, sequence_parallel=True), InTokens(64), distributed=True),
    Split(ParallelLayout(context=2, data=2), InTokens(46), distributed=True),
    pytest.param(
        Split(ParallelLayout(context=2, pipeline=2, virtual_pipeline=2), InTokens(64)), marks=pytest.mark.slow
    ),
]


def sft_batch(step: int) -> TokenBatch:
    """Other rows and another supervised part at every step."""
    rows = ragged_rollout(8, vocab=VOCAB, seed=20 + step)
    return TokenBatch(rows.tokens, rows.lengths, rows.response_mask)


def lessons(step: int) -> tuple[PolicyRows, ValueRows]:
    """Log-probs near a uniform policy's and values near 0, so that some tokens are clipped and some are not."""
    rows = ragged_rollout(8, vocab=VOCAB, seed=40 + step)
    generator = torch.Generator().manual_seed(60 + step)
    noise = torch.randn(4, *rows.labels.shape, generator=generator)
    logprobs = -torch.tensor(float(VOCAB)).log() + noise[0]
    return PolicyRows(rows, logprobs, noise[2]), ValueRows(rows, 0.5 * noise[1], noise[3])


ALGORITHMS: dict[str, CriticFreeConfig] = {
    "grpo": GRPOConfig.model_validate({**SHARED, "kl_coef": 0.3, "entropy_coef": 0.1}),
    "dr_grpo": DrGRPOConfig.model_validate({**SHARED, "kl_coef": 0.3, "kl_estimator": "k1", "dual_clip": 1.5}),
    "gspo": GSPOConfig.model_validate({**SHARED, "kl_coef": 0.3, "clip_range": 0.1, "clip_range_high": 0.2}),
    "cispo": CISPOConfig.model_validate({**SHARED, "clip_range_high": 0.5, "loss_mean": "sequence"}),
}
"""Each choice of a loss in one of them: whose ratio, what is clipped, what the mean is over, where the KL is."""


def anchored(step: int) -> Anchored:
    """As `lessons`, and a reference."""
    given, values = lessons(step)
    return Anchored(given.rollout, given.logprobs, given.advantages, given.logprobs + values.values)


def couples(step: int) -> Any:
    """Three weighted pairs and ten judged responses: 8 couples in one batch."""
    generator = torch.Generator().manual_seed(80 + step)
    pairs, judged = ragged_rollout(6, vocab=VOCAB, seed=90 + step), ragged_rollout(10, vocab=VOCAB, seed=95 + step)
    return couple(
        PreferencePairs(pairs.tokens, pairs.prompt_lengths, pairs.lengths, torch.tensor([1.0, 0.5, 2.0])),
        LabelledResponses(
            judged.tokens, judged.lengths, torch.rand(10, generator=generator).round(decimals=1), torch.ones(10)
        ),
        0.7,
    )


def judged_steps(step: int) -> Any:
    """Three weighted pairs and ten responses of judged steps, of which some have no label: 8 couples in one batch."""
    generator = torch.Generator().manual_seed(120 + step)
    pairs, judged = ragged_rollout(6, vocab=VOCAB, seed=130 + step), ragged_rollout(10, vocab=VOCAB, seed=135 + step)
    place = torch.arange(judged.tokens.shape[1])
    ends = (place < judged.lengths[:, None]) & (torch.rand(judged.tokens.shape, generator=generator) < 0.4)
    ends |= place == judged.lengths[:, None] - 1
    labelled = (ends & (torch.rand(ends.shape, generator=generator) < 0.8)).float()
    labels = torch.rand(ends.shape, generator=generator).round(decimals=1)
    drawn = {
        "steps": JudgedSteps(judged.tokens, judged.lengths, ends, labels * labelled, labelled),
        "pairs": PreferencePairs(pairs.tokens, pairs.prompt_lengths, pairs.lengths, torch.tensor([1.0, 0.5, 2.0])),
    }
    return step_batch(drawn, PROCESS)


PROCESS = ProcessRewardConfig.model_validate({"run_dir": "unused", "pairs": {}, "step_weight": 0.7})


def against_reference(step: int) -> AnchoredPairs:
    """Eight weighted pairs, of which some are in the right order and some are not."""
    rows = ragged_rollout(16, vocab=VOCAB, seed=100 + step)
    noise = torch.randn(rows.labels.shape, generator=torch.Generator().manual_seed(110 + step))
    weight = torch.linspace(0.5, 2.0, 8)
    pairs = PreferencePairs(rows.tokens, rows.prompt_lengths, rows.lengths, weight)
    return dpo.anchored(pairs, (noise - torch.tensor(float(VOCAB)).log()) * rows.response_mask)


def steps_of(role: TrainableRole, loss: Loss, batches: Sequence[Any]) -> dict[str, Any]:
    """What every optimiser step reports, and what the model is and says afterwards."""
    updates = [role.update(batch, loss) for batch in batches]
    assert all(update.stepped for update in updates)
    numbers = [{"loss": u.means.loss, "norm": u.grad_norm, "count": u.means.count, **u.means.metrics} for u in updates]
    reading = SequenceScores() if isinstance(role.reading, StepScores) else role.reading
    return {"steps": numbers, "weights": whole_weights(role), "scores": role.read(ROWS, reading)}


def learn(split: Split, language: str, tied: str, scalar: str) -> dict[str, dict[str, Any]]:
    """Optimiser steps on each objective."""
    mesh = start(split.layout, seed=1)
    shared = settings(mesh, split.micro_batch)
    optim = OptimConfig(lr=LR, weight_decay=0.1, max_grad_norm=0.5, distributed=split.distributed)
    ppo = PPOConfig.model_validate({"run_dir": "unused", "sampling": SamplingConfig(temperature=0.7)})
    reward = RewardConfig.model_validate({"run_dir": "unused", "pairs": {}, "labelled": {}, "pointwise_weight": 0.7})
    result = {}
    role = learner(tied, LabelLogprobs(1.0), shared, mesh, optim)
    result["sft"] = steps_of(role, next_token_loss(role), [sft_batch(i) for i in range(STEPS)])
    role = learner(language, LabelLogprobs(0.7), shared, mesh, optim)
    result["policy"] = steps_of(role, policy_loss(role, ppo), [lessons(i)[0] for i in range(STEPS)])
    for name, cfg in ALGORITHMS.items():
        role = learner(language, LabelLogprobs(0.7), shared, mesh, optim)
        result[name] = steps_of(role, critic_free_loss(role, cfg), [anchored(i) for i in range(STEPS)])
    direct = dpo.DPOConfig.model_validate({"run_dir": "unused", "beta": 0.3, "label_smoothing": 0.1})
    role = learner(language, LabelLogprobs(1.0), shared, mesh, optim)
    result["dpo"] = steps_of(role, dpo.preference_loss(role, direct), [against_reference(i) for i in range(STEPS)])
    role = learner(scalar, PositionValues(), shared, mesh, optim)
    result["value"] = steps_of(role, value_loss(role, ppo), [lessons(i)[1] for i in range(STEPS)])
    role = learner(scalar, SequenceScores(), shared, mesh, optim)
    result["reward"] = steps_of(role, judgement_loss(role, reward), [couples(i) for i in range(STEPS)])
    role = learner(scalar, StepScores(), shared, mesh, optim)
    batches = [judged_steps(i) for i in range(STEPS)]
    result["process_reward"] = steps_of(role, step_loss(role, PROCESS), batches)
    return result


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    folder: Path = tmp_path_factory.mktemp("models")
    language_model(folder / "language", seed=1)
    language_model(folder / "tied", seed=2, tie_word_embeddings=True, rope_parameters=STRETCHED)
    score_model(folder / "scalar", seed=3)
    return str(folder / "language"), str(folder / "tied"), str(folder / "scalar")


@pytest.fixture(scope="module")
def whole(models: tuple[str, str, str]) -> dict[str, dict[str, Any]]:
    return run_ranks(learn, 1, WHOLE, *models)[0]


def test_the_reference_is_not_trivial(whole: dict[str, dict[str, Any]]) -> None:
    """Every loss moves, every gradient is clipped, and both sides of each clip are met."""
    for objective in whole.values():
        assert len({step["loss"] for step in objective["steps"]}) == STEPS
        assert min(step["norm"] for step in objective["steps"]) > 0.5
    clipped = ("policy", "value", *ALGORITHMS)
    assert all(0.05 < step["clip_fraction"] < 0.95 for name in clipped for step in whole[name]["steps"])
    assert all(0 < step["dpo/accuracy"] < 1 for step in whole["dpo"]["steps"])
    assert all(0 < step["reward/step_accuracy"] < 1 for step in whole["process_reward"]["steps"])
    for step in whole["reward"]["steps"]:
        assert min(step["reward/pairwise_loss"], step["reward/pointwise_loss"]) > 0


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_no_split_changes_anything(
    split: Split, models: tuple[str, str, str], whole: dict[str, dict[str, Any]]
) -> None:
    for rank in run_ranks(learn, split.layout.world_size, split, *models):
        for name, expected in whole.items():
            for step, reference in zip(rank[name]["steps"], expected["steps"], strict=True):
                assert step == pytest.approx(reference, rel=RELATIVE, abs=1e-6), f"{name}: {step} vs {reference}"
            assert worst(rank[name]["weights"], expected["weights"]) < WEIGHTS, name
            torch.testing.assert_close(rank[name]["scores"], expected["scores"], atol=1e-4, rtol=0, msg=name)


def first_pass(layout: ParallelLayout, language: str, kind: str) -> dict[str, float]:
    """Score rows, then train on the very same: the update's means."""
    mesh = start(layout, seed=1)
    ppo = PPOConfig.model_validate(
        {"run_dir": "unused", "sampling": SamplingConfig(temperature=0.7), "policy_loss": kind}
    )
    role = learner(language, LabelLogprobs(0.7), settings(mesh, 3), mesh, OptimConfig(lr=LR))
    given, _ = lessons(0)
    update = role.update(replace(given, logprobs=role.score(given.rollout)), policy_loss(role, ppo))
    return {"loss": update.means.loss, "norm": update.grad_norm, **update.means.metrics}


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tensor=2)], ids=name_of)
@pytest.mark.parametrize("kind", ["fused", "composed"])
def test_the_first_pass_on_the_rows_that_were_scored_has_ratio_one_to_the_bit(
    layout: ParallelLayout, kind: str, models: tuple[str, str, str]
) -> None:
    for means in run_ranks(first_pass, layout.world_size, layout, models[0], kind):
        assert means["ratio"] == 1.0
        assert means["approx_kl"] == 0.0  # a sum of terms that are never negative: every single ratio is 1
        assert means["clip_fraction"] == 0.0


@pytest.mark.parametrize("layout", [ParallelLayout(tensor=2), ParallelLayout(pipeline=2)], ids=name_of)
@pytest.mark.parametrize("index", [0, 1], ids=["untied", "tied"])
def test_the_fused_loss_trains_as_the_composed_one(
    layout: ParallelLayout, index: int, models: tuple[str, str, str]
) -> None:
    fused, composed = (run_ranks(policy_steps, layout.world_size, layout, models[index], k)[0] for k in KINDS)
    for ours, theirs in zip(fused["steps"], composed["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=RELATIVE, abs=1e-6)
    assert 0.05 < fused["steps"][0]["clip_fraction"] < 0.95
    assert worst(fused["weights"], composed["weights"]) < WEIGHTS


KINDS = ("fused", "composed")


def policy_steps(layout: ParallelLayout, language: str, kind: str) -> dict[str, Any]:
    """Steps of the policy loss with an entropy bonus."""
    mesh = start(layout, seed=1)
    ppo = PPOConfig.model_validate(
        {
            "run_dir": "unused",
            "sampling": SamplingConfig(temperature=0.7),
            "policy_loss": kind,
            "entropy_coef": 0.1,
        }
    )
    role = learner(language, LabelLogprobs(0.7), settings(mesh, 3), mesh, OptimConfig(lr=LR))
    return steps_of(role, policy_loss(role, ppo), [lessons(i)[0] for i in range(STEPS)])
