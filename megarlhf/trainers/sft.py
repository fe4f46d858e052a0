"""Supervised fine-tuning: next-token prediction on the response tokens of demonstrations."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from megarlhf.batch.supervised import TokenBatch
from megarlhf.checkpoint.model_directory import Card, ModelDescription, save_model
from megarlhf.config.base import FreeToChange
from megarlhf.data.loader import Loader
from megarlhf.data.sft import SftData, SftSet, load_sft
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.eval.intervals import ratio_error
from megarlhf.models.lora import LoraConfig
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import Role, TrainableRole
from megarlhf.models.workload import RoleWork, Workload
from megarlhf.observe.about import About
from megarlhf.observe.clock import Clock
from megarlhf.observe.metrics import Metrics, names_of
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
    check_tokenizer,
    checked_model,
    resolve_tokenizer,
)
from megarlhf.runtime.learning import check_learner
from megarlhf.runtime.roles import learner, print_choices, print_dropped, print_memory_plan
from megarlhf.runtime.said import DataSet, remarks, say, say_data
from megarlhf.runtime.texts import check_apart, chosen_data, chosen_heldout
from megarlhf.trainers.summary import as_estimate, plainly
from megarlhf.trainers.trainer import Learner, Pupil, Trainer

MEASURED = {"sft/heldout_loss"}
"""Metrics of held-out demonstrations by which a state can be the best."""


class SftConfig(RunConfig):
    """`megarlhf sft`: a language model from demonstrations."""

    first: ClassVar[tuple[str, ...]] = (
        *("run_dir", "model", "data.source", "data.max_tokens", "epochs", "optim.lr", "global_batch", "micro_batch"),
        *("layout.data", "layout.tensor"),
    )

    model: str = "tiny-s"
    """Where the weights start: a model directory (Hugging Face or megarlhf), or a preset drawn from `seed`."""
    tokenizer: str = ""
    """Tokenizer directory, `arithmetic` or `programs` for a built-in one, or empty for the model's own."""
    data: SftData = SftData()
    """Demonstrations: columns prompt and response, or messages."""
    heldout: Annotated[SftData | None, FreeToChange(said=True)] = None
    """Demonstrations to measure sft/heldout_loss on, as eval_every says."""
    optim: OptimConfig = OptimConfig(lr=1e-5, schedule="cosine")
    """Optimiser. Source of the rate: Llama 3's SFT."""
    lora: LoraConfig | None = None
    """Low-rank adapters that learn in place of the model's own weights, which stay as they are; null: all of them."""
    epochs: Annotated[float, FreeToChange(said=True, ends=True)] = Field(default=1.0, gt=0)
    """Passes over the data. A run that is done goes on with more."""
    global_batch: int = Field(default=64, ge=1)
    """Demonstrations per optimiser step, over all data ranks."""


@dataclass(frozen=True)
class SftInputs:
    """Everything that was read and checked before a model is built."""

    model: ModelDescription
    tokenizer: Tokenizer
    data: Mapping[str, SftData]
    """Of each set that there is."""
    rows: SftSet
    heldout: SftSet | None
    shared: str
    """What is to be said of rows in both."""
    steps: int

    @property
    def sets(self) -> dict[str, SftSet]:
        """Those that there are, by setting."""
        return {"data": self.rows, **({"heldout": self.heldout} if self.heldout else {})}


def prepare(cfg: SftConfig) -> SftInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    cfg.check_run_dir()
    logged, measured = names_of("sft") - MEASURED, MEASURED if cfg.heldout else set[str]()
    check_measuring(cfg, logged, measured, "set heldout.source to demonstrations that are not learnt from")
    model = checked_model(cfg.model, cfg.layout, "model", needs="language")
    check_adapters(cfg.lora, model.spec, "lora")
    start_from = Model("model", cfg.model, model)
    check_learner(start_from, cfg.optim, "optim", cfg)
    tokenizer = resolve_tokenizer(cfg.tokenizer, start_from, cfg.pinned_date)
    check_tokenizer(tokenizer, model.spec, "model")
    check_batch("global_batch", cfg.global_batch, cfg.layout, cfg.cut)
    data = {"data": chosen_data(cfg.data, "data", start_from)}
    if cfg.heldout:
        data["heldout"] = chosen_heldout(cfg.heldout, "heldout", start_from)
    sets = {name: load_sft(each, tokenizer, each.supervise) for name, each in data.items()}
    for name, each in sets.items():
        check_longest(name, each.longest, model.spec)
        check_budget(f"a row of {name}", each.longest, cfg)
    rows, heldout = sets["data"], sets.get("heldout")
    shared = check_apart("heldout", heldout.ids, {"data": rows.ids}) if heldout else ""
    check_rows("global_batch", cfg.global_batch, "data", len(rows))
    steps = max(1, round(cfg.epochs * len(rows) / cfg.global_batch))
    cfg.optim.check(steps, "optim")
    cfg.check_more(steps, f"epochs={cfg.epochs:g}")
    return SftInputs(model, tokenizer, data, rows, heldout, shared, steps)


