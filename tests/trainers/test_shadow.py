"""An FP8 run's first iterations in bfloat16 too: what is logged, when, and where the run ends."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.batch.rollouts import Rollout
from megarlhf.cli import main
from megarlhf.errors import FAILED, TrainingError
from megarlhf.models.compute import ComputeConfig
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import RoleSettings, TrainableRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh, start
from megarlhf.trainers import policy_loop, shadow
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig
from tests.helpers import engine_stand_in
from tests.helpers.models import learner, ragged_rollout, settings
from tests.helpers.ranks import run_with_engine
from tests.trainers.test_splits import lessons

ROWS = ragged_rollout(8)
CFG = ComputeConfig(fp8="hybrid", fp8_shadow_iterations=2)
MEAN, MOST = "fp8/shadow_gap_mean", "fp8/shadow_gap_max"


def actor(fp8: Any, mesh: Mesh, shared: RoleSettings) -> TrainableRole:
    compute = dataclasses.replace(shared.compute, transformer_engine=True, fp8=fp8)
    role = learner(
        "tiny-xs", LabelLogprobs(1.0), dataclasses.replace(shared, compute=compute), mesh, OptimConfig(lr=3e-3)
    )
    with torch.no_grad():
        for weight in role.model.parameters():
            weight.mul_(2.0)  # peaked enough that rounding shows
    return role


def look(layout: ParallelLayout) -> dict[str, Any]:
    """What the check says of FP8 numbers, of none, of coarse ones and of what is no number."""
    mesh, found = start(layout, seed=1), {}
    role = actor("hybrid", mesh, settings(mesh, 3))
    found["fine"] = shadow.shadow_metrics(role, ROWS, CFG, 1)
    found["later"] = shadow.shadow_metrics(role, ROWS, CFG, 2)
    rounded = role.score(ROWS)
    plain = actor_like(role)
    found["by hand"] = float((rounded - plain)[ROWS.response_mask].abs().mean()), float((rounded - plain).abs().max())
    found["still fp8"] = torch.equal(role.score(ROWS), rounded)
    loss = policy_loss(role, PPOConfig.model_validate({"run_dir": "unused"}))
    found["learns"] = role.update(lessons(0)[0], loss).stepped
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_stand_in, "LARGEST", 0.01)  # which leaves a number five values
        role.model.set_is_first_microbatch()
        for name in ("coarse", "broken"):
            if name == "broken":
                patch.setattr(engine_stand_in, "LARGEST", float("nan"))
            with pytest.raises(TrainingError) as caught:
                shadow.shadow_metrics(role, ROWS, CFG, 0)
            found[name] = str(caught.value)
    return found


def actor_like(role: TrainableRole) -> torch.Tensor:
    """Log-probs of a model that was built without FP8, of the same weights."""
    twin = actor(None, role.mesh, role.settings)
    return twin.score(ROWS)


def test_the_gap_is_that_to_a_model_without_fp8() -> None:
    for found in run_with_engine(look, 2, ParallelLayout(pipeline=2)):
        mean, most = found["by hand"]
        assert found["fine"] == pytest.approx({MEAN: mean, MOST: most}, rel=1e-5)
        assert 1e-4 < mean < CFG.fp8_shadow_bound < most + 1
        assert found["later"] == {}
        assert found["still fp8"]
        assert found["learns"]
        said = found["coarse"]
        assert said.startswith("compute.fp8=hybrid with compute.fp8_recipe=current moves log-probs by ")
        assert "in iteration 0, more than compute.fp8_shadow_bound=0.1; set compute.fp8=off" in said
        assert "nan" in found["broken"]


def none_without_fp8() -> dict[str, float]:
    mesh = start(ParallelLayout(), seed=1)
    return shadow.shadow_metrics(actor(None, mesh, settings(mesh)), ROWS, CFG, 0)


def test_a_run_without_fp8_pays_nothing() -> None:
    assert run_with_engine(none_without_fp8, 1) == [{}]


RUN = [
    *(
        "grpo",
        "actor.init=tiny-xs",
        "judges.answer.kind=rule",
        "judges.answer.rule=arithmetic",
        "tokenizer=arithmetic",
        "prompts.source=arithmetic",
    ),
    *("prompts.template=plain", "prompts.arithmetic.rows=16", "rollout_batch=8", "global_batch=8", "group_size=2"),
    *("micro_batch=8", "sampling.max_new_tokens=4", "iterations=2", "gates=off", "save_every=0"),
]


def test_a_run_logs_it_and_ends_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def stands_for(role: Any, rollout: Rollout, cfg: ComputeConfig, number: int) -> dict[str, float]:
        calls.append(number)
        if number == 1:
            raise TrainingError("compute.fp8=hybrid moves log-probs; set compute.fp8=off.")
        return {MEAN: 0.25, MOST: 0.5}

    monkeypatch.setattr(policy_loop, "shadow_metrics", stands_for)
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, f"run_dir={tmp_path / 'run'}"]) == FAILED
    assert calls == [0, 1]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row[MEAN], row[MOST]) for row in rows if MEAN in row] == [(0.25, 0.5)]
