"""PPO on real ranks in small: four roles from directories, and an engine that has its answer ready."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.data.arithmetic import words
from megarlhf.data.prompts import PromptSet
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.models.roles import Roles
from megarlhf.observe.clock import Clock
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import SamplingConfig
from megarlhf.runs.guard import StepGuard
from megarlhf.trainers.policy_loop import Turn
from megarlhf.trainers.ppo import Iteration, build_roles, ppo_iteration
from megarlhf.trainers.ppo_config import PPOConfig, PPOInputs

NO_PROMPTS = PromptSet(tokens=[[1]], answers=[""], ids=[0], pad_id=0, dropped=0, said=[""])


def ppo_config(run_dir: Path, layout: ParallelLayout, init: str, judge: str, **changes: Any) -> PPOConfig:
    """One optimiser step an iteration on all rows at once, unless `changes` say otherwise."""
    optim = {"lr": 1e-3, "schedule": "constant"}
    settings = {
        "run_dir": run_dir,
        "layout": layout,
        "actor": {"init": init, "optim": optim},
        "critic": {"optim": optim},
        "reward": {"init": judge},
        "ppo_epochs": 1,
        "iterations": 8,
    }
    return PPOConfig.model_validate({**settings, **changes})


def ppo_roles(cfg: PPOConfig, mesh: Mesh) -> Roles:
    """The four roles as `megarlhf ppo` builds them."""
    models = {
        "actor": describe_model(cfg.actor.init),
        "critic": describe_model(cfg.critic_init),
        "reference": describe_model(cfg.reference_init),
        "reward": describe_model(cfg.reward.init),
    }
    return build_roles(
        cfg,
        PPOInputs(
            **models,
            tokenizer=build_tiny_tokenizer(words()),
            data=cfg.prompts,
            prompts=NO_PROMPTS,
            verifier=None,
            doubts="",
        ),
        mesh,
    )


class Canned(RolloutEngine):
    """Gives one prepared rollout."""

    def __init__(self, rollout: Rollout, roles: Roles) -> None:
        role = roles.actor
        super().__init__(role.model, role.spec, role.mesh, eos_ids=[1], pad_id=0, max_sequence_length=64)
        self._answer = rollout

    def generate(self, prompts: Prompts, sampling: SamplingConfig, *, seed: int, group_size: int = 1) -> Rollout:
        return self._answer


def iterate(roles: Roles, engine: RolloutEngine, prompts: Prompts, cfg: PPOConfig, iteration: int = 0) -> Iteration:
    """One PPO iteration that allows no skipped step."""
    mesh = roles.actor.mesh
    guard = StepGuard(cfg.run_dir, 0, mesh)
    turn = Turn(iteration, cfg.seed, Clock(mesh.device, mesh.trail, mesh.work), guard)
    return ppo_iteration(roles, engine, prompts, cfg, turn)
