"""Direct preference optimisation: a policy from preference pairs, with neither rollouts nor a reward model.

    reward = beta * (log p(response) - log reference p(response))       margin = reward(chosen) - reward(rejected)
    L = mean over pairs of -(1 - label_smoothing) log sigmoid(margin) - label_smoothing log sigmoid(-margin)

The mean is weighted by the pairs' margins where the data have them, over the whole step, whatever its split.
Source: Rafailov et al. 2023, arXiv 2305.18290; label_smoothing is conservative DPO (Mitchell 2023).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from megarlhf.batch.supervised import AnchoredPairs, PreferencePairs
from megarlhf.checkpoint.model_directory import Card, save_model
from megarlhf.config.base import FreeToChange
from megarlhf.data.loader import Loader
from megarlhf.data.preferences import PreferenceSet, load_preferences
from megarlhf.data.rows import DataConfig
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.eval.intervals import effective
from megarlhf.models.lora import LoraConfig
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole, TrainableRole
from megarlhf.models.unadapted import UnadaptedRole
from megarlhf.models.workload import RoleWork, Workload
from megarlhf.observe.about import About
from megarlhf.observe.clock import Clock
from megarlhf.observe.metrics import Metrics, names_of
from megarlhf.ops.preference_loss import dpo_loss, implicit_rewards
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Loss, LossSums, States
from megarlhf.runs.guard import StepGuard
from megarlhf.runs.loop import Run, run_steps
from megarlhf.runs.measuring import PART_ROWS, Measuring, check_measuring
from megarlhf.runs.opening import open_run
from megarlhf.runs.settings import RunConfig
from megarlhf.runtime.about import about, leave_about
from megarlhf.runtime.checks import (
    Model,
    check_adapters,
    check_batch,
    check_budget,
    check_longest,
    check_rows,
    check_same_tokenizer,
    check_tokenizer,
    checked_model,
    resolve_tokenizer,
)
from megarlhf.runtime.learning import check_learner
from megarlhf.runtime.roles import away, frozen, learner, print_choices, print_dropped, print_memory_plan
from megarlhf.runtime.said import DataSet, remarks, say, say_data
from megarlhf.runtime.texts import check_apart, chosen_data, chosen_heldout
from megarlhf.trainers.summary import as_share, plainly
from megarlhf.trainers.trainer import Learner, Trainer


class DPOConfig(RunConfig):
    """`megarlhf dpo`: a policy from preference pairs."""

    first: ClassVar[tuple[str, ...]] = (
        *("run_dir", "model", "pairs.source", "heldout.source", "beta", "epochs", "optim.lr", "global_batch"),
        *("micro_batch", "layout.data", "layout.tensor"),
    )
    needed: ClassVar[tuple[str, ...]] = ("model",)

    model: str = ""
    """Where the policy starts: a model directory (usually the SFT model), or a preset drawn from `seed`."""
    reference: str = ""
    """What the policy is kept near: a model directory; empty: what `model` names, as in Rafailov et al. 2023."""
    tokenizer: str = ""
    """Tokenizer directory, `arithmetic` for the built-in one, or empty for the model's own."""
    pairs: DataConfig = DataConfig()
    """Preference pairs: columns prompt, chosen, rejected, and optionally margin, which weighs a pair in the loss."""
    heldout: Annotated[DataConfig | None, FreeToChange(said=True)] = None
    """Pairs to measure loss and accuracy on, as eval_every says."""
    beta: float = Field(default=0.1, gt=0)
    """Implicit reward of a nat of distance from the reference: the larger, the nearer the policy stays to it.
    Source: 0.1 in Rafailov et al. 2023."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs whose labels are taken to be the wrong way round; at a half nothing could be learnt.
    Source: 0 in Rafailov et al. 2023; above it conservative DPO (Mitchell 2023)."""
    optim: OptimConfig = OptimConfig(lr=5e-7)
    """Optimiser. Source of the rate and its linear decay: Zephyr (arXiv 2310.16944), Tulu 3 (arXiv 2411.15124)."""
    lora: LoraConfig | None = None
    """Low-rank adapters that learn in place of the policy's own weights; a reference of the same start is then the
    policy with its adapters off, and no second model. null: all weights learn."""
    epochs: Annotated[float, FreeToChange(said=True, ends=True)] = Field(default=1.0, gt=0)
    """Passes over the pairs. Source: 1 in Tulu 3. A run that is done goes on with more."""
    global_batch: int = Field(default=64, ge=1)
    """Pairs per optimiser step, over all data ranks; a row of micro_batch is a pair. Source: Rafailov et al. 2023."""

    @property
    def reads_policy_as_reference(self) -> bool:
        """Whether the reference is the policy with its adapters off, and no second model is there."""
        return self.lora is not None and self.reference in ("", self.model)


