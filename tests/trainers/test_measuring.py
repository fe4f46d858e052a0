"""What is measured while training is what the separate command says of the model, and training does not notice."""

from __future__ import annotations

import io
import json
import math
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.checkpoint.training_state import latest_state, read_position
from megarlhf.commands import score
from megarlhf.commands.score import ScoreConfig
from megarlhf.data.arithmetic import ArithmeticConfig, preference_rows, sft_rows
from megarlhf.models.readings import LabelLogprobs, SequenceScores
from megarlhf.observe.clock import Clock
from megarlhf.ops.preference_loss import calibration_error
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runs.loop import Run
from megarlhf.runs.measuring import Measuring
from megarlhf.runs.settings import RunConfig
from megarlhf.trainers import dpo, reward, reward_measures, sft
from megarlhf.trainers.dpo import DPOConfig
from megarlhf.trainers.reward import RewardConfig
from megarlhf.trainers.sft import SftConfig
from tests.helpers.models import frozen, name_of, whole_weights, worst
from tests.helpers.ranks import run_ranks
from tests.runs.test_resume import StoppedError, logged_lines, stopped_after

LAYOUTS = [ParallelLayout(data=2), ParallelLayout(tensor=2), ParallelLayout(pipeline=2)]
ROWS = 13
"""Held out: a number that two data ranks do not share evenly."""
DATA = {"source": "arithmetic", "template": "plain", "arithmetic": {"level": 1, "rows": 40}}
HELDOUT = {**DATA, "arithmetic": {"level": 1, "rows": ROWS}}
OF = {"sft": sft, "reward": reward, "dpo": dpo}
SETTINGS: dict[str, tuple[type[RunConfig], dict[str, Any]]] = {
    "sft": (SftConfig, {"data": DATA, "heldout": HELDOUT, "global_batch": 8}),
    "reward": (RewardConfig, {"pairs": DATA, "heldout_pairs": HELDOUT, "heldout": HELDOUT, "pairs_batch": 8}),
    "dpo": (DPOConfig, {"pairs": DATA, "heldout": HELDOUT, "global_batch": 8, "beta": 0.3}),
}
"""Of each command, with something held out."""
FAMILY = ("sft/heldout_", "reward/heldout_", "reward/auc", "dpo/heldout_")


def config(command: str, run_dir: Path, layout: ParallelLayout, **changes: Any) -> Any:
    kind, given = SETTINGS[command]
    return kind.model_validate(
        {
            "run_dir": run_dir,
            "layout": layout,
            "model": "tiny-xs",
            "tokenizer": "arithmetic",
            "micro_batch": 2,
            "save_every": 2,
            "eval_every": 2,
            "tensorboard": False,
            "optim": {"lr": 1e-3, "schedule": "constant"},
            **given,
            **changes,
        }
    )


def weights(command: str, cfg: Any, mesh: Any) -> dict[str, Tensor]:
    reading = SequenceScores() if command == "reward" else LabelLogprobs(1.0)
    return whole_weights(frozen(str(cfg.model_dir), reading, mesh))


def trained(command: str, stops: list[int | None], cfg: Any) -> tuple[dict[str, Tensor], str]:
    """Run, and where `stops` say so stop after a step and go on: the weights, and what the last start said."""
    mesh, said = start(cfg.layout, seed=1), io.StringIO()
    for stop in stops:
        said = io.StringIO()
        with stopped_after(stop) if stop is not None else nullcontext(), redirect_stderr(said):
            OF[command].TRAINER.run(cfg, OF[command].prepare(cfg), [command], mesh)
    return weights(command, cfg, mesh), said.getvalue()


def run(command: str, cfg: Any, stops: tuple[int | None, ...] = (None,)) -> tuple[dict[str, Tensor], str]:
    return run_ranks(trained, cfg.layout.world_size, command, list(stops), cfg)[0]


def measured(run_dir: Path) -> dict[int, dict[str, float]]:
    """What was measured, by step."""
    rows = [(row["step"], {k: v for k, v in row.items() if k.startswith(FAMILY)}) for row in logged_lines(run_dir)]
    return {int(step): found for step, found in rows if any("heldout" in name for name in found)}


