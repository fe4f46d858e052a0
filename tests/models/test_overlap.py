"""Sums of gradients and gathering of weights that overlap with work change no bit, and do overlap."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megarlhf.models import role as role_module
from megarlhf.models.optim import OptimConfig, ddp_config
from megarlhf.models.readings import LabelLogprobs, PositionValues
from megarlhf.models.role import TrainableRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh, start
from megarlhf.parallel.micro_batches import Cut, InRows, InTokens
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig, value_loss
from tests.helpers.models import language_model, learner, name_of, ragged_rollout, score_model, settings
from tests.helpers.ranks import run_ranks
from tests.trainers.test_splits import lessons

PPO = PPOConfig.model_validate({"run_dir": "unused"})
COMPOSED = PPOConfig.model_validate({"run_dir": "unused", "policy_loss": "composed"})
STEPS = 3
"""The first has Megatron count which gradients a bucket has; from the second on sums overlap."""
SMALL = 8_000
"""Weights of a bucket: several buckets a stage, where Megatron's 40 million are more than the model has."""
MODES = {"plain": (False, False), "sums": (True, False), "both": (True, True)}


@contextmanager
def buckets_of(size: int | None) -> Iterator[None]:
    def small(*args: Any) -> Any:
        return dataclasses.replace(ddp_config(*args), bucket_size=size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(role_module, "ddp_config", small)
        yield


def taught(mesh: Mesh, cut: Cut, mode: str, model: str, kind: str, optim: OptimConfig) -> tuple[TrainableRole, Any]:
    """A learner and the batches and loss of its steps."""
    shared, (reduce, gather) = settings(mesh, cut), MODES[mode]
    compute = dataclasses.replace(shared.compute, overlap_grad_reduce=reduce, overlap_param_gather=gather)
    reading = PositionValues() if kind == "critic" else LabelLogprobs(1.0)
    role = learner(model, reading, dataclasses.replace(shared, compute=compute), mesh, optim)
    loss = value_loss(role, PPO) if kind == "critic" else policy_loss(role, COMPOSED if kind == "composed" else PPO)
    batches = [lessons(step)[kind == "critic"] for step in range(STEPS)]
    return role, (batches, loss)


def learn(layout: ParallelLayout, cut: Cut, size: int | None, models: dict[str, str]) -> dict[str, Any]:
    """Numbers of every step, log-probs in between, and the weights at the end, by kind and mode."""
    mesh, found = start(layout, seed=1), {}
    for kind, model in models.items():
        for mode in MODES:
            with buckets_of(size):
                role, (batches, loss) = taught(mesh, cut, mode, model, kind, OptimConfig(lr=1e-3, max_grad_norm=1e9))
            numbers, scores = [], []
            with role.resident(*role.parts):  # as a phase of optimisation has it
                for batch in batches[:2]:
                    update = role.update(batch, loss)
                    numbers.append([update.means.loss, update.grad_norm, float(update.stepped)])
                scores.append(role.score(ragged_rollout(2).rows(torch.tensor([0]))))  # fewer rows than data ranks
            update = role.update(batches[2], loss)  # and by itself
            numbers.append([update.means.loss, update.grad_norm, float(update.stepped)])
            scores.append(role.score(ragged_rollout(8)))
            role.leave()
            with role.resident("weights"):
                weights = [weight.clone() for weight in role.tensors("weights")]
            found[kind, mode] = numbers, scores, weights
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    language_model(folder / "language", seed=1)
    language_model(folder / "tied", seed=2, tie_word_embeddings=True)
    score_model(folder / "scalar", seed=3)
    names = {"fused": "language", "composed": "tied", "critic": "scalar"}
    return {kind: str(folder / name) for kind, name in names.items()}


SPLITS = [
    (ParallelLayout(data=2), InRows(2), SMALL),
    (ParallelLayout(data=2), InRows(4), None),
    (ParallelLayout(data=2, tensor=2, sequence_parallel=True), InTokens(64), SMALL),
    (ParallelLayout(context=2), InRows(4), SMALL),
    (ParallelLayout(data=2, context=2), InRows(2), None),
    (ParallelLayout(data=2, pipeline=2), InRows(1), SMALL),
    (ParallelLayout(data=2, pipeline=2, virtual_pipeline=2), InRows(1), SMALL),
]


@pytest.mark.parametrize(
    ("layout", "cut", "size"), SPLITS, ids=[f"{name_of(layout)}-{cut}-{size}" for layout, cut, size in SPLITS]
)
def test_what_overlaps_is_the_same_to_the_bit(
    layout: ParallelLayout, cut: Cut, size: int | None, models: dict[str, str]
) -> None:
    for rank in run_ranks(learn, layout.world_size, layout, cut, size, models):
        for kind in models:
            numbers, scores, weights = rank[kind, "plain"]
            for mode in ("sums", "both"):
                theirs, also, moved = rank[kind, mode]
                for mine, other in zip(numbers, theirs, strict=True):
                    # A norm is a sum over the ranks' shares, which are others where buckets are.
                    assert mine == (other if size is None else pytest.approx(other, rel=1e-6)), (kind, mode)
                assert all(torch.equal(a, b) for a, b in zip(scores, also, strict=True)), (kind, mode)
                assert all(torch.equal(a, b) for a, b in zip(weights, moved, strict=True)), (kind, mode)


def watch(model: str) -> dict[str, Any]:
    """What happens of a bucket's sums in the second step, and which weights are whole after it."""
    mesh = start(ParallelLayout(data=2), seed=1)
    with buckets_of(SMALL):
        role, (batches, loss) = taught(mesh, InRows(2), "both", model, "fused", OptimConfig(lr=1e-2))
    role.update(batches[0], loss)
    events: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("start_grad_sync", "finish_grad_sync"):
            whole = vars(_ParamAndGradBucketGroup)[name]

            def noted(self: Any, *args: Any, name: str = name, whole: Any = whole, **rest: Any) -> Any:
                events.append(name.split("_", maxsplit=1)[0])
                return whole(self, *args, **rest)

            patch.setattr(_ParamAndGradBucketGroup, name, noted)
        with role.resident(*role.parts):
            role.update(batches[1], loss)
            early = [weight.clone() for weight in role.tensors("weights")]
    late = role.tensors("weights")
    with role.resident("weights"):
        late = [weight.clone() for weight in role.tensors("weights")]
    groups = len(role.wrapped[0].bucket_groups)
    return {"events": events, "groups": groups, "early": early, "late": late}


def test_sums_begin_in_backward_and_weights_are_gathered_later(models: dict[str, str]) -> None:
    one, two = run_ranks(watch, 2, models["fused"])
    for rank in (one, two):
        assert rank["groups"] > 3
        assert rank["events"] == ["start"] * rank["groups"] + ["finish"] * rank["groups"]
    assert not all(torch.equal(a, b) for a, b in zip(one["early"], two["early"], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one["late"], two["late"], strict=True))
