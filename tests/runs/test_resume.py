"""A run that was stopped goes on bit for bit (invariant 7), in another layout up to rounding; nothing else starts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.checkpoint.state_writer import Retention, StateWriter
from megarlhf.checkpoint.training_state import Position, latest_state, load_state
from megarlhf.errors import CheckpointError, ConfigError, RunFinished
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs, SequenceScores
from megarlhf.models.role import TrainableRole
from megarlhf.observe.metrics import Metrics
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh, start
from megarlhf.runs.loop import Run
from megarlhf.trainers import ppo, process_reward, reward, sft
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig
from megarlhf.trainers.sft import SftConfig
from tests.helpers.models import frozen, learner, name_of, policy_and_judge, settings, whole_weights, worst
from tests.helpers.ranks import run_ranks
from tests.trainers.test_splits import lessons
from tests.trainers.worlds import ppo_config

ITERATIONS = 4
CLOCKED = ("time/", "throughput/", "memory/", "refit/seconds", "refit/gb_per_s")
"""Metrics that depend on the machine's day."""


class StoppedError(Exception):
    """Stands for a signal between two steps."""


@contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """Inside, a run ends right after it was to save the state of `step`."""
    step_ended = Run.step_ended

    def save_and_stop(run: Run, done: int, metrics: Metrics) -> None:
        step_ended(run, done, metrics)
        if done == step:
            run.states.finish()
            raise StoppedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step_ended", save_and_stop)
        with pytest.raises(StoppedError):
            yield


def ppo_settings(run_dir: Path, layout: ParallelLayout, folder: str, **changes: Any) -> PPOConfig:
    return ppo_config(
        run_dir,
        layout,
        f"{folder}/actor",
        f"{folder}/judge",
        **{
            "tokenizer": "arithmetic",
            "prompts": {
                "source": "arithmetic",
                "template": "plain",
                "max_tokens": 64,
                "arithmetic": {"level": 1, "rows": 20, "seed": 4},
            },
            "sampling": {"temperature": 1.0, "max_new_tokens": 8},
            "shaping": {"missing_eos": None},
            "iterations": ITERATIONS,
            "rollout_batch": 8,
            "global_batch": 4,
            "micro_batch": 2,
            "value_warmup_iterations": 2,
            "verifier": "arithmetic",
            "samples_every": 2,
            "tensorboard": False,
            "save_every": 1,
            **changes,
        },
    )


def run_ppo(
    layout: ParallelLayout, stop: int | None, where: str, folder: str, *, by_step: bool = False, drawn_in: Any = None
) -> dict[str, torch.Tensor]:
    """Start the run, or start it again: the final weights, or none if it stops before."""
    mesh = start(layout, seed=1)
    judge = {"kind": "process", "init": f"{folder}/judge", "separator": " ", "reward": "soft_min"}
    changes: dict[str, Any] = {"reward": {"init": ""}, "judges": {"steps": judge}} if by_step else {}
    cfg = ppo_settings(Path(where), layout, folder, **changes, rollout={"layout": drawn_in})
    return final_weights(cfg, stop, mesh)


def final_weights(cfg: PPOConfig, stop: int | None, mesh: Mesh) -> dict[str, torch.Tensor]:
    """Of the run, started or gone on with; none if it stops before, after so many steps."""
    with stopped_after(stop) if stop is not None else nullcontext():
        ppo.TRAINER.run(cfg, ppo.TRAINER.prepare(cfg), [], mesh)
    return {} if stop is not None else whole_weights(frozen(str(cfg.model_dir), LabelLogprobs(1.0), mesh))


def in_pieces(
    parts: list[tuple[ParallelLayout, int | None]], where: Path, folder: str, **options: Any
) -> dict[str, torch.Tensor]:
    """The same run once a part, in that layout, each but the last stopped after a step: the final weights.

    options: as `run_ppo` takes them.
    """
    run = partial(run_ppo, **options)
    return [run_ranks(run, layout.world_size, layout, stop, str(where), folder)[0] for layout, stop in parts][-1]


def logged(run_dir: Path) -> list[dict[str, float]]:
    """What the run wrote about its steps, the clock's part left out: every line, none twice."""
    rows = logged_lines(run_dir)
    assert [row["step"] for row in rows] == list(range(1, ITERATIONS + 1))
    return rows