def separately(model: str, rows: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What `megarlhf score` adds to rows of text."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = folder / f"scored_{Path(model).name}_{len(list(folder.iterdir()))}.jsonl"
    given = {"model": model, "tokenizer": "arithmetic", "input": folder / "rows.jsonl", "output": output}
    cfg = ScoreConfig.model_validate({**given, "prompts": {"template": "plain"}})
    run_ranks(scored, 1, cfg)
    return [json.loads(line) for line in output.read_text().splitlines()]


def scored(cfg: ScoreConfig) -> None:
    with redirect_stderr(io.StringIO()):
        score.run(cfg, score.prepare(cfg), start(cfg.layout, seed=cfg.seed))


@pytest.fixture(scope="module", params=["sft", "reward", "dpo"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    """A command, a run of it on one rank that measures, and its weights."""
    run_dir = tmp_path_factory.mktemp(request.param) / "run"
    found, _ = run(request.param, config(request.param, run_dir, ParallelLayout()))
    return request.param, run_dir, found


def test_it_is_measured_before_the_first_step_after_every_second_and_after_the_last(
    whole: tuple[str, Path, Any],
) -> None:
    command, run_dir, _ = whole
    steps = max(int(row["step"]) for row in logged_lines(run_dir))
    assert sorted(measured(run_dir)) == sorted({*range(0, steps + 1, 2), steps})
    times = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {row["step"] for row in times if row.get("time/measure_s", 0) > 0} == set(measured(run_dir))
    assert command == "reward" or len(times) == steps + 1


def test_training_does_not_notice(whole: tuple[str, Path, Any], tmp_path: Path) -> None:
    """All other metrics and all weights are those of a run without, to the bit: FLOPs too."""
    command, run_dir, found = whole
    without, _ = run(command, config(command, tmp_path / "run", ParallelLayout(), eval_every=0))
    assert worst(found, without) == 0.0
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(FAMILY)} for row in logged_lines(place) if row["step"]]
        for place in (run_dir, tmp_path / "run")
    ]
    assert rows[0] == rows[1]


def test_a_stopped_run_measures_what_the_whole_one_did(whole: tuple[str, Path, Any], tmp_path: Path) -> None:
    command, run_dir, found = whole
    pieces, _ = run(command, config(command, tmp_path / "run", ParallelLayout()), (2, None))
    assert worst(found, pieces) == 0.0
    assert logged_lines(tmp_path / "run") == logged_lines(run_dir)


def test_a_run_that_goes_on_may_measure_from_then_on(whole: tuple[str, Path, Any], tmp_path: Path) -> None:
    command, run_dir, found = whole
    name = "heldout_pairs" if command == "reward" else "heldout"
    before = config(command, tmp_path / "run", ParallelLayout(), eval_every=0, **{name: None})
    run_ranks(begun, 1, command, 2, before)
    weights, said = run(command, config(command, tmp_path / "run", ParallelLayout()))
    assert worst(found, weights) == 0.0
    late = {step: row for step, row in measured(run_dir).items() if step > 2}
    assert measured(tmp_path / "run") == late
    assert "goes on after step 2" in said
    assert f"goes on with other settings ({name}" in said


def begun(command: str, stop: int, cfg: Any) -> None:
    with stopped_after(stop), redirect_stderr(io.StringIO()):
        OF[command].TRAINER.run(cfg, OF[command].prepare(cfg), [command], start(cfg.layout, seed=1))


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_no_layout_changes_it(layout: ParallelLayout, whole: tuple[str, Path, Any], tmp_path: Path) -> None:
    """13 rows on two data ranks are 7 and 6: their mean is still that of the rows."""
    command, run_dir, _ = whole
    run(command, config(command, tmp_path / "run", layout))
    ours, theirs = measured(tmp_path / "run"), measured(run_dir)
    assert ours.keys() == theirs.keys()
    for step, found in theirs.items():
        assert ours[step] == pytest.approx(found, rel=2e-4, abs=2e-5), step


def last(run_dir: Path) -> dict[str, float]:
    found = measured(run_dir)
    return found[max(found)]


