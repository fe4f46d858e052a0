"""Settings that every algorithm of reinforcement learning has, and their checks before anything is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from megarlhf.config.base import FreeToChange
from megarlhf.data.prompts import PromptSet, check_prompt_count, load_prompts
from megarlhf.data.rows import DataConfig
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.judges import JudgeSettings
from megarlhf.judges.checks import check_judges, check_step_rewards
from megarlhf.judges.process_model import ProcessJudgeConfig
from megarlhf.judges.reward_model import ModelJudgeConfig, ScalarModelConfig
from megarlhf.judges.rules import doubts_of
from megarlhf.judges.shaping import ShapingConfig
from megarlhf.judges.texts import TextJudgeConfig
from megarlhf.judges.verifiers import AutoVerifier, Decider, chosen_verifier, is_told_right
from megarlhf.models.compute import Choice
from megarlhf.models.lora import LoraConfig
from megarlhf.observe.metrics import GAPS, OF_STEPS, names_of
from megarlhf.rollout.sampling import RolloutConfig, SamplingConfig, check_drawn_by, check_rolls_out
from megarlhf.runs.measuring import check_measuring
from megarlhf.runs.settings import RunConfig
from megarlhf.runtime.checks import (
    Model,
    check_adapters,
    check_batch,
    check_budget,
    check_room,
    check_same_tokenizer,
    check_scores,
    check_tokenizer,
    checked_model,
    resolve_tokenizer,
)
from megarlhf.runtime.learning import check_learner
from megarlhf.runtime.texts import chosen_data
from megarlhf.trainers.correction import SamplerCorrectionConfig
from megarlhf.trainers.heldout import HeldOut, held_out
from megarlhf.trainers.kl_coefficient import KLCoefficient
from megarlhf.trainers.role_config import FrozenConfig, LearnerConfig
from megarlhf_kernels import Clip


class PolicyConfig(RunConfig):
    """A policy that is rolled out, judged, and improved: what does not depend on how it learns."""

    first: ClassVar[tuple[str, ...]] = (
        *("run_dir", "actor.init", "reward.init", "judges", "prompts.source", "sampling.max_new_tokens", "iterations"),
        *("rollout_batch", "group_size", "global_batch", "micro_batch", "actor.optim.lr", "layout.data"),
        "layout.tensor",
    )
    needed: ClassVar[tuple[str, ...]] = ("actor.init",)

    actor: LearnerConfig = LearnerConfig()
    """The policy; `actor.init` is usually the SFT model."""
    reference: FrozenConfig = FrozenConfig()
    """The policy that the KL is measured to. Without a KL there is none, unless `reference.init` names it."""
    reward: FrozenConfig = FrozenConfig()
    """The model that scores responses; short for a judge: judges.reward.kind=model judges.reward.init=DIR"""
    judges: dict[str, JudgeSettings] = Field(default={})
    """What scores responses, one at least where reward.init is empty, by names of yours. Each has a `kind`, a `weight`,
    and what its kind needs. The weighted scores are added; each is logged as judge/NAME_mean."""
    tokenizer: str = ""
    """Tokenizer directory, `arithmetic` or `programs` for a built-in one, or empty for the actor's own."""
    prompts: DataConfig = DataConfig()
    """Prompts to roll out: columns prompt and, optionally, answer."""
    heldout: Annotated[DataConfig | None, FreeToChange(said=True)] = None
    """Prompts to measure accuracy, score and KL on, as eval_every says: one response each by `sampling` and `seed`, as
    `megarlhf eval` draws it. null with eval_every: up to 256 of the held-out split, where prompts are generated."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn."""
    rollout: Annotated[RolloutConfig, FreeToChange()] = RolloutConfig()
    """How much is drawn at once."""
    iterations: Annotated[int, FreeToChange(said=True, ends=True)] = Field(default=100, ge=1)
    """Rounds of roll out, score, estimate, optimise. A run that is done, or was stopped, goes on with more; a learning
    rate that decays then decays over all of them."""
    rollout_batch: int = Field(default=512, ge=1)
    """Rollouts per iteration, or prompts, as batch_unit says; over all data ranks. Source: 512 in Huang et al. 2024."""
    group_size: int = Field(default=1, ge=1)
    """Responses per prompt."""
    global_batch: int = Field(default=512, ge=1)
    """Rollouts per optimiser step, or prompts, as batch_unit says; over all data ranks. Must divide rollout_batch."""
    batch_unit: Literal["rollouts", "prompts"] = "rollouts"
    """What rollout_batch and global_batch count: rollouts, or prompts of group_size rollouts each. With `rollouts` a
    larger group means fewer prompts at the same cost, with `prompts` the same prompts at a higher one."""
    clip_range: float = Field(default=0.2, gt=0)
    """The ratio is clipped from 1 - this, and to 1 + this. Source: Schulman et al. 2017."""
    clip_range_high: float | None = Field(default=None, gt=0)
    """The ratio is clipped to 1 + this; null: as from below. Source: DAPO."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Where the advantage is negative, the loss is at most this times its size; null: whatever the ratio is.
    Source: Ye et al. 2020, who use 3."""
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """What the loss is a mean over, in the global batch of a step: its response tokens; its rollouts, of which each is
    the mean over its own tokens; or its rollouts, each its sum over sampling.max_new_tokens."""
    old_logprobs: Literal["trainer", "sampler"] = "trainer"
    """Whose log-probs of a rollout ratio and KL start from: `trainer` recomputes them, a forward pass of the actor that
    measures the gap to the sampler; `sampler` takes what was drawn with, and a gap is part of the ratio. Source of the
    latter: verl, slime."""
    sampler_correction: SamplerCorrectionConfig = SamplerCorrectionConfig()
    """How a gap between sampler and trainer is made up for."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Reward of a nat of entropy a token, in the policy loss. Source: 0 in Huang et al. 2024."""
    policy_loss: Annotated[Literal["auto", "fused", "composed"], FreeToChange()] = "auto"
    """`fused` makes the loss's gradients while the vocabulary projection is in memory, three matrix products in all;
    `composed` goes through per-token log-probs and needs a fourth. The same loss up to rounding. `auto`: fused, save
    where it is a whole response whose ratio is clipped."""
    shaping: ShapingConfig = ShapingConfig()
    """How scores become what is learnt from."""
    verifier: Annotated[AutoVerifier | Literal["none"], FreeToChange(said=True)] = "auto"
    """What says for the log whether a response is right, where its prompt has an answer: a rule that compares with the
    answer, as judges have it, or `none`, which logs no accuracy. `auto`: the first judge that is such a rule or runs
    the tests of programs, else arithmetic for the built-in task, reasoning_gym for that package's problems, none for
    your own data."""
    kl_bound: Annotated[float | None, FreeToChange()] = Field(default=24.0, gt=0)
    """Mean KL to the reference, in nats a response, beyond which the run warns; null never warns. Source: four times
    the 6 nats that Ziegler et al. 2019 steer towards."""
    stop_when_over_optimised: Annotated[bool, FreeToChange(ends=True)] = False
    """End the run, its state and its model saved, at the first warning: the score rises while accuracy falls, or the KL
    passes kl_bound. Otherwise the run warns and goes on. Refused where neither accuracy nor such a KL is measured."""
    samples_every: Annotated[int, FreeToChange()] = Field(default=10, ge=1)
    """Iterations between two writings of sample rollouts to samples.jsonl."""
    samples: Annotated[int, FreeToChange()] = Field(default=8, ge=0)
    """Rollouts written each time."""

    gates: Annotated[Literal["on", "off"], FreeToChange()] = "on"
    """Before the first step, or the first after a resume, measure that sampler, loss and offloading are right, and stop
    if they are not; `megarlhf doctor` measures more. `off` measures nothing."""

    @property
    def policy_loss_choice(self) -> Choice:
        """How the actor's loss is computed, for the table of what a run uses."""
        how = "with the projection, 3 matmuls" if self.fuses_loss else "from log-probs, 4 matmuls"
        return Choice("policy loss", how, f"policy_loss={self.policy_loss}")

    @property
    def fuses_loss(self) -> bool:
        """Whether the actor's loss makes its gradients while the logits are there."""
        return self.policy_loss != "composed"

    @property
    def clip(self) -> Clip:
        """How far a ratio may go."""
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        return Clip(self.clip_range, high, math.inf if self.dual_clip is None else self.dual_clip)

    @property
    def rollouts_per_iteration(self) -> int:
        """Over all data ranks."""
        return self.rollout_batch * (self.group_size if self.batch_unit == "prompts" else 1)

    @property
    def rollouts_per_step(self) -> int:
        """Of the optimiser, over all data ranks."""
        return self.global_batch * (self.group_size if self.batch_unit == "prompts" else 1)

    @property
    def prompts_per_iteration(self) -> int:
        """Distinct prompts of one iteration."""
        return self.rollouts_per_iteration // self.group_size

    @property
    def passes(self) -> int:
        """Over an iteration's rollouts."""
        return 1

    @property
    def steps_per_iteration(self) -> int:
        """Optimiser steps of each learner in one iteration."""
        return self.passes * (self.rollout_batch // self.global_batch)

    @property
    def kl_coefficient(self) -> KLCoefficient:
        """What a nat of distance to the reference costs, from the start."""
        return KLCoefficient(0.0)

    @property
    def needs_reference(self) -> bool:
        """Whether the distance to a reference is asked for."""
        return bool(self.reference.init)

    @property
    def measures_kl(self) -> bool:
        """Whether kl/reference_mean is logged."""
        return "kl/reference_mean" in self.logged

    @property
    def first_iteration(self) -> int:
        """The first iteration in which the actor learns."""
        return 0

    @property
    def actor_steps(self) -> int:
        """Optimiser steps of the actor in all iterations."""
        return (self.iterations - self.first_iteration) * self.steps_per_iteration

    @property
    def panel(self) -> dict[str, JudgeSettings]:
        """Every judge by its name, the reward model of the short form among them."""
        short = {"reward": ModelJudgeConfig(kind="model", init=self.reward.init)} if self.reward.init else {}
        return {**short, **self.judges}

    @property
    def learns_by_step(self) -> bool:
        """Whether what a judge says of a token before the last is learnt from there; else it must say nothing of it."""
        return False

    @property
    def deciders(self) -> list[Decider]:
        """What the judges say is right and wrong by: those that compare with the answer, or run tests; in order."""
        judges = [judge for judge in self.panel.values() if isinstance(judge, TextJudgeConfig)]
        return [judge.verifier for judge in judges if judge.verifier is not None]

    @property
    def reference_init(self) -> str:
        """Where the reference starts."""
        return self.reference.init or self.actor.init

    @property
    def reads_actor_as_reference(self) -> bool:
        """Whether the reference is the actor with its adapters off, and no second model is there."""
        return self.actor.lora is not None and self.reference_init == self.actor.init

    @property
    def adapters(self) -> dict[str, LoraConfig]:
        """Of each role that learns by adapters, which."""
        learners = {name: value for name, value in self if isinstance(value, LearnerConfig)}
        return {name: value.lora for name, value in learners.items() if value.lora is not None}

    @property
    def inits(self) -> dict[str, str]:
        """Where the model of each role starts."""
        judges = {name: judge.init for name, judge in self.panel.items() if isinstance(judge, ScalarModelConfig)}
        reference = {"reference": self.reference_init} if self.needs_reference else {}
        return {"actor": self.actor.init, **judges, **reference}

    def setting_of(self, role: str) -> str:
        """The setting that says where the model of a role starts."""
        return f"judges.{role}.init" if role in self.judges else f"{role}.init"

    @property
    def logged(self) -> set[str]:
        """Metrics of every iteration in which all learners learn."""
        judges = {f"judge/{name}_{quantity}" for name in self.panel for quantity in ("mean", "std", "weight")}
        failures = {f"judge/{name}_failures" for name, cfg in self.panel.items() if isinstance(cfg, TextJudgeConfig)}
        steps = {
            f"steps/{name}_{quantity}"
            for name, cfg in self.panel.items()
            if isinstance(cfg, ProcessJudgeConfig)
            for quantity in OF_STEPS
        }
        correction = names_of("sampler") if self.sampler_correction.rule != "none" else set()
        unknown = GAPS if self.old_logprobs == "sampler" else set[str]()
        return (names_of("rollout", "policy") - unknown) | judges | failures | steps | correction

    @property
    def remarks(self) -> list[str]:
        """What a start says of settings that are odd together, though they mean something."""
        return []

    def check_sizes(self) -> None:
        """Raise where the numbers of a run do not go together, before anything is read."""
        check_rolls_out(self.layout, self.rollout, offload=self.offload, fp8=self.compute.fp8 != "off")
        if self.sampling.temperature == 0:
            raise ConfigError(
                "sampling.temperature=0 always draws the same response, and a policy learns from differences; set it "
                "above 0, to 0.7 for example."
            )
        usual = type(self).model_fields["kl_bound"].default
        if not self.measures_kl and self.kl_bound not in (None, usual):
            raise ConfigError(f"kl_bound={self.kl_bound:g}: nothing logs kl/reference_mean here; set kl_bound=null.")
        parts = {"group_size": self.group_size} if self.batch_unit == "rollouts" else {}
        for name, part in {**parts, "global_batch": self.global_batch}.items():
            if self.rollout_batch % part:
                raise ConfigError(
                    f"rollout_batch={self.rollout_batch} is not divisible by {name}={part}; change one of them."
                )
        rollouts = "global_batch" if self.batch_unit == "rollouts" else "global_batch * group_size"
        check_batch(rollouts, self.rollouts_per_step, self.layout, self.cut)
        self.sampler_correction.check()
        if self.old_logprobs == "sampler" and self.sampler_correction.rule != "none":
            raise ConfigError(
                f"sampler_correction.rule={self.sampler_correction.rule} with old_logprobs=sampler: the ratio has the "
                "gap in it already; set old_logprobs=trainer, or leave the correction out."
            )
        check_judges(self.judges, self.reward.init)
        check_step_rewards(self.panel, self.shaping, learnt=self.learns_by_step)
        self.shaping.check(self.group_size, self.sampling.max_new_tokens)
        self.actor.optim.check(self.actor_steps, "actor.optim")

    def check_ending(self, *, verified: bool) -> None:
        """Raise ConfigError where the run is to end at a warning, and none can come. verified: accuracy is logged."""
        if not self.stop_when_over_optimised or verified or (self.measures_kl and self.kl_bound is not None):
            return
        kl, remedy = "no KL is measured", "set reference.init, to measure one"
        if self.measures_kl:
            kl, remedy = "kl_bound=null", "set kl_bound"
        raise ConfigError(
            f"stop_when_over_optimised=true: nothing can warn in this run, for no accuracy is logged "
            f"(verifier={self.verifier}), and {kl}; name a verifier, and prompts that have answers, or {remedy}, or "
            "leave it out."
        )


SPEAKERS = ("actor", "reference")
"""Roles whose models must be language models."""


@dataclass(frozen=True)
class PolicyInputs:
    """Everything that was read and checked before a model is built."""

    models: Mapping[str, Model]
    """The model that each role starts from."""
    tokenizer: Tokenizer
    data: DataConfig
    prompts: PromptSet
    verifier: Decider | None
    doubts: str
    """What is to be said of answers that are right for no response."""
    heldout: HeldOut | None = None
    """Measured while the policy learns."""

    @property
    def distinct(self) -> list[Model]:
        """Every model of the run once, the actor's first, by the first setting that names it."""
        found: dict[str, Model] = {}
        for model in self.models.values():
            found.setdefault(model.init, model)
        return list(found.values())


def prepare(cfg: PolicyConfig) -> PolicyInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    cfg.check_run_dir()
    cfg.check_sizes()
    cfg.check_more(cfg.iterations, f"iterations={cfg.iterations}")
    models = {role: _checked(role, init, cfg) for role, init in cfg.inits.items()}
    actor = models["actor"]
    for judge in (models[name] for name in cfg.panel if name in models):
        check_scores(judge)
    for name, cfg_of in cfg.panel.items():
        if isinstance(cfg_of, ProcessJudgeConfig):
            cfg_of.separator_of(f"judges.{name}", models[name])
    tokenizer = resolve_tokenizer(cfg.tokenizer, actor, cfg.pinned_date)
    data = chosen_data(cfg.prompts, "prompts", actor)
    prompts = load_prompts(data, tokenizer)
    check_prompt_count(prompts, cfg.prompts_per_iteration)
    heldout = held_out(cfg.heldout, cfg.eval_every, data, prompts, actor, tokenizer)
    longest = max(prompts.longest, heldout.prompts.longest if heldout else 0)
    for role, model in models.items():
        check_tokenizer(tokenizer, model.description.spec, role)
        check_room(longest, cfg.sampling.max_new_tokens, model.description.spec, role)
    check_budget("a prompt with its response", longest + cfg.sampling.max_new_tokens, cfg)
    known = cfg.deciders
    verifier = known[0] if known and cfg.verifier == "auto" else chosen_verifier(cfg.verifier, data.source)
    texts = {name: judge for name, judge in cfg.panel.items() if isinstance(judge, TextJudgeConfig)}
    doubts = doubts_of(texts, verifier, prompts, data.named)
    if heldout:
        of_heldout = doubts_of(texts, verifier, heldout.prompts, heldout.data.named)
        doubts += [f"heldout: {doubt}" for doubt in of_heldout if doubt not in doubts]
    verified = is_told_right(verifier, prompts)
    measured = heldout.logged(verifier, reference=cfg.needs_reference) if heldout else set[str]()
    check_measuring(cfg, _best_of(cfg, verified=verified), measured, "set heldout.source")
    cfg.check_ending(verified=verified)
    inputs = PolicyInputs(models, tokenizer, data, prompts, verifier, "; ".join(doubts), heldout)
    for model in inputs.distinct[1:]:
        check_same_tokenizer(tokenizer, str(actor), model)
    return inputs


def _checked(role: str, init: str, cfg: PolicyConfig) -> Model:
    setting = cfg.setting_of(role)
    needs = "language" if role in SPEAKERS else "scalar"
    found = checked_model(init, cfg.layout, setting, needs=needs)
    check_adapters(cfg.adapters.get(role), found.spec, f"{role}.lora")
    if role == "actor":
        check_drawn_by(found.spec, cfg.layout, cfg.rollout, setting)
    model, learns = Model(setting, init, found), dict(cfg).get(role)
    if isinstance(learns, LearnerConfig):
        check_learner(model, learns.optim, f"{role}.optim", cfg)
    return model


def _best_of(cfg: PolicyConfig, *, verified: bool) -> set[str]:
    """Metrics that a best state may be chosen by; accuracy where something judges it."""
    return cfg.logged if verified else cfg.logged - {"rollout/accuracy", "rollout/verified"}