@dataclass(frozen=True)
class DPOInputs:
    """Everything that was read and checked before a model is built."""

    policy: Model
    reference: Model
    tokenizer: Tokenizer
    data: Mapping[str, DataConfig]
    """Of each set that there is."""
    pairs: PreferenceSet
    heldout: PreferenceSet | None
    shared: str
    """What is to be said of pairs in both."""
    steps: int

    @property
    def sets(self) -> dict[str, PreferenceSet]:
        """Those that there are, by setting."""
        return {"pairs": self.pairs, **({"heldout": self.heldout} if self.heldout else {})}


@dataclass(frozen=True)
class DPOModels:
    """The policy, and what it is kept near, which cannot learn: its type has no way to. One is resident at a time."""

    policy: TrainableRole
    reference: FrozenRole

    @property
    def learners(self) -> Mapping[str, TrainableRole]:
        """The policy, by its name."""
        return {"policy": self.policy}


def prepare(cfg: DPOConfig) -> DPOInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    cfg.check_run_dir()
    measured = {name for name in names_of("dpo") if "heldout" in name}
    logged, of_heldout = names_of("dpo") - measured, measured if cfg.heldout else set[str]()
    check_measuring(cfg, logged, of_heldout, "set heldout.source to pairs that are not learnt from")
    policy = Model("model", cfg.model, checked_model(cfg.model, cfg.layout, "model", needs="language"))
    check_adapters(cfg.lora, policy.description.spec, "lora")
    check_learner(policy, cfg.optim, "optim", cfg)
    reference = policy
    if cfg.reference:
        found = checked_model(cfg.reference, cfg.layout, "reference", needs="language")
        reference = Model("reference", cfg.reference, found)
    tokenizer = resolve_tokenizer(cfg.tokenizer, policy, cfg.pinned_date)
    check_same_tokenizer(tokenizer, str(policy), reference)
    check_batch("global_batch", cfg.global_batch, cfg.layout, cfg.cut)
    data = {"pairs": chosen_data(cfg.pairs, "pairs", policy)}
    if cfg.heldout:
        data["heldout"] = chosen_heldout(cfg.heldout, "heldout", policy)
    sets = {name: load_preferences(rows, tokenizer, name) for name, rows in data.items()}
    for model in (policy, reference):
        check_tokenizer(tokenizer, model.description.spec, model.setting)
        for name, rows in sets.items():
            check_longest(name, rows.longest, model.description.spec)
    for name, rows in sets.items():
        check_budget(f"a pair of {name}", rows.longest_pair, cfg)
    pairs, heldout = sets["pairs"], sets.get("heldout")
    shared = check_apart("heldout", heldout.sides, {"pairs": pairs.sides}) if heldout else ""
    check_rows("global_batch", cfg.global_batch, "pairs", len(pairs))
    steps = max(1, round(cfg.epochs * len(pairs) / cfg.global_batch))
    cfg.optim.check(steps, "optim")
    cfg.check_more(steps, f"epochs={cfg.epochs:g}")
    return DPOInputs(policy, reference, tokenizer, data, pairs, heldout, shared, steps)


