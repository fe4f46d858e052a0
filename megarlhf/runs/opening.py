"""A run's directory is opened: by one run at a time, which says in it how it was made and what has changed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megarlhf.errors import printable
from megarlhf.observe.provenance import write_provenance
from megarlhf.observe.run_files import LOCK
from megarlhf.observe.starts import note_start
from megarlhf.observe.writers import RunWriter
from megarlhf.parallel.collectives import on_main
from megarlhf.parallel.mesh import Mesh
from megarlhf.runs.settings import RunConfig, spelled
from megarlhf.runtime.outputs import sole_writer

if TYPE_CHECKING:
    from megarlhf.runs.loop import Run


@contextmanager
def open_run(cfg: RunConfig, argv: Sequence[str], run: Run) -> Iterator[RunWriter | None]:
    """Go back to where the run was, if it was; then rank 0's writer on a run directory that says how the run was made,
    None on other ranks. Collective. Nothing in the directory is touched where it cannot go on."""
    mesh, after = run.mesh, run.restore()
    changes = on_main(lambda: _begin(cfg, argv, after, mesh), mesh)
    if any(name.startswith("heldout") for name in changes):
        run.forget_best()
    if not mesh.is_main:
        yield None
        return
    tracked = cfg.model_dump(mode="json") if cfg.wandb else None
    with RunWriter(cfg.run_dir, tensorboard=cfg.tensorboard, wandb=tracked) as writer:
        yield writer


def _begin(cfg: RunConfig, argv: Sequence[str], after: int, mesh: Mesh) -> dict[str, tuple[Any, Any]]:
    """Say and note, on rank 0, what has changed since the start before."""
    changes = cfg.changes()
    if changes:
        say_of_run(f"{cfg.run_dir}: goes on with other settings ({spelled(changes)})", (), mesh)
    if after and (decaying := cfg.stretched(changes)):
        words = "decays to another end now, so that its learning rate jumps here"
        say_of_run(f"{cfg.run_dir}: {', '.join(decaying)} {words}", (), mesh)
    note_start(cfg.run_dir, argv, after, changes)  # before the settings are those of now
    write_provenance(cfg.run_dir, cfg, argv)
    return changes


@contextmanager
def sole_run(cfg: RunConfig, mesh: Mesh) -> Iterator[None]:
    """Inside, no other run may use `run_dir`. Nothing there is touched before. Collective."""
    with sole_writer(cfg.run_dir / LOCK, "run_dir", cfg.run_dir, mesh):
        yield


def say_of_run(text: str, lost: Sequence[str], mesh: Mesh) -> None:
    """One line on rank 0's standard error; what is lost comes after it."""
    if mesh.is_main:
        sys.stderr.write(printable("; ".join([text, *lost]) + "\n"))
