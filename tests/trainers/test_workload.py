"""What each trainer says of its work is what it builds: the roles, their heads, who learns, and their bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarlhf.config import load_config
from megarlhf.models.role import Role
from megarlhf.models.workload import Workload
from megarlhf.parallel.mesh import start
from megarlhf.trainers.find import trainer_named, trainers
from megarlhf.trainers.policy_loop import Cast
from megarlhf.trainers.policy_work import policy_workload
from tests.helpers.ranks import run_ranks

SMALL = ["tokenizer=arithmetic", "micro_batch=2"]
POLICY = [
    *SMALL,
    *("actor.init=tiny-xs", "reward.init=tiny-xs", "prompts.source=arithmetic", "prompts.template=plain"),
    *("iterations=3", "rollout_batch=8", "global_batch=8", "group_size=2", "sampling.max_new_tokens=8"),
]
TAUGHT = [*SMALL, "model=tiny-xs"]
ROWS = {name: [f"{name}.source=arithmetic", f"{name}.template=plain"] for name in ("data", "pairs", "steps")}
SETTINGS = {
    "sft": [*TAUGHT, *ROWS["data"]],
    "dpo": [*TAUGHT, *ROWS["pairs"]],
    "reward": [*TAUGHT, *ROWS["pairs"]],
    "process_reward": [*TAUGHT, *ROWS["steps"]],
}


def built(name: str, folder: Path) -> tuple[Workload, dict[str, tuple[Any, ...]], set[str]]:
    """What the trainer says, what it builds, and who it says learns."""
    trainer = trainer_named(name)
    group = ["batch_unit=prompts", "rollout_batch=4", "global_batch=4"] if name == "dapo" else []
    cfg = load_config(trainer.config, None, [f"run_dir={folder}", *SETTINGS.get(name, [*POLICY, *group])])
    models = trainer.models(cfg, trainer.prepare(cfg), start(cfg.layout, seed=1))
    every: list[Role] = list(models.every) if isinstance(models, Cast) else list(vars(models).values())
    learning = set(models.learners)
    return (
        trainer.workload(cfg),
        {role.name: (role.head, role.name in learning, role.planned.weights) for role in every},
        set(trainer.learners),
    )


@pytest.mark.parametrize("name", trainers())
def test_the_work_is_that_of_the_models_that_are_built(name: str, tmp_path: Path) -> None:
    work, roles, learners = run_ranks(built, 1, name, tmp_path / "run")[0]
    weights = {name: size for name, (_, _, size) in roles.items()}
    said = {role.name: (role.head, role.learns, weights[role.name]) for role in work.roles}
    assert said == roles
    assert {role.name for role in work.roles if role.learns} == learners
    assert work.rows % work.step_rows == 0


def test_what_a_policy_asks_and_how_often() -> None:
    from megarlhf.trainers.ppo import PPOConfig

    settings = [*POLICY, "run_dir=runs/none", "ppo_epochs=3", "rollout_batch=32", "prompts.max_tokens=20"]
    cfg = load_config(PPOConfig, None, settings)
    work = policy_workload(cfg, ("actor", "critic"))
    assert (work.rows, work.step_rows, work.passes, work.width) == (32, 8, 3, 28)
    assert work.drawing is not None
    assert work.drawing.prompts == 16
    assert {role.name: role.scores for role in work.roles} == {"actor": 1, "reward": 1, "reference": 1, "critic": 1}
    sampled = policy_workload(load_config(PPOConfig, None, [*settings, "old_logprobs=sampler"]), ("actor", "critic"))
    assert {role.name: role.scores for role in sampled.roles}["actor"] == 0
