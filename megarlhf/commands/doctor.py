"""`megarlhf doctor`: what this machine has, and whether a run of these settings would compute what it should.

Models, sampler and loss are those of the trainer with the same settings; nothing is trained or kept.
"""

from __future__ import annotations

import gc
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pydantic
import torch
from pydantic import Field
from rich.table import Table
from rich.text import Text

from megarlhf.batch.rollouts import Rollout
from megarlhf.data.rows import BUILT_IN
from megarlhf.errors import ConfigError, TrainingError
from megarlhf.gates.cheap import (
    PROMPTS,
    TOKENS,
    Lesson,
    first_pass_gate,
    fresh_rollout,
    gate_prompts,
    offload_gate,
    probe_rows,
    reference_gate,
    sampler_gate,
)
from megarlhf.gates.deep import (
    Measured,
    fixed_rollout,
    hugging_face_gate,
    layout_gates,
    measure,
    micro_batch_gate,
    save_load_gate,
)
from megarlhf.gates.gate import Gate, skip
from megarlhf.gates.packages import packages_gate
from megarlhf.models.compute import resolve
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import TrainableRole
from megarlhf.observe.provenance import machine, versions
from megarlhf.observe.terminal import Terminal
from megarlhf.parallel import launch
from megarlhf.parallel.alone import alone, is_first
from megarlhf.parallel.collectives import barrier, broadcast_object
from megarlhf.parallel.environment import in_force
from megarlhf.parallel.mesh import Mesh, local_device, start, stop
from megarlhf.runtime.checks import BUILT_IN_TOKENIZER
from megarlhf.runtime.command import for_started_ranks
from megarlhf.runtime.models_named import taken, with_models
from megarlhf.runtime.roles import learner
from megarlhf.trainers.find import trainer_named
from megarlhf.trainers.policy_config import PolicyConfig, PolicyInputs
from megarlhf.trainers.policy_loop import Cast
from megarlhf.trainers.role_config import LearnerConfig
from megarlhf.trainers.trainer import Trainer

PolicyTrainer = Trainer[Any, PolicyInputs, Cast]
"""Whose settings are a PolicyConfig."""

STAND_IN = "tiny-xs"
"""Preset of all models where no actor is named."""
ACTIVATIONS = 1.25
"""Of the bytes that a model in training keeps: room for what passes through it."""
PROBE_OFFLOAD = "offload, trained"
"""The gate of weights that have never been away, and of moments: `offload` sees only what a second trip loses."""


RUN_DIR = "Directory of the run; the doctor leaves nothing there, and puts a model beside it for a moment."
ACTOR = "The policy; without `actor.init` a tiny preset with the built-in tokenizer and prompts stands in."
WHOSE = "Trainer of that run: one of megarlhf's, or a module of your own, as in my_package.my_algorithm."


def settings_of(name: str) -> type[PolicyConfig]:
    """The settings of a run of the trainer `name`, to be checked on this machine.

    Raises:   ConfigError where there is no such trainer, or it draws no rollouts, which most gates are about.
    """
    config = trainer_named(name).config
    if not issubclass(config, PolicyConfig):
        raise ConfigError(f"trainer={name} draws no rollouts, so that the gates cannot be measured; name another.")
    literal: Any = Literal  # the value has chosen this class
    made = pydantic.create_model(
        "DoctorConfig",
        __base__=config,
        __doc__="`megarlhf doctor`: the settings of a run, to be checked on this machine.",
        trainer=(literal[name], Field(name, description=WHOSE)),
        run_dir=(Path, Field(Path("runs/doctor"), description=RUN_DIR)),
        actor=(LearnerConfig, Field(LearnerConfig(), description=ACTOR)),
    )
    made.first, made.needed = ("trainer", *config.first), ()  # there is a stand-in for all that a run needs
    return made


def main(name: str, cfg: PolicyConfig, argv: Sequence[str]) -> int:
    """`megarlhf doctor trainer=name`. Raises TrainingError naming the gates that fail."""
    trainer, cfg = trainer_named(name), for_started_ranks(complete(cfg))
    found = with_models(cfg)

    def work(inputs: PolicyInputs) -> None:
        _run(trainer, found, inputs, taken(cfg, found))

    overlaps = cfg.compute.overlap_grad_reduce
    return launch.run(lambda: inputs_of(trainer, found), work, cfg.layout, argv, overlaps=overlaps)


