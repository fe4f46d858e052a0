"""What a signal does to a training command before its first step, while it trains, and after its last."""

from __future__ import annotations

import os
import signal
import sys
import weakref
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from megarlhf import cli
from megarlhf.errors import RunStopped
from megarlhf.parallel import local_ranks
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runs.measuring import Measuring
from megarlhf.runs.stopping import SIGNALS, StopRequest, stopping_at_start
from megarlhf.trainers import sft
from tests.helpers.ranks import run_ranks
from tests.runs.test_killed import config

AGAIN = "before the first step; start the same command again."


def signal_myself(number: int) -> None:
    os.kill(os.getpid(), number)


def while_modules_are_imported(number: int) -> None:
    with cli._ending_at_once(goes_on=True):
        signal_myself(number)


def while_models_are_built(number: int) -> None:
    with stopping_at_start():
        signal_myself(number)


def while_the_model_is_saved(number: int) -> None:
    """The model, the page, the last words: all that comes after the steps."""
    alone: Any = None  # no step ends here: nobody is asked
    with stopping_at_start():
        with StopRequest(0, alone).listening():
            pass
        signal_myself(number)
    assert signal.getsignal(number) is signal.SIG_DFL  # who called the command is as before
    sys.exit(0)


@pytest.mark.parametrize(
    ("moment", "code", "said"),
    [
        (while_modules_are_imported, 75, "stopped by {} " + AGAIN + "\n"),
        (while_models_are_built, 75, "stopped by {} " + AGAIN + "\n"),
        (while_the_model_is_saved, 0, ""),
    ],
)
@pytest.mark.parametrize("number", SIGNALS)
def test_nothing_is_lost_outside_of_the_steps(
    moment: Callable[[int], None], code: int, said: str, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    process = get_context("fork").Process(target=moment, args=(number,))
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert capfd.readouterr().err == said.format(number.name)


def stop_at_the_gates(run_dir: Path) -> str:
    cfg = config(run_dir, ParallelLayout())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measuring, "begin", lambda *_: signal_myself(signal.SIGUSR1))
        with pytest.raises(RunStopped) as stopped:
            sft.TRAINER.run(cfg, sft.prepare(cfg), [], start(cfg.layout, seed=cfg.seed))
    return str(stopped.value)


def test_a_signal_while_the_gates_measure_stops_before_the_first_step(tmp_path: Path) -> None:
    assert run_ranks(stop_at_the_gates, 1, tmp_path) == [f"stopped by SIGUSR1 {AGAIN}"]
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_ranks_that_were_stopped_before_they_could_speak(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert local_ranks._report_first_failure({0: 75, 1: 75}, tmp_path) == 75
    assert capfd.readouterr().err == f"stopped {AGAIN}\n"


def test_a_signal_before_any_rank_is_started_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    listening = local_ranks._listening

    def signalled(ranks: Any, caught: list[int]) -> Any:
        caught.append(signal.SIGTERM)
        return listening(ranks, caught)

    monkeypatch.setattr(local_ranks, "_listening", signalled)
    assert local_ranks.start_ranks(2, ["-c", "pass"]) == 128 + signal.SIGTERM


class Thing:
    """May be collected."""


def pressed_while_something_is_collected() -> tuple[str, str]:
    """What Ctrl-C does then, at once and at the end of the step."""
    stop, heard = StopRequest(0, start(ParallelLayout(), seed=1)), []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with stop.listening():
        try:
            thing = Thing()
            watch = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
            del thing
            heard.append("nothing")
        except KeyboardInterrupt:
            heard.append("at once")
        assert watch() is None
        try:
            stop.step_ended()
        except KeyboardInterrupt:
            heard.append("at the end of the step")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
    return heard[0], heard[-1]


def test_no_ctrl_c_is_lost() -> None:
    assert run_ranks(pressed_while_something_is_collected, 1) == [("nothing", "at the end of the step")]