def train(cfg: DPOConfig, inputs: DPOInputs, cast: DPOModels, argv: Sequence[str], mesh: Mesh) -> Metrics:
    """Train, measure and save the policy to `cfg.model_dir`. Collective; returns the last metrics."""
    policy, reference = cast.policy, cast.reference
    print_choices(policy.settings.compute.choices, mesh)
    print_memory_plan([policy, reference], mesh)
    facts = _say_start(cfg, inputs, mesh)
    loader = Loader(len(inputs.pairs), cfg.global_batch, seed=cfg.seed)
    guard = StepGuard(cfg.run_dir, cfg.max_skipped_steps, mesh)
    card = Card(inputs.tokenizer, inputs.data["pairs"], cfg.model)
    run = Run(cfg, cast.learners, {policy.name: card}, {"pairs": loader}, guard, mesh)
    clock = Clock(mesh.device, mesh.trail, mesh.work)
    measuring = Measuring(
        cfg, inputs.steps, partial(measure, cast, inputs.heldout, cfg) if inputs.heldout else None, clock, mesh
    )

    def step(index: int) -> Metrics:
        pairs = inputs.pairs.batch(next(loader))
        with clock("score"):
            batch = anchored(pairs, reference.score(pairs))
        with clock("train"):
            update = policy.update(batch, preference_loss(policy, cfg))
        guard.check(policy, update, index)
        measured = measuring.after(index + 1)
        return {
            "dpo/loss": update.means.loss,
            **update.means.metrics,
            "dpo/grad_norm": update.grad_norm,
            "dpo/learning_rate": update.learning_rate,
            "train/epoch": loader.epoch,
            "train/skipped_steps": guard.skipped,
            **measured,
            **clock.metrics(),
        }

    with open_run(cfg.pinned(inputs.tokenizer.date), argv, run) as writer:
        leave_about(cfg.run_dir, facts, mesh)
        metrics = run_steps(
            inputs.steps,
            "DPO",
            step,
            ("dpo/loss", "dpo/accuracy"),
            run=run,
            writer=writer,
            ready=lambda first: measuring.begin(first, writer),
            enough=lambda _: measuring.ends(),
        )
    measuring.conclude()
    save_model(policy, cfg.model_dir, card)
    return metrics


def _say_start(cfg: DPOConfig, inputs: DPOInputs, mesh: Mesh) -> About:
    for name, rows in inputs.sets.items():
        print_dropped(name, rows.dropped, rows.origin.distinct(len(rows)), mesh)
    asked = {"pairs": cfg.pairs, "heldout": cfg.heldout or cfg.pairs}
    sets = [DataSet(name, asked[name], inputs.data[name], rows) for name, rows in inputs.sets.items()]
    epochs = {"pairs": inputs.steps * cfg.global_batch / len(inputs.pairs)}
    say_data(sets, inputs.tokenizer, mesh, epochs=epochs)
    others = [inputs.reference] if cfg.reference else []
    say([*remarks(sets, inputs.tokenizer, inputs.policy, others), *filter(None, [inputs.shared])], mesh)
    say([f"steps: {inputs.steps:,}, each of {cfg.global_batch:,} pairs; the reference is {inputs.reference}"], mesh)
    roles = {"policy": inputs.policy, "reference": inputs.reference}
    return about(cfg, roles, sets, mesh, epochs=epochs, steps=inputs.steps)


def models(cfg: DPOConfig, inputs: DPOInputs, mesh: Mesh) -> DPOModels:
    """Both models, one after the other, each moved off the device before the next arrives. Collective."""
    logprobs = LabelLogprobs(1.0)
    policy = away(learner("policy", inputs.policy, logprobs, cfg.optim, inputs.steps, cfg, mesh, cfg.lora))
    if cfg.reads_policy_as_reference:
        return DPOModels(policy, UnadaptedRole("reference", policy))
    return DPOModels(policy, away(frozen("reference", inputs.reference, logprobs, cfg, mesh)))


def workload(cfg: DPOConfig) -> Workload:
    """What a step does, in numbers: the reference is read, and the policy learns."""
    learns, beside = cfg.optim.distributed, "policy" if cfg.reads_policy_as_reference else ""
    policy = RoleWork("policy", "model", cfg.model, "language", learns=True, distributed=learns, lora=cfg.lora)
    setting, init = ("reference", cfg.reference) if cfg.reference else ("model", cfg.model)
    reference = RoleWork("reference", setting, init, "language", beside=beside)
    rows, longest = cfg.global_batch, cfg.pairs.max_tokens
    return Workload(
        (policy, replace(reference, scores=1)),
        prompt_tokens=0,
        response_tokens=longest,
        rows=rows,
        step_rows=rows,
        step_setting="global_batch",
        sequences=2,
    )