def logged_lines(run_dir: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKED)} for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("resume")
    policy_and_judge(folder)
    return str(folder)


SCORERS: dict[str, Any] = {"reward": reward.TRAINER, "process_reward": process_reward.TRAINER}


def run_reward(command: str, stop: int | None, where: str) -> None:
    """A reward model from pairs and from judged responses, or steps, each with its own place in its data."""
    mesh = start(ParallelLayout(data=2), seed=1)
    data = {"template": "plain", "arithmetic": {"level": 1, "rows": 20}}
    trainer = SCORERS[command]
    cfg = trainer.config.model_validate(
        {
            "run_dir": Path(where),
            "layout": mesh.layout,
            "model": "tiny-xs",
            "tokenizer": "arithmetic",
            "pairs": data,
            "labelled": data,
            "heldout": data,
            "pairs_batch": 8,
            "labelled_batch": 16,
            "micro_batch": 2,
            "save_every": 1,
            "tensorboard": False,
            "epochs": 2.0,
            "optim": {"lr": 1e-3},
            **({"steps": data, "steps_batch": 16, "heldout_steps": data} if command == "process_reward" else {}),
        }
    )
    inputs = trainer.prepare(cfg)
    assert inputs.steps >= 4
    with stopped_after(stop) if stop is not None else nullcontext():
        trainer.run(cfg, inputs, [], mesh)


@pytest.mark.parametrize("command", SCORERS)
def test_a_stopped_reward_model_goes_on_bit_for_bit(command: str, tmp_path: Path) -> None:
    for name, stops in (("whole", [None]), ("pieces", [2, 3, None])):
        for stop in stops:
            run_ranks(run_reward, 2, command, stop, str(tmp_path / name))
    rows = [logged_lines(tmp_path / name) for name in ("whole", "pieces")]
    assert rows[0] == rows[1]
    last = int(rows[0][-1]["step"])
    assert [row["step"] for row in rows[0]] == [*range(1, last + 1), last]  # held-out figures come last
    whole, pieces = (run_ranks(scalar_weights, 1, str(tmp_path / name / "model"))[0] for name in ("whole", "pieces"))
    for name, weight in whole.items():
        assert torch.equal(pieces[name], weight), name


def scalar_weights(model: str) -> dict[str, torch.Tensor]:
    return whole_weights(frozen(model, SequenceScores(), start(ParallelLayout(), seed=1)))


