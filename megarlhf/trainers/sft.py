"""Supervised fine-tuning: next-token prediction on the response tokens of demonstrations."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from megarlhf.batch.supervised import TokenBatch
from megarlhf.checkpoint.model_directory import Card, ModelDescription, save_model
from megarlhf.config.base import FreeToChange
from megarlhf.data.loader import Loader
from megarlhf.data.sft import SftData, SftSet, load_sft
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import TrainableRole
from megarlhf.observe.clock import Clock
from megarlhf.observe.metrics import Metrics, names_of
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Loss, LossSums, States
from megarlhf.runs.guard import StepGuard
from megarlhf.runs.loop import Run, open_run, run_steps
from megarlhf.runs.settings import RunConfig
from megarlhf.runtime.checks import (
    Model,
    check_batch,
    check_longest,
    check_rows,
    check_tokenizer,
    checked_model,
    resolve_tokenizer,
)
from megarlhf.runtime.roles import learner, print_choices, print_dropped, print_memory_plan
from megarlhf.runtime.said import DataSet, remarks, say, say_data
from megarlhf.runtime.texts import check_one_day, chosen_data
from megarlhf.trainers.summary import plainly
from megarlhf.trainers.trainer import Learner, Pupil, Trainer


class SftConfig(RunConfig):
    """`megarlhf sft`: a language model from demonstrations."""

    model: str = "tiny-s"
    """Where the weights start: a model directory (Hugging Face or megarlhf), or a preset drawn from `seed`."""
    tokenizer: str = ""
    """Tokenizer directory, `arithmetic` or `programs` for a built-in one, or empty for the model's own."""
    data: SftData = SftData()
    """Demonstrations: columns prompt and response, or messages."""
    optim: OptimConfig = OptimConfig(lr=1e-5, schedule="cosine")
    """Optimiser. Source of the rate: Llama 3's SFT."""
    epochs: Annotated[float, FreeToChange(said=True, ends=True)] = Field(default=1.0, gt=0)
    """Passes over the data. A run that is done goes on with more."""
    global_batch: int = Field(default=64, ge=1)
    """Demonstrations per optimiser step, over all data ranks."""


@dataclass(frozen=True)
class SftInputs:
    """Everything that was read and checked before a model is built."""

    model: ModelDescription
    tokenizer: Tokenizer
    data: SftData
    rows: SftSet
    steps: int


def prepare(cfg: SftConfig) -> SftInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    cfg.check_run_dir()
    cfg.check_best(names_of("sft"))
    model = checked_model(cfg.model, cfg.layout, "model", needs="language")
    start_from = Model("model", cfg.model, model)
    tokenizer = resolve_tokenizer(cfg.tokenizer, start_from, cfg.pinned_date)
    check_tokenizer(tokenizer, model.spec, "model")
    check_batch("global_batch", cfg.global_batch, cfg.layout, cfg.micro_batch)
    data = chosen_data(cfg.data, "data", start_from)
    rows = load_sft(data, tokenizer, data.supervise)
    check_longest("data", rows.longest, model.spec)
    check_rows("global_batch", cfg.global_batch, "data", len(rows))
    steps = max(1, round(cfg.epochs * len(rows) / cfg.global_batch))
    cfg.optim.check(steps, "optim")
    cfg.check_more(steps, f"epochs={cfg.epochs:g}")
    return SftInputs(model, tokenizer, data, rows, steps)


def train(cfg: SftConfig, inputs: SftInputs, argv: Sequence[str], mesh: Mesh) -> Metrics:
    """Train and save the model to `cfg.model_dir`. Collective; returns the last step's metrics."""
    check_one_day(inputs.tokenizer, mesh)
    pupil = models(cfg, inputs, mesh)
    role = pupil.role
    print_choices(role.settings.compute.choices, mesh)
    print_memory_plan([role], mesh)
    print_dropped("data", inputs.rows.dropped, len(inputs.rows), mesh)
    sets = [DataSet("data", cfg.data, inputs.data, inputs.rows)]
    say_data(sets, inputs.tokenizer, mesh, epochs={"data": inputs.steps * cfg.global_batch / len(inputs.rows)})
    say(remarks(sets, inputs.tokenizer, Model("model", cfg.model, inputs.model)), mesh)
    say([f"steps: {inputs.steps:,}, each of {cfg.global_batch:,} rows"], mesh)
    loader = Loader(len(inputs.rows), cfg.global_batch, seed=cfg.seed)
    guard = StepGuard(cfg.run_dir, cfg.max_skipped_steps, mesh)
    card = Card(inputs.tokenizer, inputs.data, cfg.model)
    run = Run(cfg, pupil.learners, {role.name: card}, {"data": loader}, guard, mesh)
    clock = Clock(mesh.device, mesh.trail, mesh.work)

    def step(index: int) -> Metrics:
        with clock("train"):
            batch = inputs.rows.batch(next(loader))
            update = role.update(batch, next_token_loss(role))
        guard.check(role, update, index)
        return {
            "sft/loss": update.means.loss,
            "sft/tokens": update.means.count,
            "sft/grad_norm": update.grad_norm,
            "sft/learning_rate": update.learning_rate,
            "train/epoch": loader.epoch,
            "train/skipped_steps": guard.skipped,
            **clock.metrics(),
        }

    with open_run(cfg.pinned(inputs.tokenizer.date), argv, run) as writer:
        metrics = run_steps(inputs.steps, "SFT", step, ("sft/loss",), run=run, writer=writer)
    save_model(role, cfg.model_dir, card)
    return metrics


def models(cfg: SftConfig, inputs: SftInputs, mesh: Mesh) -> Pupil:
    """The model, ready to learn. Collective."""
    start_from = Model("model", cfg.model, inputs.model)
    return Pupil(learner("model", start_from, LabelLogprobs(1.0), cfg.optim, inputs.steps, cfg, mesh))


def next_token_loss(role: TrainableRole) -> Loss[TokenBatch]:
    """-log p(label), summed over supervised tokens."""

    def loss(states: States, rows: TokenBatch) -> LossSums:
        logprobs = role.reading(role.model, states, rows)
        return LossSums(-logprobs.sum(dtype=torch.float64), states.count, {}, states.count)

    return loss


def _following(cfg: SftConfig) -> tuple[str, ...]:
    model = shlex.quote(str(cfg.model_dir))
    return (f"megarlhf generate model={model} prompt='...'", f"megarlhf reward model={model} pairs.source=FILE")


TRAINER = Trainer(
    config=SftConfig,
    prepare=prepare,
    models=models,
    learners={"model": Learner(TokenBatch, lambda role, _: next_token_loss(role))},
    train=train,
    summary=lambda _, metrics: plainly(metrics, "sft/loss"),
    following=_following,
)