def complete(cfg: PolicyConfig) -> PolicyConfig:
    """`cfg` itself, or, where it names no actor, the stand-ins for what is empty in it."""
    if cfg.actor.init:
        return cfg
    return cfg.model_copy(
        update={
            "actor": cfg.actor.model_copy(update={"init": STAND_IN}),
            "reward": cfg.reward if cfg.panel else cfg.reward.model_copy(update={"init": STAND_IN}),
            "tokenizer": cfg.tokenizer or BUILT_IN_TOKENIZER,
            # The built-in tokenizer has no chat template, and the preset a short context.
            "prompts": cfg.prompts.model_copy(
                update={"template": "plain"} if cfg.prompts.named in ("", BUILT_IN) else {}
            ),
            "sampling": cfg.sampling.model_copy(update={"max_new_tokens": min(32, cfg.sampling.max_new_tokens)}),
        }
    )


def inputs_of(trainer: PolicyTrainer, cfg: PolicyConfig) -> PolicyInputs:
    """Check the input as the run does, save that `run_dir` may hold a run: it is not touched."""
    return trainer.prepare(cfg.model_copy(update={"run_dir": cfg.run_dir / "doctor"}))


def _run(trainer: PolicyTrainer, cfg: PolicyConfig, inputs: PolicyInputs, said: Sequence[str]) -> None:
    """said: which models were taken, where runs or states are named."""
    # Piped to a file there is no width to respect.
    console = Terminal(quiet=not is_first(), width=None if sys.stdout.isatty() else 140)
    console.print(environment(cfg))
    for line in said:
        console.print(Text(line), soft_wrap=True)
    gates = [packages_gate()]
    console.print(_verdict(gates[0]), soft_wrap=True)
    alternative = one_rank(trainer, cfg, inputs) if is_first() else ""
    mesh = start(cfg.layout, seed=cfg.seed, timeout_s=cfg.timeout_s)
    for gate in examine(trainer, cfg, inputs, broadcast_object(alternative, mesh, "world"), mesh):
        gates.append(gate)
        console.print(_verdict(gate), soft_wrap=True)
    stop()
    failing = [gate.name for gate in gates if gate.fails]
    console.print(_tally(gates), soft_wrap=True)
    if failing:
        raise TrainingError(f"{len(failing)} gates fail: {', '.join(failing)}; do what stands below each of them.")


def environment(cfg: PolicyConfig) -> Table:
    """Versions, this rank's device, what each part of the run resolves to, and environment variables; and why."""
    device = local_device()
    table = Table(title="environment", title_justify="left", show_header=False)
    for name, value in {**versions(), **{name: str(value) for name, value in machine(device).items()}}.items():
        table.add_row(name, value)
    for choice in (*resolve(cfg.compute, device).choices, cfg.policy_loss_choice):
        table.add_row(choice.part, f"{choice.implementation} ({choice.reason})")
    for variable in in_force(cfg.layout, overlaps=cfg.compute.overlap_grad_reduce):
        table.add_row(variable.name, f"{variable.value} ({variable.reason})")
    return table


def _tally(gates: Sequence[Gate]) -> Text:
    holding, skipped = sum(gate.holds for gate in gates), sum(bool(gate.skipped) for gate in gates)
    return Text(f"{holding} of {len(gates) - skipped} gates hold" + (f", {skipped} skipped" if skipped else ""))


def _verdict(gate: Gate) -> Text:
    if gate.skipped:
        return Text(f"skipped  {gate.name:<17}  {gate.skipped}", style="dim")
    number = f"{gate.name:<17}  {gate.value:<8.3g} <= {gate.bound:<6.3g}  {gate.measure}"
    if gate.holds:
        return Text(f"holds    {number}")
    return Text(f"FAILS    {number.replace('<=', ' >')}\n         what to do: {gate.remedy}", style="bold red")


def one_rank(trainer: PolicyTrainer, cfg: PolicyConfig, inputs: PolicyInputs) -> Measured | str:
    """What a one-rank model of the same weights makes of the fixed batch; or why that is not known.

    Ranks:    rank 0, before it joins the others.
    """
    if cfg.layout.world_size == 1:
        return "the layout is one rank"
    device = local_device()
    itemsize = resolve(cfg.compute, device).dtype.itemsize
    # Weights, fp32 gradients, and fp32 masters of bf16 weights.
    needed = (
        ACTIVATIONS * inputs.models["actor"].description.spec.parameters * (itemsize + 4 + (4 if itemsize < 4 else 0))
    )
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        return f"one rank would need {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    with alone(seed=cfg.seed) as mesh:
        probe = build_probe(cfg, inputs, mesh)
        measured = measure(probe, _fixed(cfg, inputs, mesh), _lesson(trainer, probe, cfg), seed=cfg.seed)
    del probe
    _free(device)
    return measured