@pytest.mark.parametrize(
    ("layout", "by_step"),
    [
        pytest.param(ParallelLayout(tensor=2), False, marks=pytest.mark.slow, id="tp2"),
        pytest.param(ParallelLayout(data=2), False, id="dp2"),
        pytest.param(ParallelLayout(), True, id="by step"),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(layout: ParallelLayout, by_step: bool, folder: str, tmp_path: Path) -> None:
    """Stopped while only the critic learns, and again later; with an outcome model, and with rewards of steps."""
    whole = in_pieces([(layout, None)], tmp_path / "whole", folder, by_step=by_step)
    stops = [(layout, 1), (layout, 3), (layout, None)]
    pieces = in_pieces(stops, tmp_path / "pieces", folder, by_step=by_step)
    assert logged(tmp_path / "pieces") == logged(tmp_path / "whole")
    for name, weight in whole.items():
        assert torch.equal(pieces[name], weight), name
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("whole", "pieces")]
    assert samples[0] == samples[1]
    assert any(row.get("steps/steps_per_response", 0) > 2 for row in logged(tmp_path / "whole")) == by_step
    assert len(list((tmp_path / "pieces" / "checkpoints").glob("step_*"))) == 2  # keep_last


@pytest.mark.parametrize(
    ("layout", "drawn_in"),
    [
        (ParallelLayout(pipeline=2), {"tensor": 1, "data": 2}),
        pytest.param(ParallelLayout(data=2), {"tensor": 2, "data": 1}, marks=pytest.mark.slow),
    ],
    ids=["pp2", "dp2"],
)
def test_a_run_that_draws_in_another_layout_goes_on_bit_for_bit(
    layout: ParallelLayout, drawn_in: dict[str, int], folder: str, tmp_path: Path
) -> None:
    """And learns what it learns where it draws in the layout of training, up to rounding."""
    whole = in_pieces([(layout, None)], tmp_path / "whole", folder, drawn_in=drawn_in)
    stops = [(layout, 1), (layout, 3), (layout, None)]
    pieces = in_pieces(stops, tmp_path / "pieces", folder, drawn_in=drawn_in)
    rows = logged(tmp_path / "whole")
    assert logged(tmp_path / "pieces") == rows
    for name, weight in whole.items():
        assert torch.equal(pieces[name], weight), name
    assert [row["refit/count"] for row in rows] == [1] * ITERATIONS
    assert max(row["rollout/sampler_gap_max"] for row in rows) < 1e-5
    usual = in_pieces([(layout, None)], tmp_path / "usual", folder)
    assert worst(whole, run_ranks(initial, 1, f"{folder}/actor")[0]) > 1e-3  # the actor has learnt
    assert worst(whole, usual) < 1e-5


@pytest.mark.slow
def test_another_layout_goes_on_up_to_rounding(folder: str, tmp_path: Path) -> None:
    tensor, data = ParallelLayout(tensor=2), ParallelLayout(data=2)
    whole = in_pieces([(data, None)], tmp_path / "whole", folder)
    moved = in_pieces([(tensor, 3), (data, None)], tmp_path / "moved", folder)
    start_weights = run_ranks(initial, 1, f"{folder}/actor")[0]
    assert worst(whole, start_weights) > 1e-3  # the actor has learnt
    assert worst(moved, whole) < 1e-5


def initial(model: str) -> dict[str, torch.Tensor]:
    return whole_weights(frozen(model, LabelLogprobs(1.0), start(ParallelLayout(), seed=1)))


def stop_early(where: str, folder: str) -> None:
    mesh = start(ParallelLayout(), seed=1)
    cfg = ppo_settings(Path(where), ParallelLayout(), folder)
    with stopped_after(1):
        ppo.TRAINER.run(cfg, ppo.TRAINER.prepare(cfg), [], mesh)


def test_other_settings_and_finished_runs_are_refused(folder: str, tmp_path: Path) -> None:
    run_ranks(stop_early, 1, str(tmp_path), folder)
    same = ppo_settings(tmp_path, ParallelLayout(data=2), folder, micro_batch_tokens=80)  # changes no result
    same.check_run_dir()
    other = ppo_settings(tmp_path, ParallelLayout(), folder, kl_coef=0.1, seed=2)
    with pytest.raises(ConfigError, match=r"other settings \(seed 1 -> 2, kl_coef 0\.05 -> 0\.1\); put them back"):
        other.check_run_dir()
    with pytest.raises(ConfigError, match="already holds a run"):
        ppo_settings(tmp_path, ParallelLayout(), folder, resume="never").check_run_dir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.json").touch()
    with pytest.raises(RunFinished, match="this run is done; its model is in"):
        same.check_run_dir()


def go_on_slower(where: str) -> None:
    """A run of three steps that goes on after its first one as a stop for skipped steps says that it may."""
    mesh = start(ParallelLayout(), seed=1)
    changes: list[dict[str, Any]] = [{"optim": {"lr": 1e-3}}, {"optim": {"lr": 4e-4}, "max_skipped_steps": 9}]
    for stop, change in zip((stopped_after(1), nullcontext()), changes, strict=True):
        cfg = SftConfig.model_validate(
            {
                "run_dir": where,
                "model": "tiny-xs",
                "tokenizer": "arithmetic",
                "data": {"template": "plain", "arithmetic": {"level": 1, "rows": 12}},
                "global_batch": 4,
                "micro_batch": 2,
                "save_every": 1,
                "tensorboard": False,
                **change,
                "optim": {"schedule": "constant", "warmup_steps": 0, **change["optim"]},
            }
        )
        with stop:
            sft.TRAINER.run(cfg, sft.prepare(cfg), [], mesh)


def test_a_run_goes_on_with_a_lower_learning_rate(tmp_path: Path) -> None:
    """And with it alone: the saved optimiser has its own."""
    run_ranks(go_on_slower, 1, str(tmp_path))
    assert [row["sft/learning_rate"] for row in logged_lines(tmp_path)] == [1e-3, 4e-4, 4e-4]


def test_a_state_that_is_half_written_is_never_taken(folder: str, tmp_path: Path) -> None:
    run_ranks(stop_early, 1, str(tmp_path), folder)
    states = tmp_path / "checkpoints"
    newest = states / "step_00000001"
    assert latest_state(states) == newest
    shutil.copytree(newest, states / "step_00000002.partial")  # killed before the rename
    shutil.copytree(newest, states / "step_00000003")  # killed before the pointer moved
    assert latest_state(states) == newest
    shutil.rmtree(newest)
    with pytest.raises(
        CheckpointError, match="names step_00000001, which is missing; write there which to go on from: step_00000003"
    ):
        latest_state(states)


def two_and_two_steps(layout: ParallelLayout, where: str, folder: str, distributed: bool, again: bool) -> Any:
    """Four optimiser steps; the last two are taken on a role that was saved after two, or loaded there."""
    mesh = start(layout, seed=1)
    cfg = ppo_settings(Path("unused"), layout, folder)
    optim = OptimConfig(lr=1e-3, weight_decay=0.1, distributed=distributed)
    role = learner(f"{folder}/actor", LabelLogprobs(1.0), settings(mesh, 2), mesh, optim)
    roles = {"actor": role}
    if again:
        state = latest_state(Path(where))
        assert state is not None
        assert load_state(state, roles).step == 2
    for step in range(2 if again else 0, 4):
        if step == 2 and not again:
            save(Path(where), at(2), role)
        role.update(lessons(step)[0], policy_loss(role, cfg))
    return whole_weights(role)


def save(where: Path, position: Position, role: TrainableRole) -> None:
    """Write a state and wait for it; it is the only one kept."""
    writer = StateWriter(where, {"actor": role}, {}, Retention(last=1, every=0), role.mesh)
    writer.start(position)
    writer.finish()


def at(step: int) -> Position:
    return Position(step=step, parts={}, skipped_steps=0, bytes_written={})


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded", "whole"])
@pytest.mark.parametrize(
    "layout", [ParallelLayout(pipeline=2, virtual_pipeline=2), ParallelLayout(data=2)], ids=name_of
)
def test_every_kind_of_optimiser_goes_on_bit_for_bit(
    layout: ParallelLayout, distributed: bool, folder: str, tmp_path: Path
) -> None:
    """Interleaved stages too, whose chunks have parameters of the same names."""
    straight, resumed = (
        run_ranks(two_and_two_steps, 2, layout, str(tmp_path), folder, distributed, again)[0] for again in (False, True)
    )
    for name, weight in straight.items():
        assert torch.equal(resumed[name], weight), name


def draw_again(where: str, folder: str, again: bool) -> torch.Tensor:
    """Random numbers of this rank, as they come after a state was saved, or loaded."""
    mesh = start(ParallelLayout(data=2), seed=1)
    role = learner(f"{folder}/actor", LabelLogprobs(1.0), settings(mesh, 2), mesh, OptimConfig())
    if again:
        load_state(Path(where) / "step_00000001", {"actor": role})
    else:
        torch.manual_seed(90 + mesh.rank)
        save(Path(where), at(1), role)
    return torch.rand(5)


def test_every_rank_draws_on_where_it_was(folder: str, tmp_path: Path) -> None:
    first, second = run_ranks(draw_again, 2, str(tmp_path), folder, False)
    assert not torch.equal(first, second)
    again = run_ranks(draw_again, 2, str(tmp_path), folder, True)
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)


def save_beside_a_later_one(where: str, folder: str) -> None:
    mesh = start(ParallelLayout(), seed=1)
    role = learner(f"{folder}/actor", LabelLogprobs(1.0), settings(mesh, 2), mesh, OptimConfig())
    shutil.copytree(folder, f"{where}/step_00000009")  # of a run that was killed before `latest` named it
    for step in (1, 2):
        save(Path(where), at(step), role)


def test_the_newest_state_is_kept_whatever_lies_beside_it(folder: str, tmp_path: Path) -> None:
    run_ranks(save_beside_a_later_one, 1, str(tmp_path), folder)
    assert [path.name for path in tmp_path.glob("step_*")] == ["step_00000002"]
    assert latest_state(tmp_path) == tmp_path / "step_00000002"
