"""From a run's settings to its roles, and the two tables that say what they use and what they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from rich.table import Table

from megarlhf.checkpoint.model_directory import load_model
from megarlhf.models.compute import Choice, resolve
from megarlhf.models.lora import LoraConfig
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import HeadReading
from megarlhf.models.role import FrozenRole, Role, RoleSettings, TrainableRole
from megarlhf.observe.terminal import Terminal
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import InTokens
from megarlhf.runtime.checks import Model
from megarlhf.runtime.settings import RanksConfig

RoleT = TypeVar("RoleT", bound=Role)


def role_settings(cfg: RanksConfig, mesh: Mesh) -> RoleSettings:
    """What the run's settings mean for its roles on this machine."""
    compute, cut = resolve(cfg.compute, mesh.device), cfg.cut
    if isinstance(cut, InTokens):
        packed = Choice("micro-batches", f"rows end to end, up to {cut.tokens:,} tokens", "micro_batch_tokens")
        compute = replace(compute, choices=(*compute.choices, packed))
    if mesh.layout.context > 1:
        how = "passed round" if compute.transformer_engine else "gathered"
        shared = Choice("sequences", f"on {mesh.layout.context} ranks, keys and values {how}", "layout.context")
        compute = replace(compute, choices=(*compute.choices, shared))
    return RoleSettings(compute=compute, cut=cut, offload=cfg.offload)


def frozen(name: str, model: Model, reading: HeadReading, cfg: RanksConfig, mesh: Mesh) -> FrozenRole:
    """A role that is only read, its weights loaded. Collective."""
    role = FrozenRole(name, model.description.spec, reading.head, reading, role_settings(cfg, mesh), mesh)
    load_model(role, model.init, seed=cfg.seed)
    return role


def learner(
    name: str,
    model: Model,
    reading: HeadReading,
    optim: OptimConfig,
    steps: int,
    cfg: RanksConfig,
    mesh: Mesh,
    lora: LoraConfig | None = None,
) -> TrainableRole:
    """A role that is to take `steps` optimiser steps, its weights loaded; with `lora` adapters learn. Collective."""
    role = TrainableRole(name, model.description.spec, reading.head, reading, role_settings(cfg, mesh), mesh)
    load_model(role, model.init, seed=cfg.seed)
    if lora is not None:
        role.learn_adapters(lora, cfg.seed)
    role.prepare(optim, steps)
    return role


def away(role: RoleT) -> RoleT:
    """The role, moved off the device until it is wanted, so that the next one has room to arrive."""
    role.leave()
    return role


def print_choices(choices: Sequence[Choice], mesh: Mesh) -> None:
    """Say once, on rank 0, which implementation each part uses and why."""
    table = Table(title="what this run uses", title_justify="left")
    for column in ("part", "implementation", "why"):
        table.add_column(column)
    for choice in choices:
        table.add_row(choice.part, choice.implementation, choice.reason)
    _console(mesh).print(table)


def print_memory_plan(roles: Sequence[Role], mesh: Mesh, *, copies: Sequence[Role] = ()) -> None:
    """Say, on rank 0, how many bytes each role's parts take on one rank; copies: those that are there for rollouts."""
    table = Table(title=f"memory on rank 0 ({mesh.layout.world_size} ranks)", title_justify="left")
    for column in ("role", "weights", "gradients", "optimiser state*", "host, while saving"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for role in (*roles, *copies):
        of = role.planned
        sizes = (of.weights, of.gradients, of.optimiser, of.staged)
        table.add_row(role.name, *[_mebibytes(size) for size in sizes])
    table.caption = "* allocated at the first step" + ("; the copy while responses are drawn" if copies else "")
    _console(mesh).print(table)


def print_dropped(name: str, dropped: int, kept: int, mesh: Mesh) -> None:
    """Say, on rank 0, how many rows of the setting `name` were left out because they were too long; silent for none.

    kept: rows that are left, each once.
    """
    if dropped:
        limits = f"longer than {name}.max_tokens ({name}.overlong=drop)"
        _console(mesh).print(f"{name}: {dropped} of {dropped + kept} rows dropped, {limits}")


def print_remark(remark: str, mesh: Mesh) -> None:
    """Say, on rank 0, what a user should know about the settings; nothing where `remark` is empty."""
    if remark:
        _console(mesh).print(remark, soft_wrap=True)


def _console(mesh: Mesh) -> Terminal:
    return Terminal(stderr=True, quiet=not mesh.is_main)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size else "-"
