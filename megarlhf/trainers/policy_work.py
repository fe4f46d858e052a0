"""An iteration of a policy in numbers, of its settings alone."""

from __future__ import annotations

from collections.abc import Collection

from megarlhf.models.workload import Drawing, RoleWork, Workload
from megarlhf.rollout.sampling import elsewhere
from megarlhf.trainers.policy_config import SPEAKERS, PolicyConfig
from megarlhf.trainers.role_config import LearnerConfig


def policy_workload(cfg: PolicyConfig, learners: Collection[str]) -> Workload:
    """What its roles do: all are read once, but for an actor whose sampler's log-probs are taken; `learners` learn.

    The reference counts as read in every iteration, also where that is asked for in some alone.
    """
    settings = {name: value for name, value in cfg if name in learners and isinstance(value, LearnerConfig)}

    def role(name: str, init: str) -> RoleWork:
        return RoleWork(
            name,
            cfg.setting_of(name),
            init,
            "language" if name in SPEAKERS else "scalar",
            learns=name in settings,
            distributed=name in settings and settings[name].optim.distributed,
            scores=int(name != "actor" or cfg.old_logprobs == "trainer"),
            loss="fused" if name == "actor" and cfg.fuses_loss else "composed",
            lora=settings[name].lora if name in settings else None,
            beside="actor" if name == "reference" and cfg.reads_actor_as_reference else "",
        )

    rollout = cfg.rollout
    return Workload(
        tuple(role(name, init) for name, init in cfg.inits.items()),
        prompt_tokens=cfg.prompts.max_tokens,
        response_tokens=cfg.sampling.max_new_tokens,
        rows=cfg.rollouts_per_iteration,
        step_rows=cfg.rollouts_per_step,
        step_setting="global_batch" if cfg.batch_unit == "rollouts" else "global_batch * group_size",
        passes=cfg.passes,
        drawing=Drawing(
            cfg.prompts_per_iteration,
            rollout.rows,
            rollout.memory_share,
            rollout.prefill_tokens,
            cfg.compute.cuda_graphs,
            rollout.keep,
            elsewhere(cfg.layout, rollout),
        ),
    )
