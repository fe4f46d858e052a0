"""`megarlhf plan`: what a run would take on GPUs that are not here, and in which layout it would be fastest.

The settings are those of the run. Models are not read, only their sizes; no data are.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
from pydantic import Field

from megarlhf.checkpoint.model_directory import MODEL, describe_model
from megarlhf.commands.plan_tables import as_json, pages, said
from megarlhf.commands.table import file_and_settings, named_at
from megarlhf.config import yaml12
from megarlhf.config.load import given
from megarlhf.errors import DONE, ConfigError, LayoutError, printable
from megarlhf.models.activations import Arithmetic
from megarlhf.models.gpus import GPUS, gpu_named
from megarlhf.models.spec import CONFIG, PRESETS, ModelSpec
from megarlhf.models.workload import Job, Overlap, RoleWork, Split, Workload
from megarlhf.observe.files import writing
from megarlhf.observe.terminal import Terminal
from megarlhf.runs.settings import RunConfig
from megarlhf.runtime.checks import check_adapters
from megarlhf.runtime.layouts import (
    Machine,
    Option,
    changes,
    check_split,
    fitting_gpus,
    is_allowed,
    nearest,
    numbers_of_gpus,
    option,
    options,
)
from megarlhf.runtime.models_named import with_models
from megarlhf.trainers.find import trainer_named

WHOSE = "Trainer of the run: one of megarlhf's, or a module of your own, as in my_package.my_algorithm."
GPUS_HELP = "How many there are; null: as many as the run's layout has ranks, which is then what is planned."
GPU_HELP = f"Their kind: {', '.join(GPUS)}."
SHAPE = (
    "Sizes of models whose directories are not here, by role, all for those that are not named: a preset, or a "
    "directory with a config.json, as in shape.all=llama3-8b shape.reward=llama3.2-3b. Roles that start from one "
    "directory have one shape."
)
SPARE = (
    "GiB of each GPU that stay free: for CUDA's context, NCCL's buffers, CUDA graphs, what the allocator cannot use, "
    "and what a plan that was never measured on a GPU may be wrong by. Source: none; a tenth of 80 GB."
)
OUT = "File for the settings of the fastest layout; null prints them."
FIRST = ("judges", "reward.init", "layout.data", "layout.tensor", "micro_batch")
EVERY = "all"
"""In `shape`: every role that it does not name."""
OWN = ("trainer", "gpus", "gpu", "shape", "spare", "out", "form")
"""Settings of the plan that are none of the run."""


def settings_of(name: str) -> type[RunConfig]:
    """The settings of a run of the trainer `name`, and what it is planned for."""
    config = trainer_named(name).config
    literal: Any = Literal  # the value has chosen this class
    made = pydantic.create_model(
        "PlanConfig",
        __base__=config,
        __doc__="`megarlhf plan`: the settings of a run, and the GPUs that it is planned for.",
        trainer=(literal[name], Field(name, description=WHOSE)),
        gpus=(int | None, Field(None, ge=1, le=100_000, description=GPUS_HELP)),
        gpu=(str, Field("h100-80gb", description=GPU_HELP)),
        shape=(dict[str, str], Field({}, description=SHAPE)),
        spare=(float, Field(8.0, ge=0, le=1000, description=SPARE)),
        out=(Path | None, Field(None, description=OUT)),
        form=(Literal["tables", "json"], Field("tables", description="What is printed.")),
        run_dir=(Path, Field(Path("runs/plan"), description="Directory of the run; the plan does not touch it.")),
    )
    ours = ("trainer", "gpus", "gpu", "shape", "out")
    made.first = (*ours, *(name for name in config.first if name in (*config.needed, *FIRST)))
    return made


def main(name: str, cfg: Any, argv: Sequence[str]) -> int:
    """`megarlhf plan trainer=name`. Raises LayoutError, when all is said, where the run does not fit."""
    machine = Machine(gpu_named(cfg.gpu), cfg.spare)
    job = job_of(trainer_named(name).workload(with_models(cfg)), cfg)
    gpus = cfg.gpus or cfg.layout.world_size
    own = _own(job, machine) if gpus == cfg.layout.world_size else None
    found = options(job, gpus, machine)
    if not found:
        raise LayoutError(_no_layout(job, gpus, machine))
    shown = own or found[0]
    best = found[0]
    settings = run_file(cfg, argv, best) if best.fits else ""
    if cfg.form == "json":
        sys.stdout.write(printable(f"{json.dumps(as_json(shown, found, machine, own=own is not None))}\n"))
    else:
        console = Terminal(width=None if sys.stdout.isatty() else 100)
        for part in pages(name, shown, found, machine, own=own is not None):
            console.print(part, soft_wrap=isinstance(part, str))
    if settings and cfg.out is not None:
        with writing(cfg.out):
            cfg.out.parent.mkdir(parents=True, exist_ok=True)
            cfg.out.write_text(settings, encoding="utf-8")
    elif settings and cfg.form == "tables":
        sys.stdout.write(printable(f"\nthe run in the fastest layout (out=FILE writes it):\n\n{settings}"))
    if not shown.fits:
        raise LayoutError(_too_large(job, shown, found, machine, own=own is not None))
    return DONE


def job_of(work: Workload, cfg: Any) -> Job:
    """What is planned: the run's own split, of models of known sizes.

    Raises:   ConfigError for adapters of a rank that a model has no matrix for.
    """
    recompute, itemsize = cfg.compute.recompute, 4 if cfg.compute.dtype == "float32" else 2
    specs = specs_of(work, cfg.shape)
    for role in work.roles:
        check_adapters(role.lora, specs[role.name], ".".join([*role.setting.split(".")[:-1], "lora"]))
    return Job(
        work,
        specs,
        Split(cfg.layout, cfg.cut, recompute, cfg.offload == "host", work.elsewhere),
        Arithmetic(itemsize, engine=cfg.compute.layers != "local", recompute=recompute),
        fp8_multiple=cfg.compute.fp8_multiple,
        overlap=Overlap(cfg.compute.overlap_grad_reduce, cfg.compute.overlap_param_gather),
    )


def specs_of(work: Workload, shape: Mapping[str, str]) -> dict[str, ModelSpec]:
    """The sizes of each role's model, of which a config.json or our card is read; where it is not here, `shape`'s.

    Raises:   ConfigError where they are not known, or `shape` names roles that there are not.
    """
    names = [role.name for role in work.roles]
    if unknown := sorted(shape.keys() - {*names, EVERY}):
        raise ConfigError(f"shape.{unknown[0]}: the run's roles are {', '.join(names)}; name one of them, or {EVERY}.")
    by_start = {role.init: shape[role.name] for role in work.roles if role.name in shape}
    return {
        role.name: _spec_of(role, shape.get(role.name) or by_start.get(role.init) or shape.get(EVERY, ""))
        for role in work.roles
    }


def _spec_of(role: RoleWork, shape: str) -> ModelSpec:
    if not role.init:
        raise ConfigError(
            f"{role.setting} is empty; name a model directory or one of {', '.join(PRESETS)}, or, of another "
            "algorithm's run, the trainer: trainer=grpo."
        )
    if role.init in PRESETS or Path(role.init).exists():
        return _sizes(role.init)
    if not shape:
        raise ConfigError(
            f"{role.setting}={role.init} is not here, and its sizes are not known; say them with "
            f"shape.{role.name}=llama3-8b, or shape.{EVERY}=llama3-8b for all that are not here (a preset, or a "
            f"directory with a {CONFIG}), or plan for another model with {role.setting}=llama3-8b."
        )
    if shape not in PRESETS and not Path(shape).exists():
        raise ConfigError(
            f"shape.{role.name}={shape} is neither a directory nor a preset; choose one of {', '.join(PRESETS)}."
        )
    return _sizes(shape)


def _sizes(init: str) -> ModelSpec:
    if init not in PRESETS and (Path(init) / CONFIG).is_file() and not (Path(init) / MODEL).is_file():
        return ModelSpec.from_hf(Path(init))  # without its weights
    return describe_model(init).spec


def run_file(cfg: Any, argv: Sequence[str], best: Option) -> str:
    """The settings that the run was given, in the layout of `best`."""
    name, rest = named_at(argv)
    path, overrides = file_and_settings(name, rest)
    settings = {key: value for key, value in given(path, overrides).items() if key not in OWN}
    split = best.split
    layout = {key: value for key, value in split.layout if value != type(split.layout).model_fields[key].default}
    compute = {**settings.pop("compute", {}), "recompute": split.recompute}
    rollout = {key: value for key, value in settings.pop("rollout", {}).items() if key != "layout"}
    if split.elsewhere is not None:
        rollout["layout"] = {"tensor": split.elsewhere.tensor, "data": split.elsewhere.data}
    settings |= {"rollout": rollout} if rollout else {}
    settings |= {
        "layout": layout,
        "compute": compute,
        split.counted: split.count,
        "offload": "host" if split.offload else "none",
    }
    head = f"# megarlhf {cfg.trainer} --config {shlex.quote(str(cfg.out or 'FILE'))}        ({best.gpus} x {cfg.gpu})\n"
    return f"{head}# Planned, not measured: {said(best)}.\n{yaml12.render(settings)}"


def _own(job: Job, machine: Machine) -> Option:
    """The run's own split. Raises LayoutError or ConfigError, with one that would do, where it is not allowed."""
    try:
        check_split(job)
    except (LayoutError, ConfigError) as error:
        fitting = nearest(options(job, job.split.layout.world_size, machine), job.split)
        if fitting is None:
            raise
        raise type(error)(f"{error} Nearest over as many GPUs: {_spelled(job.split, fitting)}.") from None
    return option(job, machine)


