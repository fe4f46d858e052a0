"""PPO on real ranks in small: four roles from directories, and an engine that has its answer ready."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.data.arithmetic import words
from megarlhf.data.prompts import PromptSet
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.models.role import Role
from megarlhf.observe.clock import Clock
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import SamplingConfig
from megarlhf.runs.guard import StepGuard
from megarlhf.runtime.checks import Model
from megarlhf.trainers.policy_config import PolicyInputs
from megarlhf.trainers.policy_loop import Turn
from megarlhf.trainers.ppo import PPOCast, PPOConfig, PPOIteration, models, ppo_iteration

NO_PROMPTS = PromptSet(tokens=[[1]], answers=[""], ids=[0], pad_id=0, dropped=0, columns=[{"prompt": ""}])


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


def ppo_cast(cfg: PPOConfig, mesh: Mesh, longest: int = 64) -> PPOCast:
    """The four models as `megarlhf ppo` builds them; up to `longest` tokens, EOS 3, padding 0."""
    inits = {role: Model(f"{role}.init", init, describe_model(init)) for role, init in cfg.inits.items()}
    tokenizer = build_tiny_tokenizer(words())
    inputs = PolicyInputs(inits, tokenizer, data=cfg.prompts, prompts=NO_PROMPTS, verifier=None, doubts="")
    cast = models(cfg, inputs, mesh)
    actor = cast.actor
    sampler = RolloutEngine(actor, eos_ids=[3], pad_id=0, max_sequence_length=longest)
    return replace(cast, sampler=sampler)


class Canned(RolloutEngine):
    """Gives one prepared rollout."""

    def __init__(self, rollout: Rollout, role: Role) -> None:
        super().__init__(role, eos_ids=[1], pad_id=0, max_sequence_length=64)
        self._answer = rollout

    def generate(self, prompts: Prompts, sampling: SamplingConfig, *, seed: int, group_size: int = 1) -> Rollout:
        return self._answer


def no_more(count: int) -> Prompts:
    """What an iteration that draws once must not ask for."""
    raise AssertionError(f"{count} prompts more")


def iterate(cast: PPOCast, prompts: Prompts, cfg: PPOConfig, iteration: int = 0) -> PPOIteration:
    """One PPO iteration that allows no skipped step, and what its clock says."""
    mesh = cast.actor.mesh
    clock, guard = Clock(mesh.device, mesh.trail, mesh.work), StepGuard(cfg.run_dir, 0, mesh)
    turn = Turn(iteration, cfg.seed, clock, guard, no_more)
    done = ppo_iteration(cast, prompts, cfg, turn)
    return replace(done, metrics={**done.metrics, **turn.clock.metrics()})