def train(cfg: SftConfig, inputs: SftInputs, pupil: Pupil, argv: Sequence[str], mesh: Mesh) -> Metrics:
    """Train and save the model to `cfg.model_dir`. Collective; returns the last step's metrics."""
    role = pupil.role
    print_choices(role.settings.compute.choices, mesh)
    print_memory_plan([role], mesh)
    facts = _say_start(cfg, inputs, mesh)
    loader = Loader(len(inputs.rows), cfg.global_batch, seed=cfg.seed)
    guard = StepGuard(cfg.run_dir, cfg.max_skipped_steps, mesh)
    card = Card(inputs.tokenizer, inputs.data["data"], cfg.model)
    run = Run(cfg, pupil.learners, {role.name: card}, {"data": loader}, guard, mesh)
    clock = Clock(mesh.device, mesh.trail, mesh.work)
    measure = partial(heldout_loss, role, inputs.heldout) if inputs.heldout else None
    measuring = Measuring(cfg, inputs.steps, measure, clock, mesh)

    def step(index: int) -> Metrics:
        with clock("train"):
            batch = inputs.rows.batch(next(loader))
            update = role.update(batch, next_token_loss(role))
        guard.check(role, update, index)
        measured = measuring.after(index + 1)
        return {
            "sft/loss": update.means.loss,
            "sft/tokens": update.means.count,
            "sft/grad_norm": update.grad_norm,
            "sft/learning_rate": update.learning_rate,
            "train/epoch": loader.epoch,
            "train/skipped_steps": guard.skipped,
            **measured,
            **clock.metrics(),
        }

    with open_run(cfg.pinned(inputs.tokenizer.date), argv, run) as writer:
        leave_about(cfg.run_dir, facts, mesh)
        metrics = run_steps(
            inputs.steps,
            "SFT",
            step,
            ("sft/loss",),
            run=run,
            writer=writer,
            ready=lambda first: measuring.begin(first, writer),
            enough=lambda _: measuring.ends(),
        )
    measuring.conclude()
    save_model(role, cfg.model_dir, card)
    return metrics


def _say_start(cfg: SftConfig, inputs: SftInputs, mesh: Mesh) -> About:
    for name, rows in inputs.sets.items():
        print_dropped(name, rows.dropped, rows.origin.distinct(len(rows)), mesh)
    asked = {"data": cfg.data, "heldout": cfg.heldout or cfg.data}
    sets = [DataSet(name, asked[name], inputs.data[name], rows) for name, rows in inputs.sets.items()]
    epochs = {"data": inputs.steps * cfg.global_batch / len(inputs.rows)}
    start_from = Model("model", cfg.model, inputs.model)
    say_data(sets, inputs.tokenizer, mesh, epochs=epochs)
    found = remarks(sets, inputs.tokenizer, start_from)
    say([*found, *filter(None, [inputs.shared])], mesh)
    say([f"steps: {inputs.steps:,}, each of {cfg.global_batch:,} rows"], mesh)
    return about(cfg, {"model": start_from}, sets, mesh, epochs=epochs, steps=inputs.steps)


def models(cfg: SftConfig, inputs: SftInputs, mesh: Mesh) -> Pupil:
    """The model, ready to learn. Collective."""
    start_from = Model("model", cfg.model, inputs.model)
    return Pupil(learner("model", start_from, LabelLogprobs(1.0), cfg.optim, inputs.steps, cfg, mesh, cfg.lora))


def workload(cfg: SftConfig) -> Workload:
    """What a step does, in numbers."""
    learns = cfg.optim.distributed
    role = RoleWork("model", "model", cfg.model, "language", learns=True, distributed=learns, lora=cfg.lora)
    rows, longest = cfg.global_batch, cfg.data.max_tokens
    return Workload((role,), 0, longest, rows=rows, step_rows=rows, step_setting="global_batch")


def next_token_loss(role: TrainableRole) -> Loss[TokenBatch]:
    """-log p(label), summed over supervised tokens."""

    def loss(states: States, rows: TokenBatch) -> LossSums:
        logprobs = role.reading(role.model, states, rows)
        return LossSums(-logprobs.sum(dtype=torch.float64), states.count, {}, states.count)

    return loss


def heldout_loss(role: Role, rows: SftSet) -> Metrics:
    """-log p(label), the mean over all supervised tokens of the rows. Collective; equal on every rank."""
    sums, counts = [], []
    for part in torch.arange(len(rows)).split(PART_ROWS):
        batch = rows.batch(part)
        logprobs = torch.where(batch.loss_mask, role.score(batch).cpu(), 0.0)
        sums.append(-logprobs.sum(1, dtype=torch.float64))
        counts.append(batch.loss_mask.sum(1))
    nats, tokens = torch.cat(sums), torch.cat(counts)
    loss, error = float(nats.sum()) / int(tokens.sum()), ratio_error(nats, tokens)
    return {"sft/heldout_loss": loss, "sft/heldout_loss_stderr": error}


def _following(cfg: SftConfig) -> tuple[str, ...]:
    model = shlex.quote(str(cfg.model_dir))
    return (f"megarlhf generate model={model} prompt='...'", f"megarlhf reward model={model} pairs.source=FILE")


TRAINER = Trainer(
    config=SftConfig,
    prepare=prepare,
    models=models,
    learners={"model": Learner(TokenBatch, lambda role, _: next_token_loss(role))},
    workload=workload,
    train=train,
    summary=lambda _, metrics: [*plainly(metrics, "sft/loss"), *as_estimate(metrics, "sft/heldout_loss", 0.0)],
    following=_following,
)
