"""`megarlhf replay`: take a failed step again, on one CPU or GPU, from the capsule that it left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from megarlhf.batch.base import Batch, cat
from megarlhf.checkpoint.checksums import check_checksums
from megarlhf.checkpoint.model_directory import WEIGHTS, load_weights
from megarlhf.checkpoint.training_state import latest_state
from megarlhf.config import Config, load_config
from megarlhf.errors import ConfigError, DataError
from megarlhf.judges.function import FunctionConfig
from megarlhf.models.role import TrainableRole, Update
from megarlhf.observe import run_files
from megarlhf.observe.terminal import Terminal
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh, start, stop
from megarlhf.parallel.micro_batches import Loss
from megarlhf.runs.capsule import Note, read_batch, read_notes, tensors_of
from megarlhf.trainers.find import is_own, module_of, trainer_named
from megarlhf.trainers.policy_config import PolicyConfig
from megarlhf.trainers.trainer import Trainer

ALONE = (
    *(f"layout.{axis}=1" for axis in ("tensor", "pipeline", "virtual_pipeline", "context", "data")),
    "layout.sequence_parallel=false",
)
"""A layout of one rank."""
DRAWS_THERE = "rollout.layout=null"
"""As a policy does on one rank."""


class ReplayConfig(Config):
    """`megarlhf replay`: a failed step again."""

    capsule: Path
    """Directory that the failed run named, RUN/capsules/step_...; it must not have been moved out of RUN."""
    trainer: str = ""
    """Trainer that took the step, `my_package.my_algorithm` for example. Empty: the one that the capsule names, where
    it is one of megarlhf's; to import another is to run its code, which is for you to say."""


def main(cfg: ReplayConfig, _: Sequence[str]) -> int:
    """`megarlhf replay`: 0 if the step works here, 1 if its loss or gradient is not finite here too."""
    notes = read_notes(cfg.capsule)
    _print_notes(notes)
    note = notes[0]
    trainer = _trainer(cfg, note)
    learner = trainer.learners.get(note.role)
    if learner is None or {other.kind for other in notes} != {learner.rows.__name__}:
        found = ", ".join(sorted({other.kind or "none" for other in notes}))
        raise DataError(
            f"capsule={cfg.capsule}: {note.where} was no optimiser step (batch: {found}), so that there "
            "is none to take again; start the run's command again, with layout.tensor=1 layout.pipeline=1 "
            "layout.context=1 layout.data=1 if it shall go on here from its newest state."
        )
    batch = joined(cfg.capsule, notes, learner.rows)
    mesh = start(ParallelLayout(), seed=0)  # nothing in a step is drawn
    try:
        role, loss = _role(cfg.capsule, note, trainer, mesh, named=bool(cfg.trainer))
        _check_ids(batch, role, cfg.capsule)
        with role.resident(*role.parts):
            origin = _load(role, cfg.capsule)
            with first_not_finite(role) as found:
                update = role.update(batch, loss)
    finally:
        stop()
    _report(update, origin, found, len(batch))
    return 0 if update.stepped else 1


def joined(capsule: Path, notes: Sequence[Note], kind: type[Batch]) -> Any:
    """The rows, of type `kind`, of all parts that left a capsule, in order, as one batch."""
    first = {note.part: note for note in reversed(notes)}  # ranks of one model copy have the same rows
    parts: list[Any] = [read_batch(capsule, first[part], kind) for part in sorted(first)]
    return cat(parts)


def _check_ids(batch: Batch, role: TrainableRole, capsule: Path) -> None:
    for name, tensor in tensors_of(batch):
        ids = tensor if name.rpartition(".")[2] == "tokens" else None
        if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < role.spec.vocab_size:
            raise DataError(
                f"capsule={capsule}: {name} has ids outside the model's {role.spec.vocab_size} rows; name another."
            )