def build_probe(cfg: PolicyConfig, inputs: PolicyInputs, mesh: Mesh) -> TrainableRole:
    """A second actor, to be trained; each data rank has its whole gradient and optimiser state."""
    reading = LabelLogprobs(cfg.sampling.temperature)
    optim = cfg.actor.optim.model_copy(update={"distributed": False})
    return learner("probe", inputs.models["actor"], reading, optim, cfg.actor_steps, cfg, mesh, cfg.actor.lora)


def _lesson(trainer: PolicyTrainer, actor: TrainableRole, cfg: PolicyConfig) -> Lesson:
    learner = trainer.learners["actor"]
    return Lesson(learner.rows, learner.loss(actor, cfg))


def _fixed(cfg: PolicyConfig, inputs: PolicyInputs, mesh: Mesh) -> Rollout:
    """As many rows as the data ranks of the run share, in every layout."""
    rows = torch.arange(PROMPTS * cfg.layout.data) % len(inputs.prompts)
    tokens = min(TOKENS, cfg.sampling.max_new_tokens)
    prompts = inputs.prompts.batch(rows)
    return fixed_rollout(prompts, inputs.models["actor"].description.spec.vocab_size, tokens, cfg.seed).to(mesh.device)


def examine(
    trainer: PolicyTrainer, cfg: PolicyConfig, inputs: PolicyInputs, alternative: Measured | str, mesh: Mesh
) -> Iterator[Gate]:
    """Every gate, one after another. Collective.

    alternative: what one rank makes of the fixed batch, or why that is not known.
    """
    probed = examine_probe(trainer, cfg, inputs, alternative, mesh)
    _free(mesh.device)
    yield from probed
    if any(gate.fails for gate in probed if gate.name == PROBE_OFFLOAD):
        yield skip("all others", "weights do not survive the way to the host")
        return

    cast = trainer.models(cfg, inputs, mesh)
    actor, lesson, seed = cast.actor, _lesson(trainer, cast.actor, cfg), cfg.seed
    yield offload_gate(cast.every)
    yield hugging_face_gate(actor, cfg.actor.init)
    prompts = gate_prompts(inputs.prompts, mesh)
    rollout = fresh_rollout(cast, prompts, cfg.sampling, seed=seed)
    yield sampler_gate(actor, rollout)
    yield first_pass_gate(actor, rollout, lesson, seed=seed)
    yield reference_gate(cast, rollout, reference_is_actor=cfg.reference_init == cfg.actor.init)
    yield micro_batch_gate(actor, rollout, lesson, seed=seed)
    with _shared_directory(cfg.run_dir, mesh) as directory:
        yield save_load_gate(actor, inputs.tokenizer, directory / "model")


def examine_probe(
    trainer: PolicyTrainer, cfg: PolicyConfig, inputs: PolicyInputs, alternative: Measured | str, mesh: Mesh
) -> list[Gate]:
    """What is seen on a model that was never away from the device, and that may be trained."""
    probe = build_probe(cfg, inputs, mesh)
    lesson, fixed = _lesson(trainer, probe, cfg), _fixed(cfg, inputs, mesh)
    if isinstance(alternative, str):
        layout = [skip("layout", alternative)]
    else:
        layout = layout_gates(probe, measure(probe, fixed, lesson, seed=cfg.seed), alternative)
    # A step gives the optimiser moments to lose.
    probe.update(probe_rows(probe, fixed, lesson, seed=cfg.seed), lesson.loss)
    return [*layout, replace(offload_gate([probe]), name=PROBE_OFFLOAD)]


def _free(device: torch.device) -> None:
    """Give back the memory of models that nobody holds any more: their modules refer to each other in circles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _shared_directory(run_dir: Path, mesh: Mesh) -> Iterator[Path]:
    """A new directory where `run_dir` is or will be, the same on every rank, removed after the block."""
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.is_dir())
    made = tempfile.mkdtemp(prefix="megarlhf-doctor-", dir=there) if mesh.is_main else ""
    directory = Path(broadcast_object(made, mesh, "world"))
    try:
        yield directory
        barrier(mesh)
    finally:
        if mesh.is_main:
            shutil.rmtree(directory, ignore_errors=True)