def _spelled(before: Split, after: Option) -> str:
    return " ".join(f"{name}={value}" for name, value in changes(before, after.split).items())


def _no_layout(job: Job, gpus: int, machine: Machine) -> str:
    rows, setting = job.work.step_rows, job.work.step_setting
    heads: Mapping[str, str] = {
        f"{spec.layers} layers, {spec.kv_heads} query groups": "" for spec in job.specs.values()
    }
    near = " or ".join(f"gpus={count}" for count in numbers_of_gpus(job, gpus, machine))
    return (
        f"gpus={gpus}: no layout divides {' and '.join(heads)} and {setting}={rows}; set {near or setting}"
        f"{', or change ' + setting if near else ''}."
    )


def _too_large(job: Job, shown: Option, found: Sequence[Option], machine: Machine, *, own: bool) -> str:
    peak, most = shown.peak.total / 2**30, machine.memory / 2**30
    what = f"{shown.gpus} x {machine.gpu.name}: {shown.peak.name} takes {peak:.1f} GiB of the {most:.1f} GiB there are"
    if own and (fitting := nearest(found, job.split)) is not None:
        return f"{what}; it fits with {_spelled(job.split, fitting)}."
    enough = fitting_gpus(job, shown.gpus, machine)
    if enough is None:
        return f"{what}, and no layout over {shown.gpus << 6} GPUs fits; shorten rows, or plan for larger GPUs."
    allowed = "no layout over so many fits" if is_allowed(job) or not own else "no layout fits"
    return f"{what}, {allowed}; it fits with gpus={enough.gpus} {_spelled(job.split, enough)}."
