"""What of each kind of trainer is measured: the rows that it works on, its iterations alone, the models it moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megarlhf.errors import ConfigError
from megarlhf.models.role import Role
from megarlhf.models.unadapted import UnadaptedRole
from megarlhf.runs.settings import RunConfig
from megarlhf.trainers.dpo import DPOConfig, DPOModels
from megarlhf.trainers.judged import JudgedConfig
from megarlhf.trainers.policy_config import PolicyConfig
from megarlhf.trainers.policy_loop import Cast
from megarlhf.trainers.ppo import PPOConfig
from megarlhf.trainers.role_config import LearnerConfig
from megarlhf.trainers.sft import SftConfig
from tools.throughput_bench.rows import DEMONSTRATION, LABELLED, PAIR, PROMPT, SEPARATOR, STEPPED, MadeUp

OF_POLICIES = (
    *("heldout=null", "gates=off", "samples=0", "verifier=none", "stop_when_over_optimised=false", "kl_bound=null"),
)
"""What a policy's run does besides its iterations is left out, so that it is not measured."""
JUDGED = {"pairs": PAIR, "labelled": LABELLED, "steps": STEPPED}
"""Forms of the rows of reward models, by their setting."""
OF_JUDGED = {"labelled": ("labelled.scale=1",), "steps": (f"steps.separator='{SEPARATOR}'",)}
"""What rows that are made up are told of themselves."""


@dataclass(frozen=True)
class Kind:
    """What is measured of a run."""

    sets: Mapping[str, MadeUp]
    """Rows that it works on, by their setting."""
    settings: tuple[str, ...]
    """That leave its iterations alone, of equal work."""
    starts: Mapping[str, str]
    """Where its models start, by their setting."""


def kind_of(cfg: RunConfig, iterations: int) -> Kind:
    """Of the run that `cfg` describes, for so many iterations: of a trainer that draws nothing, optimiser steps.

    Raises:   ConfigError where nobody knows what the rows of such a run are, or there are none.
    """
    if isinstance(cfg, PolicyConfig):
        return _policy(cfg, iterations)
    alone = ("epochs=1", "optim.warmup_steps=0")  # a warm-up as long as the file's would need more steps
    if isinstance(cfg, SftConfig):
        data = MadeUp(DEMONSTRATION, cfg.global_batch, cfg.data.max_tokens)
        return Kind({"data": data}, (*alone, "heldout=null"), {"model": cfg.model})
    if isinstance(cfg, DPOConfig):
        pairs, reference = MadeUp(PAIR, cfg.global_batch, cfg.pairs.max_tokens), {"reference": cfg.reference}
        starts = {"model": cfg.model, **(reference if cfg.reference else {})}
        return Kind({"pairs": pairs}, (*alone, "heldout=null"), starts)
    if isinstance(cfg, JudgedConfig):
        learnt = {name: (rows.max_tokens, batch) for name, (rows, batch) in cfg.learnt.items() if rows}
        if not learnt:
            raise ConfigError("reward model without data: set pairs={} or labelled={}, whose rows are then made up.")
        sets = {name: MadeUp(JUDGED[name], batch, most) for name, (most, batch) in learnt.items()}
        told = [each for name in learnt for each in OF_JUDGED.get(name, ())]
        held = [f"{name}=null" for name in cfg.held]
        return Kind(sets, (*alone, "normalise=none", *held, *told), {"model": cfg.model})
    raise ConfigError(
        f"{type(cfg).__name__} describes no run whose rows can be made up; derive it from the settings of ppo, grpo, "
        "sft, dpo, reward or process_reward."
    )


def _policy(cfg: PolicyConfig, iterations: int) -> Kind:
    learners = [name for name, value in cfg if isinstance(value, LearnerConfig)]
    constant = [f"{name}.optim.warmup_steps=0" for name in learners]  # or there would have to be more steps
    # PPO warms its critic up without the actor, whose steps are what is to be measured.
    warm = ["value_warmup_iterations=0"] if isinstance(cfg, PPOConfig) else []
    prompts = MadeUp(PROMPT, cfg.prompts_per_iteration, cfg.prompts.max_tokens)
    starts = {cfg.setting_of(name): init for name, init in cfg.inits.items()}
    return Kind({"prompts": prompts}, (*OF_POLICIES, f"iterations={iterations}", *warm, *constant), starts)


def moving(models: Any) -> tuple[Role, ...]:
    """The models of a run that wait on the host while another works: none where there is but one.

    An unadapted reference has no bytes of its own.
    """
    if isinstance(models, Cast):
        roles: tuple[Role, ...] = models.every
    elif isinstance(models, DPOModels):
        roles = (models.policy, models.reference)
    else:
        return ()
    return tuple(role for role in roles if not isinstance(role, UnadaptedRole))