@pytest.mark.parametrize("whole", ["sft"], indirect=True)
def test_the_loss_is_what_score_says(whole: tuple[str, Path, Any], tmp_path: Path) -> None:
    _, run_dir, _ = whole
    rows = sft_rows(ArithmeticConfig(level=1, rows=ROWS), "heldout")
    for step, model in ((0, "tiny-xs"), (max(measured(run_dir)), str(run_dir / "model"))):
        said = separately(model, rows, tmp_path)
        loss = -sum(row["logprob_sum"] for row in said) / sum(len(row["logprobs"]) for row in said)
        assert measured(run_dir)[step]["sft/heldout_loss"] == pytest.approx(loss, rel=1e-6)
    assert measured(run_dir)[0]["sft/heldout_loss"] > last(run_dir)["sft/heldout_loss"] + 0.5


def sides(model: str, folder: Path, name: str) -> list[tuple[float, float]]:
    """Of held-out pairs: what `megarlhf score` says of the chosen and of the rejected response."""
    pairs = preference_rows(ArithmeticConfig(level=1, rows=ROWS), "heldout")
    rows = [{"prompt": p["prompt"], "response": p[side]} for p in pairs for side in ("chosen", "rejected")]
    said = [row[name] for row in separately(model, rows, folder)]
    return list(zip(said[0::2], said[1::2], strict=True))


