"""The cadence of a run: steps in order, progress, metrics, states, and what a stop leaves.

Knows no algorithm: a trainer hands it a function of the step number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from megarlhf.checkpoint.disk import check_room
from megarlhf.checkpoint.model_directory import Card, weight_bytes
from megarlhf.checkpoint.state_writer import Retention, StateWriter
from megarlhf.checkpoint.training_state import Best, Number, Position, Resumable, latest_state, load_state
from megarlhf.errors import (
    CheckpointError,
    ConfigError,
    JudgeError,
    MegarlhfError,
    OutputError,
    RunStopped,
    TrainingError,
)
from megarlhf.models.finite import not_finite
from megarlhf.models.role import TrainableRole
from megarlhf.observe.files import reason, refused, remedy, writing
from megarlhf.observe.metrics import Metrics
from megarlhf.observe.progress import Progress
from megarlhf.observe.run_files import steps_in
from megarlhf.observe.writers import RunWriter
from megarlhf.parallel.collectives import broadcast_object, on_main
from megarlhf.parallel.launch import fail, is_timeout
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.watchdog import watched
from megarlhf.runs.capsule import capsule_directory, last_seen, leave_capsule, missing_ranks, sign_of_life
from megarlhf.runs.guard import StepGuard
from megarlhf.runs.opening import say_of_run
from megarlhf.runs.run_logs import check_logs, cut_logs, lengths, sums
from megarlhf.runs.settings import RunConfig
from megarlhf.runs.stopping import StopRequest, before_first_step


class Run:
    """What a trainer has that must survive a stop, and when it is saved.

    roles: that learn. cards: what says of them, by name, what model they are.
    Ranks:    every rank has one; saving and loading are collective.
    """

    def __init__(
        self,
        cfg: RunConfig,
        roles: Mapping[str, TrainableRole],
        cards: Mapping[str, Card],
        parts: Mapping[str, Resumable],
        guard: StepGuard,
        mesh: Mesh,
    ) -> None:
        self._cfg, self._roles, self._guard = cfg, roles, guard
        self._parts: dict[str, Resumable] = {**parts, "work": mesh.work}
        self.mesh = mesh
        self.states = StateWriter(cfg.states_dir, roles, cards, Retention(cfg.keep_last, cfg.keep_every), mesh)
        self._stop = StopRequest(cfg.save_before, mesh)
        self._best: Best | None = None
        self._saved = 0
        """Steps of the newest state."""
        self.first = 0
        """The step to begin with, once `restore` was called."""
        self._aside: Path | None = None
        """Where the model of a finished run goes that takes more steps."""
        guard.settle = self.states.finish

    def restore(self) -> int:
        """Go back to the newest saved state and cut off what the logs say beyond it; return how many steps are done."""
        run_dir = self._cfg.run_dir
        # Named by the log as it is before it is cut.
        self._aside = on_main(lambda: self._cfg.aside() if self._cfg.model_dir.exists() else None, self.mesh)
        state = latest_state(self._cfg.states_dir)
        position = None if state is None else load_state(state, self._roles)
        if position is not None:
            self._take_place(position)
        lost = on_main(lambda: self._cut_logs(position), self.mesh)
        if position is not None:
            say_of_run(f"{run_dir}: goes on after step {position.step}, from {state}", lost, self.mesh)
        elif lost:
            say_of_run(
                f"{run_dir}: no state is saved in {self._cfg.states_dir}, so that the run starts afresh",
                lost,
                self.mesh,
            )
        self.first = 0 if position is None else position.step
        return self.first

    def _take_place(self, position: Position) -> None:
        changes = on_main(self._cfg.changes, self.mesh) if self._cfg.resume == "force" else {}
        for name, part in self._parts.items():
            if others := [change for change in changes if change.startswith(f"{name}.")]:
                say_of_run(f"resume=force: {name} begins afresh, for {', '.join(others)} changed", (), self.mesh)
                continue
            try:
                if name not in position.parts:
                    raise CheckpointError(
                        f"the state after step {position.step} in {self._cfg.states_dir} says nothing of {name}: it is "
                        "of another kind of run; choose another run_dir."
                    )
                part.load_state(position.parts[name])
            except CheckpointError as error:
                if self._cfg.resume != "force":
                    raise
                say_of_run(f"resume=force: {name} begins afresh, for {error}", (), self.mesh)
        self._guard.skipped, self._saved = position.skipped_steps, position.step
        if position.best is not None and position.best.metric == self._cfg.keep_best:
            self._best = position.best
        self._guard.in_a_row = dict(position.skipped_in_a_row)

    def keep_finished(self) -> None:
        """Put the model of a finished run aside, for there are more steps to take. Collective."""
        aside, model = self._aside, self._cfg.model_dir
        if aside is None:
            return

        def move() -> None:
            with writing(aside):
                model.rename(aside)

        on_main(move, self.mesh)
        say_of_run(f"{self._cfg.run_dir}: its model so far is kept in {aside}", (), self.mesh)

    def forget_best(self) -> None:
        """What it was measured on are others now."""
        self._best = None

    def _cut_logs(self, position: Position | None) -> list[str]:
        if position is not None:
            check_logs(self._cfg.run_dir, position)
        return cut_logs(self._cfg.run_dir, position)

    def check_room(self, first: int, count: int) -> None:
        """Raise ConfigError where the states of steps `first` to `count`, and the model after them, have no room.

        Ranks:    collective.
        """
        cfg = self._cfg
        saves = -(-count // cfg.save_every) - first // cfg.save_every if cfg.save_every and first < count else 0
        kept_for_good = (count // cfg.keep_every - first // cfg.keep_every if cfg.keep_every else 0) + bool(
            cfg.keep_best
        )
        there = len(steps_in(cfg.states_dir))
        # One more than is kept is there while it is written.
        states = min(saves, max(1, cfg.keep_last + 1 - there) + kept_for_good)
        model = weight_bytes(next(iter(self._roles.values())))
        needed = states * self.states.state_bytes() + model
        what = f"{states} states (keep_last={cfg.keep_last}, keep_every={cfg.keep_every}) and the model"
        check_room(cfg.run_dir, needed, what if states else "the model", self.mesh, ConfigError)

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """While the steps run: signals wait for the end of a step, and at the end every state is whole."""
        trail, run_dir = self.mesh.trail, self._cfg.run_dir
        trail.trainer = type(self._cfg).__module__  # where its TRAINER is
        trail.attempt = broadcast_object(time.strftime("%Y%m%dT%H%M%S"), self.mesh, "world")
        trail.sign = sign_of_life(run_dir, self.mesh.rank)
        trail.sign.parent.mkdir(parents=True, exist_ok=True)
        watch = watched(trail, self._cfg.timeout_s, self.mesh.device, self._give_up)
        with watch, self._stop.listening():
            try:
                yield
                self.states.finish()
            except KeyboardInterrupt:
                self.states.drop()  # nobody who presses Ctrl-C waits for it
                raise
            except MegarlhfError:
                raise  # says itself what to do
            except Exception as error:
                words = leave_capsule(run_dir, f"{type(error).__name__}: {error}", self.mesh)
                if is_timeout(error):
                    raise TrainingError(self._silence(words)) from error
                if refused(error):
                    raise OutputError(f"{run_dir}: {reason(error)}; {remedy(run_dir)}.") from error
                raise
            finally:
                self.states.leave()
                with suppress(OSError):
                    trail.sign.unlink(missing_ok=True)

    def _give_up(self) -> None:
        """End this rank, whose GPU no longer answers, from a thread beside the one that waits for it."""
        words = leave_capsule(self._cfg.run_dir, "the GPU no longer answers", self.mesh)
        fail(TrainingError(self._silence(words)))

    def _silence(self, words: str) -> str:
        trail, run_dir = self.mesh.trail, self._cfg.run_dir
        silent = [
            f"rank {rank} (last seen in {last_seen(run_dir, rank, trail.attempt)})"
            for rank in missing_ranks(capsule_directory(run_dir, trail.step), self.mesh)
        ]
        return (
            f"no answer for timeout_s={self._cfg.timeout_s:g} in {trail.collective}, {trail.where}: "
            f"{', '.join(silent) or 'no rank'} did not arrive; {words}. Find out what it does, raise timeout_s if it "
            "is only slow, and start the same command again."
        )

    def check(self, gates: Callable[[], object]) -> None:
        """Call `gates`; where one fails, leave a capsule and raise its TrainingError with the place added.

        Raises:   RunStopped when a signal came meanwhile.
        """
        try:
            gates()
        except TrainingError as error:
            words = leave_capsule(self._cfg.run_dir, str(error), self.mesh)
            raise TrainingError(
                f"{error}\n{words}; megarlhf doctor measures more, and gates=off goes on anyway."
            ) from None
        if asked := self._stop.signalled():
            raise before_first_step(asked)
        self._stop.step_begins()

    def step_ended(self, step: int, metrics: Metrics) -> None:
        """Save the state after `step` steps if it is time, or, whatever save_every is, if the run shall stop.

        Raises:   RunStopped once the state is saved, when a signal or the time limit asked for it, TrainingError where
                  it cannot be saved then; else OutputError where one cannot.
        """
        reason = self._stop.step_ended()
        try:
            self._save_if_due(step, metrics, bool(reason))
        except OutputError as error:
            if not reason:
                raise
            raise TrainingError(
                f"stopped by {reason} after step {step}, whose state cannot be saved: {error}"
            ) from None
        if reason:
            raise RunStopped(
                f"stopped by {reason} after step {step}; its state is in {self._cfg.states_dir}, and the same command "
                "goes on from there."
            )

    def _save_if_due(self, step: int, metrics: Metrics, stopping: bool) -> None:
        self.states.poll()
        every = self._cfg.save_every
        if not stopping and (not every or step % every):
            return
        began = time.monotonic()
        self.save(step, metrics)
        if stopping:
            self.states.finish()
        self._stop.save_ended(time.monotonic() - began)

    def parts(self) -> dict[str, dict[str, Number]]:
        """Where everything beside the models is now."""
        return {name: dict(part.state()) for name, part in self._parts.items()}

    def stop_unjudged(
        self, step: int, before: Mapping[str, Mapping[str, Number]], metrics: Metrics, error: JudgeError
    ) -> NoReturn:
        """Save the state after `step` steps, which logged `metrics` last, when the next could not be judged; and end.

        before: what `parts` said then. Raises: the error, with where the state is, or why there is none.
        """
        for name, part in self._parts.items():
            part.load_state(before[name])
        kept = f"the state after step {step} is in {self._cfg.states_dir}, and" if step else "no step was done, and"
        try:
            self.save_last(step, metrics)
            self.states.finish()
        except (OutputError, TrainingError) as failure:
            raise TrainingError(f"{error}\nand the state after step {step} cannot be saved: {failure}") from error
        raise type(error)(f"{error}\n{kept} the same command goes on from there.") from error

    def save_last(self, step: int, metrics: Metrics) -> None:
        """Save the state after `step` steps, unless `step_ended` has."""
        if step > self._saved:
            self.save(step, metrics)

    def steps_done(self, step: int, metrics: Metrics) -> None:
        """Save the state after the last step, where states are saved: with more steps the run goes on from it."""
        if self._cfg.save_every:
            self.save_last(step, metrics)

    def save(self, step: int, metrics: Metrics) -> None:
        """Begin to save the state after `step` steps.

        Raises:   TrainingError where a role is no longer finite: a state of it would push out the good ones.
        """
        for role in self._roles.values():
            if fault := not_finite(role):
                raise TrainingError(
                    f"the {role.name} after step {step} is not saved: {fault}; lower the learning rate, and the same "
                    "command goes on from the newest state, or starts afresh where there is none."
                )
        main = self.mesh.is_main  # alone it writes this down
        self._best = better(self._best, self._cfg.keep_best, step, metrics)
        position = Position(
            step=step,
            parts=self.parts(),
            skipped_steps=self._guard.skipped,
            skipped_in_a_row=dict(self._guard.in_a_row),
            bytes_written=lengths(self._cfg.run_dir) if main else {},
            sums=sums(self._cfg.run_dir) if main else {},
            best=self._best,
        )
        self.states.start(position)
        self._saved = step


def better(best: Best | None, metric: str, step: int, metrics: Metrics) -> Best | None:
    """The better of `best` and this step by `metric`, lowest where its name has a minus; `best` without a number."""
    name = metric.removeprefix("-")
    if not name:
        return None
    value, sign = metrics.get(name, math.nan), -1.0 if metric.startswith("-") else 1.0
    if math.isnan(value) or (best is not None and sign * value <= sign * best.value):
        return best
    return Best(step=step, value=value, metric=metric)


def run_steps(
    count: int,
    description: str,
    step: Callable[[int], Metrics],
    notes: Sequence[str],
    *,
    run: Run,
    writer: RunWriter | None,
    ready: Callable[[int], object] = lambda _: None,
    enough: Callable[[Metrics], bool] = lambda _: False,
) -> Metrics:
    """Call `step(0)` to `step(count - 1)`, or from where the run was, log what each returns, and return the last.

    notes: names of the metrics shown beside the progress bar, where the run logs them. ready: called before the first
    step, with its number. enough: whether the run ends after a step that logged these metrics (none before the first
    step of a start); its state is saved.
    Ranks:    rank 0 has the writer and shows the bar.
    """
    metrics: Metrics = {}
    first = run.first
    run.check_room(first, count)
    trail = run.mesh.trail
    named = f"{description} from step {first}" if first else description
    with run.under_way(), Progress(count - first, named, enabled=run.mesh.is_main) as bar:
        trail.step = first
        run.check(lambda: ready(first))
        # One that had ended, and was killed before its model was saved, has no step left to take.
        last = first if enough(metrics) else count
        if first < last:
            run.keep_finished()
        for index in range(first, last):
            trail.step, before = index, run.parts()
            try:
                metrics = step(index)
            except JudgeError as error:
                run.stop_unjudged(index, before, metrics, error)
            if writer is not None:
                writer.log(metrics, index + 1)
            run.step_ended(index + 1, metrics)
            shown = [f"{name.partition('/')[2]} {metrics[name]:.3f}" for name in notes if name in metrics]
            bar.advance(note=", ".join(shown))
            if enough(metrics):
                run.save_last(index + 1, metrics)
                break
        else:
            run.steps_done(last, metrics)
    return metrics