@contextmanager
def first_not_finite(role: TrainableRole) -> Iterator[list[str]]:
    """Inside, the first module whose output is not finite is written to the list, by name."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(x, Tensor) and not x.isfinite().all() for x in outputs):
                found.append(name)

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in role.model.named_modules() if name]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _trainer(cfg: ReplayConfig, note: Note) -> Trainer[Any, Any, Any]:
    if not cfg.trainer and not is_own(note.trainer):
        raise DataError(
            f"capsule={cfg.capsule}: its step is of trainer={note.trainer or 'unknown'}, none of megarlhf's own; where "
            "you know that code, name it too."
        )
    if cfg.trainer and note.trainer not in (module_of(cfg.trainer), "", "__main__"):
        raise ConfigError(f"trainer={cfg.trainer}: the step in {cfg.capsule} is of {note.trainer}; name that.")
    return trainer_named(cfg.trainer or note.trainer)


def functions(cfg: PolicyConfig) -> str:
    """The judges that are functions of somebody's own, as settings; empty for none."""
    own = {name: judge.function for name, judge in cfg.judges.items() if isinstance(judge, FunctionConfig)}
    return ", ".join(f"judges.{name}.function={function}" for name, function in own.items())


def _role(
    capsule: Path, note: Note, trainer: Trainer[Any, Any, Any], mesh: Mesh, *, named: bool
) -> tuple[TrainableRole, Loss]:
    # A directory of its own: the run's belongs to the run, and nothing is written.
    with TemporaryDirectory() as directory:
        file = Path(directory) / run_files.CONFIG
        file.write_text(note.config, encoding="utf-8")
        try:
            alone = [*ALONE, *([DRAWS_THERE] if issubclass(trainer.config, PolicyConfig) else [])]
            cfg = load_config(trainer.config, file, [*alone, f"run_dir={directory}/replay"])
        except ConfigError as error:
            cause = str(error).replace(str(file), "its config").partition("\n")[0]
            raise DataError(
                f"capsule={capsule}: the settings in rank_{note.rank}.json are damaged ({cause.rstrip('.')}); name "
                "another capsule."
            ) from None
        if not named and isinstance(cfg, PolicyConfig) and (own := functions(cfg)):
            raise DataError(
                f"capsule={capsule}: its settings name {own}, which would be run; where you know that code, set "
                f"trainer={note.trainer} too."
            )
        role = trainer.models(cfg, trainer.prepare(cfg), mesh).learners[note.role]
    return role, trainer.learners[note.role].loss(role, cfg)


def _load(role: TrainableRole, capsule: Path) -> str:
    """The weights as they were, or the newest that there are; says which."""
    weights = capsule / "weights"
    if weights.is_symlink():
        raise DataError(f"{weights} leads elsewhere; put the directory itself there.")
    if weights.is_dir():
        check_checksums(capsule / "weights", "remove it to take the newest saved state", role.mesh)
        load_weights(role, capsule / "weights")
        return "of the failed step"
    state = latest_state(capsule.absolute().parent.parent / run_files.STATES)
    if state is None:
        return "of the run's start: it had saved no state"
    weights, remedy = (
        state / role.name / WEIGHTS,
        f"write the name of another state to {state.parent / run_files.LATEST}",
    )
    check_checksums(weights, remedy, role.mesh)
    load_weights(role, weights)
    return f"of {state.name}, the newest saved state"


def _print_notes(notes: Sequence[Note]) -> None:
    table = Table(title=f"what {len(notes)} of {notes[0].world_size} ranks left", title_justify="left")
    for column in ("rank", "where", "last collective", "why"):
        table.add_column(column)
    for note in notes:
        reason = note.reason.partition("\n")[0]
        table.add_row(str(note.rank), note.where, note.collective, reason[:80])
    Terminal().print(table)


def _report(update: Update, origin: str, found: Sequence[str], rows: int) -> None:
    says = "finite here" if update.stepped else "not finite here either"
    console = Terminal()
    console.print(f"{rows} rows, weights {origin}: the step is {says}.", soft_wrap=True)
    console.print(f"loss {update.means.loss}, gradient norm {update.grad_norm}", soft_wrap=True)
    if found:
        console.print(f"first output that is not finite: {found[0]}", soft_wrap=True)
    elif not update.stepped:
        console.print("every module's output is finite: the loss or its gradient is not", soft_wrap=True)