def anchored(pairs: PreferencePairs, ref_logprobs: Tensor) -> AnchoredPairs:
    """What a step learns from: all its pairs, their weights scaled to a mean of 1; ref_logprobs [2P, T]."""
    weight = pairs.weight * (len(pairs) / float(pairs.weight.sum()))
    return AnchoredPairs(replace(pairs, weight=weight), ref_logprobs.to(pairs.tokens.device))


def preference_loss(policy: TrainableRole, cfg: DPOConfig) -> Loss[AnchoredPairs]:
    """-log sigmoid of the margin, smoothed as the settings say, summed over pairs."""

    def loss(states: States, rows: AnchoredPairs) -> LossSums:
        logprobs, ref_logprobs = policy.reading(policy.model, states, rows), states.of(rows.ref_logprobs)
        rewards = implicit_rewards(logprobs, ref_logprobs, states.row, 2 * len(rows), beta=cfg.beta)
        total, seen = dpo_loss(rewards[0::2], rewards[1::2], rows.pairs.weight, label_smoothing=cfg.label_smoothing)
        metrics = {
            "dpo/accuracy": seen["accuracy"],
            "dpo/margin_mean": seen["margin_mean"],
            "dpo/chosen_reward_mean": seen["chosen_reward_mean"],
            "dpo/rejected_reward_mean": seen["rejected_reward_mean"],
        }
        return LossSums(total, len(rows), metrics, len(rows))

    return loss


def measure(cast: DPOModels, heldout: PreferenceSet, cfg: DPOConfig) -> Metrics:
    """Loss, order and rewards of held-out pairs. Collective; equal on every rank."""
    parts = [heldout.batch(part) for part in torch.arange(len(heldout)).split(PART_ROWS // 2)]
    # One model after the other, and each comes from the host once.
    with cast.reference.resident():
        ref_logprobs = [cast.reference.score(part).cpu() for part in parts]
    with cast.policy.resident():
        logprobs = [cast.policy.score(part).cpu() for part in parts]
    read = zip(logprobs, ref_logprobs, parts, strict=True)
    rewards = torch.cat([_rewards(now, ref, part, cfg.beta) for now, ref, part in read])
    weight = torch.cat([part.weight for part in parts]).double()
    total, seen = dpo_loss(rewards[0::2], rewards[1::2], weight, label_smoothing=cfg.label_smoothing)
    whole = float(weight.sum())
    return {
        "dpo/heldout_pairs": effective(weight),
        "dpo/heldout_loss": float(total) / whole,
        "dpo/heldout_accuracy": float(seen["accuracy"]) / whole,
        "dpo/heldout_margin_mean": float(seen["margin_mean"]) / whole,
        "dpo/heldout_chosen_reward_mean": float(seen["chosen_reward_mean"]) / whole,
        "dpo/heldout_rejected_reward_mean": float(seen["rejected_reward_mean"]) / whole,
    }


def _summary(cfg: DPOConfig, metrics: Metrics) -> list[str]:
    return [
        *plainly(metrics, "dpo/loss"),
        *as_share(metrics, "dpo/accuracy", cfg.global_batch),
        *as_share(metrics, "dpo/heldout_accuracy", metrics.get("dpo/heldout_pairs", 0)),
    ]


def _rewards(logprobs: Tensor, ref_logprobs: Tensor, pairs: PreferencePairs, beta: float) -> Tensor:
    """Of both responses of each pair: [2P], of log-probs [2P, T]."""
    mask = pairs.response_mask
    return implicit_rewards(logprobs[mask], ref_logprobs[mask], mask.nonzero()[:, 0], 2 * len(pairs), beta=beta)


def _following(cfg: DPOConfig) -> tuple[str, ...]:
    model = shlex.quote(str(cfg.model_dir))
    measured = f"megarlhf eval model={model} prompts.source=FILE verifier=maths"
    return (f"megarlhf generate model={model} prompt='...'", measured)


TRAINER = Trainer(
    config=DPOConfig,
    prepare=prepare,
    models=models,
    learners={"policy": Learner(AnchoredPairs, preference_loss)},
    workload=workload,
    train=train,
    summary=_summary,
    following=_following,
)
