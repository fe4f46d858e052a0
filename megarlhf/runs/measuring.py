"""Held-out data are measured while a run trains, the same every time, and a run that no longer gets better ends.

Knows no algorithm: a trainer hands it a function that measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping

import torch

from megarlhf.checkpoint.training_state import latest_state, read_position
from megarlhf.errors import ConfigError, JudgeError
from megarlhf.observe.clock import Clock
from megarlhf.observe.metrics import Metrics
from megarlhf.observe.run_files import BEST
from megarlhf.observe.starts import read_starts
from megarlhf.observe.writers import RunWriter, read_metrics
from megarlhf.parallel.collectives import on_main
from megarlhf.parallel.mesh import Mesh
from megarlhf.runs.settings import RunConfig
from megarlhf.runtime.roles import print_remark

PART_ROWS = 512
"""Sequences that are measured at once, as in `megarlhf score`: bounds the memory, and pads rows alike."""


class Measuring:
    """Measures before the first step, after every `eval_every` and after the last one; counts what `patience` bounds.

    measure: metrics of the held-out data as the models are now, collective and equal on every rank; None where nothing
    is held out. It leaves no trace in weights and random numbers. steps: of the whole run.
    Ranks:    every rank has one, and they agree.
    """

    def __init__(
        self, cfg: RunConfig, steps: int, measure: Callable[[], Metrics] | None, clock: Clock, mesh: Mesh
    ) -> None:
        self.clock = clock
        self._cfg, self._steps, self._measure, self._mesh = cfg, steps, measure, mesh
        self._seen: dict[int, float] = {}
        """What keep_best was, by the steps before each measurement, where `patience` counts them."""

    def begin(self, first: int, writer: RunWriter | None) -> None:
        """Measure where no step was done, logged as step 0; else take up what the run had measured. Collective."""
        if first:
            for row in on_main(self._before, self._mesh):
                self._count(int(row["step"]), row)
        elif self._measure is not None and self._cfg.eval_every:
            found = {**self._measured(0, self._measure), **self.clock.metrics()}
            if writer is not None:
                writer.log(found, 0)

    def _before(self) -> list[dict[str, float]]:
        """What was logged of the same held-out data, where `patience` counts it."""
        if not self._cfg.patience:
            return []
        run_dir = self._cfg.run_dir
        others = (start for start in read_starts(run_dir) if any(name.startswith("heldout") for name in start.changes))
        since = max((start.after_step for start in others), default=-1)
        every = self._cfg.eval_every  # what the end of a shorter run measured a longer one does not
        return [row for row in read_metrics(run_dir).rows if row["step"] > since and row["step"] % every == 0]

    def after(self, step: int, *, ending: bool = False) -> Metrics:
        """The measurement after `step` steps, where it is time, or the run is `ending`; nothing else. Collective."""
        every = self._cfg.eval_every
        due = ending or step == self._steps or (every and step % every == 0)
        return self._measured(step, self._measure) if due and self._measure is not None else {}

    @property
    def steps(self) -> int:
        """Steps of the run, fewer than were planned where it has ended itself."""
        return max(self._seen) if self.ends() else self._steps

    def ends(self) -> bool:
        """Whether the run is to end, since as many measurements as `patience` says have bettered nothing."""
        return 0 < self._cfg.patience <= sum(step > self._best for step in self._seen)

    @property
    def _best(self) -> int:
        """The first step before the best measurement."""
        sign = -1.0 if self._cfg.keep_best.startswith("-") else 1.0
        return max(sorted(self._seen), key=lambda step: sign * self._seen[step], default=0)

    def conclude(self) -> None:
        """Say, where the run has ended so, which measurement was the best, and which saved state is."""
        cfg, mesh = self._cfg, self._mesh
        if not self.ends() or not mesh.is_main:
            return
        state = latest_state(cfg.states_dir)
        saved = None if state is None else read_position(state).best
        when = f"after step {self._best}" if self._best else "before the first step"
        kept = f"{cfg.states_dir / BEST}, the best that was saved, is after step {saved.step}, " if saved else ""
        print_remark(
            f"ended after step {self.steps} of {self._steps} (patience={cfg.patience}, a larger one goes on): "
            f"keep_best={cfg.keep_best} was "
            f"best {when}, {self._seen[self._best]:.4g}; {kept}the model as it is now in {cfg.model_dir}.",
            mesh,
        )

    def _measured(self, step: int, measure: Callable[[], Metrics]) -> Metrics:
        device = self._mesh.device
        with self.clock("measure"), torch.random.fork_rng([device] if device.type == "cuda" else []):
            try:
                found = measure()
            except JudgeError as error:
                # The step is done and cannot be taken back: a judge that is silent now may answer at the next.
                print_remark(f"nothing is measured after step {step}: {error}", self._mesh)
                return {}
        self._count(step, found)
        return found

    def _count(self, step: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self._cfg.keep_best.removeprefix("-"), math.nan)
        if self._cfg.patience and not math.isnan(value):
            self._seen[step] = value


def check_measuring(cfg: RunConfig, logged: Collection[str], measured: Collection[str], remedy: str) -> None:
    """Raise ConfigError where `eval_every`, `keep_best`, `patience` and `save_every` do not go together in this run.

    logged: metrics of every step. measured: those of held-out data; none where there are none, and then `remedy` says
    how some come about.
    """
    if cfg.eval_every and not measured:
        raise ConfigError(f"eval_every={cfg.eval_every}: nothing is held out to measure; {remedy}, or eval_every=0.")
    cfg.check_best({*logged, *measured})
    every, name = cfg.eval_every, cfg.keep_best.removeprefix("-")
    if name in measured and not every:
        raise ConfigError(
            f"keep_best={cfg.keep_best} is measured after the last step alone (eval_every=0), and states are saved "
            f"every save_every={cfg.save_every} steps; set eval_every, of which save_every is a multiple."
        )
    if name in measured and cfg.save_every % every:
        raise ConfigError(
            f"keep_best={cfg.keep_best} is measured every eval_every={every} steps, but states are saved every "
            f"save_every={cfg.save_every}, where it may not be known; make save_every a multiple of eval_every."
        )
    if cfg.patience and name not in measured:
        names = ", ".join(sorted(measured))
        choose = f"set keep_best to one of {names}" if measured else f"{remedy}, and keep_best to what is measured"
        raise ConfigError(
            f"patience={cfg.patience} counts measurements, and keep_best={cfg.keep_best} names none of them; {choose}, "
            "or patience=0."
        )
