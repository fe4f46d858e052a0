"""What every training run has: where it writes, and when it gives up."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from megarlhf.checkpoint.model_directory import MODEL
from megarlhf.checkpoint.training_state import latest_state, read_position
from megarlhf.config import load_config
from megarlhf.config.base import PLACES, FreeToChange
from megarlhf.errors import ConfigError, RunFinished
from megarlhf.observe import run_files
from megarlhf.observe.files import link_out
from megarlhf.observe.lock import check_free
from megarlhf.observe.writers import check_trackers, read_metrics
from megarlhf.runs.run_logs import check_logs
from megarlhf.runtime.outputs import check_directory
from megarlhf.runtime.settings import RanksConfig


class RunConfig(RanksConfig):
    """Settings shared by every command that trains."""

    run_dir: Path
    """Directory for metrics, samples, models and the resolved settings; must not hold another run."""
    resume: Annotated[Literal["auto", "never", "force"], FreeToChange()] = "auto"
    """`auto`: the same command again goes on from the newest saved state in run_dir, or from the start where there is
    none. `never` refuses a used run_dir. `force` goes on with settings that change what is learnt, too: what they were
    is noted in the run's starts.jsonl, and data that are others are read from their first row."""
    save_every: Annotated[int, FreeToChange()] = Field(default=100, ge=0)
    """Steps (of a policy: iterations) between two saved states; the last step's is saved too. 0 saves none, but one
    where a signal stops the run."""
    keep_last: Annotated[int, FreeToChange()] = Field(default=2, ge=1)
    """Newest states to keep; each holds weights and optimiser of every role that learns."""
    keep_every: Annotated[int, FreeToChange()] = Field(default=0, ge=0)
    """States after every so many steps are kept for good; 0 keeps none of them. A multiple of save_every."""
    keep_best: Annotated[str, FreeToChange()] = ""
    """Metric by which the best of the saved states is kept too, named by checkpoints/best: `eval/accuracy` keeps the
    highest, `-sft/heldout_loss` the lowest. Empty keeps none. For what is measured, save_every must be a multiple of
    eval_every."""
    eval_every: Annotated[int, FreeToChange()] = Field(default=0, ge=0)
    """Steps (of a policy: iterations) between two measurements of held-out data: before the first step, logged as step
    0, after every so many, and after the last. 0 measures after the last alone, what a setting names as held out."""
    patience: Annotated[int, FreeToChange(ends=True)] = Field(default=0, ge=0)
    """Measurements in a row that do not better keep_best, which must be measured, after which the run ends, its state
    and its model saved; 0 for never."""
    save_before: Annotated[float, FreeToChange()] = Field(default=0.0, ge=0)
    """Seconds after its start at which the run has saved its state and stopped, with exit code 75, so that a job's time
    limit loses nothing; 0 for no limit. SIGTERM and SIGUSR1 do the same at the end of the step."""
    max_skipped_steps: Annotated[int, FreeToChange(said=True)] = Field(default=3, ge=0)
    """Optimiser steps of one model in a row that may be skipped because loss or gradient is not finite; one more stops
    the run. A run that was stopped so goes on with a larger number, or with a lower learning rate."""
    tensorboard: Annotated[bool, FreeToChange()] = True
    """Write TensorBoard events besides metrics.jsonl."""
    wandb: Annotated[bool, FreeToChange()] = False
    """Log to Weights & Biases too; the key is read from the environment variable WANDB_API_KEY."""

    @property
    def pinned_date(self) -> datetime.date | None:
        """`date`, or where it is null that of the run in `run_dir`, whose prompts must not change over night."""
        settings = self.run_dir / run_files.CONFIG
        if self.date or not settings.is_file():
            return self.date
        return load_config(type(self), settings, []).date

    def pinned(self, date: datetime.date | None) -> Self:
        """These settings as the run keeps them: a later start is told the same `date`."""
        return self if date is None else self.model_copy(update={"date": date})

    @property
    def model_dir(self) -> Path:
        """Where the trained model goes; a policy's is the actor."""
        return self.run_dir / run_files.MODEL

    @property
    def states_dir(self) -> Path:
        """Where training states are saved."""
        return self.run_dir / run_files.STATES

    def check_run_dir(self) -> None:
        """Raise ConfigError where `run_dir` cannot be written, or holds a run that this one does not go on with.

        Settings about saving that contradict each other are refused too, trackers that cannot be used, and a run whose
        past is damaged; one that is done raises RunFinished.
        """
        self._check_saving()
        if self.run_dir.is_dir() and (away := link_out(self.run_dir)):
            raise ConfigError(
                f"run_dir={self.run_dir}: {away} is a link out of it, to {away.resolve()}, which a run would write or "
                "remove; put the files themselves there, or choose another run_dir."
            )
        check_free(self.run_dir / run_files.LOCK, f"run_dir={self.run_dir}", "run_dir")
        used = [trace for trace in run_files.TRACES if (self.run_dir / trace).exists()]
        if used:
            self._check_same_run(used[0])
        check_trackers(tensorboard=self.tensorboard, wandb=self.wandb)
        check_directory(self.run_dir, "run_dir")
        state = latest_state(self.states_dir)
        if state is not None:
            check_logs(self.run_dir, read_position(state))

    def _check_saving(self) -> None:
        if self.keep_every and (not self.save_every or self.keep_every % self.save_every):
            raise ConfigError(
                f"keep_every={self.keep_every} is not a multiple of save_every={self.save_every}: no state would be "
                "there to keep; change one of them."
            )
        if self.save_before and not self.save_every:
            raise ConfigError(
                f"save_before={self.save_before:g} with save_every=0: the run saves no state; set save_every above 0."
            )

    def check_best(self, logged: Iterable[str]) -> None:
        """Raise ConfigError where `keep_best` is none of the metrics that the steps of this run log."""
        names = sorted(logged)
        if self.keep_best and self.keep_best.removeprefix("-") not in names:
            raise ConfigError(
                f"keep_best={self.keep_best} is not logged by this run; choose one of {', '.join(names)}."
            )

    def _check_same_run(self, trace: str) -> None:
        settings = self.run_dir / run_files.CONFIG
        if self.resume == "never" or not settings.is_file():
            raise ConfigError(
                f"run_dir={self.run_dir} already holds a run ({trace} is there); choose another, or remove it."
            )
        self._check_same_trainer()
        changes, free = self._all_changes(), self.free_to_change()
        changed = {name: values for name, values in changes.items() if not _mark(name, free)}
        state = latest_state(self.states_dir)
        # Of a run that ended before its first step no setting has done anything.
        if changed and self.resume != "force" and (self._has_stepped() or state is not None):
            raise ConfigError(
                f"run_dir={self.run_dir} holds a run with other settings ({spelled(changed)}); put them back to go on "
                "with it, or choose another run_dir, or set resume=force, which goes on with them and notes it."
            )
        model = self.model_dir
        if not model.exists():
            return
        if not (model / MODEL).is_file():
            raise ConfigError(f"{model} is there, but not whole ({MODEL} is missing); remove it to go on with the run.")
        marks = (_mark(name, free) for name in changes)
        if not any(mark is None or mark.ends for mark in marks):
            raise RunFinished(f"run_dir={self.run_dir}: this run is done; its model is in {model}.")
        if state is None:
            raise ConfigError(
                f"run_dir={self.run_dir}: this run is done, and has no saved state to go on from (save_every=0 saves "
                f"none); start another from its model, {model}."
            )

    def check_more(self, steps: int, asked: str) -> None:
        """Raise where the run in `run_dir` has done the `steps` that the setting `asked` asks for, or more.

        Raises:   RunFinished where its model is there too, ConfigError where it has done more.
        """
        done = self.steps_saved()
        if done > steps:
            raise ConfigError(
                f"run_dir={self.run_dir}: {done} steps are done, and {asked} asks for {steps}; ask for more, or choose "
                "another run_dir."
            )
        if done == steps and (self.model_dir / MODEL).is_file():
            raise RunFinished(f"run_dir={self.run_dir}: this run is done; its model is in {self.model_dir}.")

    def aside(self) -> Path:
        """Where the model of a finished run is kept that goes on: it says after how many steps it was the model."""
        rows = read_metrics(self.run_dir).rows
        name = f"{run_files.MODEL}_{run_files.step_name(int(rows[-1]['step']) if rows else 0)}"
        names = (name, *(f"{name}_{again}" for again in range(2, 1000)))
        return next(self.run_dir / each for each in names if not (self.run_dir / each).exists())

    def stretched(self, changes: Iterable[str]) -> list[str]:
        """The learning rates that decay to the end of the run, where the settings `changes` move that end."""
        free = self.free_to_change()
        marks = (_mark(name, free) for name in changes)
        if not any(mark is not None and mark.ends for mark in marks):
            return []
        schedules = ((name, value) for name, value in _flat(self).items() if name.endswith("optim.schedule"))
        return [f"{name}={value}" for name, value in schedules if value != "constant"]

    def steps_saved(self) -> int:
        """After how many steps the run in `run_dir` goes on."""
        state = latest_state(self.states_dir)
        return 0 if state is None else read_position(state).step

    def _check_same_trainer(self) -> None:
        file, own = self.run_dir / run_files.TRAINER, type(self).__module__
        trainer = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else own
        if trainer != own:
            raise ConfigError(
                f"run_dir={self.run_dir} holds a run of the trainer {trainer}, this is {own}; choose another run_dir."
            )

    def _has_stepped(self) -> bool:
        return any(row["step"] for row in read_metrics(self.run_dir).rows)

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """Settings of the run that `run_dir` holds, and these, where they differ in what may change a result.

        Raises:   ConfigError when the file in `run_dir` cannot be read.
        """
        free = self.free_to_change()
        marks = {name: (_mark(name, free), pair) for name, pair in self._all_changes().items()}
        return {name: pair for name, (mark, pair) in marks.items() if mark is None or mark.said}

    def _all_changes(self) -> dict[str, tuple[Any, Any]]:
        """The same, with those that change no result."""
        settings = self.run_dir / run_files.CONFIG
        if not settings.is_file():
            return {}
        try:
            then, now = _flat(load_config(type(self), settings, [])), _flat(self)
        except ConfigError as error:
            cause = str(error).partition("\n")[0].partition(";")[0]
            raise ConfigError(
                f"run_dir={self.run_dir}: {settings}, which has the settings of the run there, is damaged ({cause}); "
                "put the file back as it was, or choose another run_dir."
            ) from None
        if self.date is None:
            then["date"] = None  # it was pinned, and still is
        # A mapping, such as judges, may have other names now.
        pairs = {name: (then.get(name), now.get(name)) for name in {**then, **now}}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _mark(name: str, marks: Mapping[str, FreeToChange]) -> FreeToChange | None:
    """The mark of a setting by its dotted name: its own, or that of a group it is in."""
    # A name of the user's stands for any: judges.*.url.
    return next((mark for marked, mark in marks.items() if fnmatchcase(f"{name}.", f"{marked}.*")), None)


def spelled(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Settings by name, each with what it was and what it is."""
    return ", ".join(f"{name} {then!r} -> {now!r}" for name, (then, now) in changes.items())


def _flat(cfg: RunConfig) -> dict[str, Any]:
    """Every setting by its dotted name."""

    def walk(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for name, value in values.items():
            flat |= walk(f"{prefix}{name}.", value) if isinstance(value, dict) else {prefix + name: _place(name, value)}
        return flat

    return walk("", cfg.model_dump(mode="json"))


def _place(name: str, value: Any) -> Any:
    """A path of files that are there, however it is spelt; anything else as it is."""
    if not isinstance(value, str) or name not in (*PLACES, "function"):
        return value
    file, colon, function = value.rpartition(":") if name == "function" else (value, "", "")
    return f"{Path(file).resolve()}{colon}{function}" if file and Path(file).exists() else value