def calibration(gaps: list[float]) -> float:
    """The glossary's formula, in a loop."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for gap in gaps:
        confidence = 1 / (1 + math.exp(-abs(gap)))
        right = 1.0 if gap > 0 else 0.5 if gap == 0 else 0.0
        bins.setdefault(min(9, int((confidence - 0.5) / 0.05)), []).append((right, confidence))
    means = [(len(each), *(sum(column) / len(each) for column in zip(*each, strict=True))) for each in bins.values()]
    return sum(count / len(gaps) * abs(right - confidence) for count, right, confidence in means)


@pytest.mark.parametrize("whole", ["reward"], indirect=True)
def test_order_margin_and_calibration_are_those_of_the_scores(whole: tuple[str, Path, Any], tmp_path: Path) -> None:
    _, run_dir, _ = whole
    gaps = [chosen - rejected for chosen, rejected in sides(str(run_dir / "model"), tmp_path, "score")]
    found = last(run_dir)
    assert found["reward/heldout_pair_accuracy"] == sum(gap > 0 for gap in gaps) / len(gaps)
    assert found["reward/heldout_margin_mean"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
    loss = sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps)
    assert found["reward/heldout_pairwise_loss"] == pytest.approx(loss, rel=1e-6)
    assert found["reward/heldout_calibration_error"] == pytest.approx(calibration(gaps), rel=1e-4)
    assert found["reward/heldout_calibration_error"] > 0.01
    # The AUC of the last measurement is that of the numbers by which scores are normalised.
    (normalised,) = (row for row in logged_lines(run_dir) if "reward/centre" in row)
    assert normalised["reward/auc"] == found["reward/auc"]


@pytest.mark.parametrize("whole", ["dpo"], indirect=True)
def test_implicit_rewards_are_those_of_the_log_probs(whole: tuple[str, Path, Any], tmp_path: Path) -> None:
    _, run_dir, _ = whole
    now, then = (sides(model, tmp_path, "logprob_sum") for model in (str(run_dir / "model"), "tiny-xs"))
    margins = [
        0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
        for (chosen, rejected), (ref_chosen, ref_rejected) in zip(now, then, strict=True)
    ]
    found = last(run_dir)
    assert found["dpo/heldout_accuracy"] == sum(margin > 0 for margin in margins) / len(margins)
    assert found["dpo/heldout_margin_mean"] == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    loss = sum(math.log1p(math.exp(-margin)) for margin in margins) / len(margins)
    assert found["dpo/heldout_loss"] == pytest.approx(loss, rel=1e-5)
    assert measured(run_dir)[0]["dpo/heldout_loss"] == pytest.approx(math.log(2), rel=1e-7)


@pytest.mark.parametrize("whole", ["sft"], indirect=True)
def test_the_best_state_is_that_of_the_best_measurement(whole: tuple[str, Path, Any], tmp_path: Path) -> None:
    _, run_dir, _ = whole
    for name, pick in (("-sft/heldout_loss", min), ("sft/heldout_loss", max)):
        cfg = config("sft", tmp_path / pick.__name__, ParallelLayout(), keep_best=name)
        run("sft", cfg)
        every = measured(run_dir)
        found = {step: row["sft/heldout_loss"] for step, row in every.items() if step % 2 == 0 or step == max(every)}
        found.pop(0)  # before the first step, where no state is saved
        state = latest_state(cfg.states_dir)
        assert state is not None
        best = read_position(state).best
        assert best is not None
        assert (best.step, best.value) == (pick(found, key=found.__getitem__), pick(found.values()))


def in_parts(command: str, run_dir: str, rows: int) -> list[dict[str, float]]:
    """What is measured of the trained model with the usual number of sequences at once, and with so few."""
    cfg = config(command, Path(run_dir), ParallelLayout())
    trained = cfg.model_copy(update={"model": str(cfg.model_dir), "run_dir": Path(f"{run_dir}_unused")})
    mesh, inputs = start(cfg.layout, seed=1), OF[command].prepare(trained)
    cast = OF[command].models(trained, inputs, mesh)
    measure: dict[str, Any] = {
        "sft": lambda: sft.heldout_loss(cast.role, inputs.heldout),
        "reward": lambda: reward_measures.measure_pairs(cast.role, inputs.heldout_pairs),
        "dpo": lambda: dpo.measure(cast, inputs.heldout, trained),
    }
    found = [measure[command]()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reward_measures if command == "reward" else OF[command], "PART_ROWS", rows)
        return [*found, measure[command]()]


def test_rows_are_measured_in_parts(whole: tuple[str, Path, Any]) -> None:
    """13 rows in parts of 4: the last one is of a row, and counts as one."""
    command, run_dir, _ = whole
    ((at_once, part_by_part),) = run_ranks(in_parts, 1, command, str(run_dir), 4)
    assert part_by_part == pytest.approx(at_once, rel=1e-5, abs=1e-6)


def drawing(run_dir: str) -> tuple[bool, float]:
    """A measurement that draws random numbers; whether the next draw is that of a run without."""
    mesh = start(ParallelLayout(), seed=1)
    cfg = config("sft", Path(run_dir), mesh.layout)
    measuring = Measuring(cfg, 4, lambda: {"sft/heldout_loss": float(torch.rand(()))}, Clock(mesh.device), mesh)
    before = torch.get_rng_state()
    found = measuring.after(2)
    return torch.equal(torch.get_rng_state(), before), found["sft/heldout_loss"]


def test_random_numbers_stay_where_they_were(tmp_path: Path) -> None:
    ((unmoved, drawn),) = run_ranks(drawing, 1, str(tmp_path))
    assert unmoved
    assert 0 < drawn < 1


STILL = {"optim": {"lr": 1e-20, "schedule": "constant"}, "keep_best": "-sft/heldout_loss"}
"""Nothing moves, so that no measurement is better than the first one."""


@pytest.mark.parametrize("stops", [(None,), (2, None)], ids=["whole", "in pieces"])
def test_a_run_ends_when_it_no_longer_gets_better(stops: tuple[int | None, ...], tmp_path: Path) -> None:
    cfg = config("sft", tmp_path / "run", ParallelLayout(), patience=2, epochs=2.0, **STILL)
    _, said = run("sft", cfg, stops)
    rows = logged_lines(cfg.run_dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]  # of ten
    assert len({row["sft/heldout_loss"] for row in rows if "sft/heldout_loss" in row}) == 1
    assert (
        "ended after step 4 of 10 (patience=2, a larger one goes on): "
        "keep_best=-sft/heldout_loss was best before the first step" in said
    )
    assert f"{cfg.states_dir / 'best'}, the best that was saved, is after step 2, the model as it is now" in said
    state = latest_state(cfg.states_dir)
    assert state is not None
    assert state.name.endswith("4")
    assert (cfg.states_dir / "best").is_file()


def cut_short(cfg: Any) -> int:
    """The run ends itself and is killed before its model is saved; the steps that the next start takes."""
    mesh, taken = start(cfg.layout, seed=1), []
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()):
        patch.setattr(sft, "save_model", killed)
        with pytest.raises(StoppedError):
            sft.TRAINER.run(cfg, sft.prepare(cfg), ["sft"], mesh)
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()):
        patch.setattr(Run, "step_ended", lambda _self, done, _metrics: taken.append(done))
        sft.TRAINER.run(cfg, sft.prepare(cfg), ["sft"], mesh)
    return len(taken)


def killed(*_: Any) -> None:
    raise StoppedError


def test_one_that_had_ended_takes_no_step_more(tmp_path: Path) -> None:
    cfg = config("sft", tmp_path / "run", ParallelLayout(), patience=2, epochs=2.0, **STILL)
    assert run_ranks(cut_short, 1, cfg) == [0]
    assert logged_lines(cfg.run_dir)[-1]["step"] == 4
    assert (cfg.model_dir / "model.json").is_file()
    state = latest_state(cfg.states_dir)
    assert state is not None
    assert state.name == "step_00000004"


def test_a_run_that_gets_better_does_not_end(tmp_path: Path) -> None:
    cfg = config("sft", tmp_path / "run", ParallelLayout(), patience=1, keep_best="-sft/heldout_loss")
    _, said = run("sft", cfg)
    assert logged_lines(cfg.run_dir)[-1]["step"] == 5
    assert "patience" not in said


def test_weights_of_pairs_weigh() -> None:
    """A pair of weight 2 counts as two of them."""
    gap = torch.tensor([0.3, -1.2, 0.0, 2.5, 0.3], dtype=torch.float64)
    twice = calibration_error(torch.cat([gap, gap[1:2]]), torch.ones(6, dtype=torch.float64))
    assert calibration_error(gap, torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0]).double()) == pytest.approx(float(twice))
    assert float(twice) == pytest.approx(calibration([0.3, -1.2, 0.0, 2.5, 0.3, -1.2]))


def best_of(cfg: Any) -> tuple[int, str]:
    state = latest_state(cfg.states_dir)
    assert state is not None
    best = read_position(state).best
    assert best is not None
    return best.step, best.metric


def test_the_best_by_another_metric_or_on_other_data_is_chosen_anew(tmp_path: Path) -> None:
    """The training loss sinks to less than any held-out one: what was the best by it would stay so."""
    kept = {"keep_best": "-sft/loss", "epochs": 2.0}
    first = config("sft", tmp_path / "run", ParallelLayout(), **kept)
    run("sft", first)
    assert best_of(first)[1] == "-sft/loss"
    later = {**kept, "keep_best": "-sft/heldout_loss", "epochs": 3.0}
    other = config("sft", first.run_dir, ParallelLayout(), **later)
    run("sft", other)
    step, metric = best_of(other)
    assert metric == "-sft/heldout_loss"
    assert step > 10
    small = {**SETTINGS["sft"][1]["heldout"], "arithmetic": {"level": 1, "rows": 4, "seed": 9}}
    changed = config("sft", first.run_dir, ParallelLayout(), **{**later, "epochs": 4.0, "heldout": small})
    _, said = run("sft", changed)
    assert "goes on with other settings (" in said
    assert "heldout.arithmetic.rows" in said
    assert best_of(changed)[0] > 15


def test_what_was_measured_on_other_data_is_not_counted(tmp_path: Path) -> None:
    cfg = config("sft", tmp_path / "run", ParallelLayout(), patience=3, epochs=2.0, **STILL)
    run_ranks(begun, 1, "sft", 2, cfg)
    small = {**SETTINGS["sft"][1]["heldout"], "arithmetic": {"level": 1, "rows": 4, "seed": 9}}
    run("sft", config("sft", cfg.run_dir, ParallelLayout(), patience=3, epochs=2.0, **{**STILL, "heldout": small}))
    # Of the steps 4, 6, 8, 10 the first is the best, and the last the third that betters nothing.
    assert logged_lines(cfg.run_dir)[-1]["step"] == 10
