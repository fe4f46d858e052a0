"""What a trainer is to those who only know its name: the command line, `megarlhf replay` and `megarlhf doctor`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from megarlhf.batch.base import RowsT
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.models.role import TrainableRole
from megarlhf.models.workload import Workload
from megarlhf.observe.metrics import Metrics
from megarlhf.observe.run_files import METRICS
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.micro_batches import Loss
from megarlhf.runs.ending import conclude
from megarlhf.runs.opening import sole_run
from megarlhf.runs.settings import RunConfig
from megarlhf.runs.stopping import stopping_at_start
from megarlhf.runtime.command import on_ranks
from megarlhf.runtime.texts import check_one_day

Cfg = TypeVar("Cfg", bound=RunConfig)
Cfg_contra = TypeVar("Cfg_contra", bound=RunConfig, contravariant=True)


class Tokenized(Protocol):
    """What was read and checked before a run, as tokens."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Of all texts."""
        ...


Inputs = TypeVar("Inputs", bound=Tokenized)


class Models(Protocol):
    """The models of a run."""

    @property
    def learners(self) -> Mapping[str, TrainableRole]:
        """Those that learn, by name."""
        ...


Models_co = TypeVar("Models_co", bound=Models, covariant=True)


@dataclass(frozen=True)
class Pupil:
    """The one model of a run that has no others."""

    role: TrainableRole

    @property
    def learners(self) -> Mapping[str, TrainableRole]:
        """The model, by its name."""
        return {self.role.name: self.role}


@dataclass(frozen=True)
class Learner(Generic[Cfg_contra, RowsT]):
    """What the optimiser steps of a role are made of."""

    rows: type[RowsT]
    """Of which a step's batch is."""
    loss: Callable[[TrainableRole, Cfg_contra], Loss[RowsT]]
    """Over such rows."""


@contextmanager
def leaving_a_page(run_dir: Path, mesh: Mesh) -> Iterator[None]:
    """Inside, a run that fails or is stopped has rank 0 write its page. Why it ends is what counts, and is raised."""
    try:
        yield
    except Exception:
        if mesh.is_main and (run_dir / METRICS).exists():
            from megarlhf.observe.report import write_page

            with suppress(Exception):  # it must not hide why the run ends
                write_page(run_dir)
        raise


@dataclass(frozen=True)
class Trainer(Generic[Cfg, Inputs, Models_co]):
    """A command that trains. The module that defines `config` exports it as TRAINER: runs are told apart by that."""

    config: type[Cfg]
    prepare: Callable[[Cfg], Inputs]
    """Reads and checks all input, before anything is built."""
    models: Callable[[Cfg, Inputs, Mesh], Models_co]
    """Builds them, their weights loaded. Collective."""
    learners: Mapping[str, Learner[Cfg, Any]]
    """By the name of the role that learns."""
    workload: Callable[[Cfg], Workload]
    """What a step, or an iteration, does in numbers, of the settings alone: for `megarlhf plan`."""
    train: Callable[[Cfg, Inputs, Any, Sequence[str], Mesh], Metrics]
    """Runs all steps of the models and saves what `cfg.model_dir` is for, given the command line. Collective; the last
    metrics."""
    summary: Callable[[Cfg, Metrics], Sequence[str]]
    """What is said at the end of the last metrics, with their intervals (trainers/summary.py)."""
    following: Callable[[Cfg], Sequence[str]]
    """Commands that one may go on with."""

    def run(self, cfg: Cfg, inputs: Inputs, argv: Sequence[str], mesh: Mesh) -> Metrics:
        """Build the models and train them. Collective; the last metrics."""
        check_one_day(inputs.tokenizer, mesh)
        return self.train(cfg, inputs, self.models(cfg, inputs, mesh), argv, mesh)

    def main(self, cfg: Cfg, argv: Sequence[str]) -> int:
        """Train on the ranks of `cfg.layout` and return the exit code."""

        def work(cfg: Cfg, inputs: Inputs, mesh: Mesh) -> None:
            began = time.monotonic()
            with sole_run(cfg, mesh), leaving_a_page(cfg.run_dir, mesh):
                metrics = self.run(cfg, inputs, argv, mesh)
                conclude(cfg.run_dir, time.monotonic() - began, self.summary(cfg, metrics), self.following(cfg), mesh)

        with stopping_at_start():
            return on_ranks(cfg, argv, self.prepare, work)
