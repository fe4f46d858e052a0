"""A process reward model learns what a loop over steps says, and finds the first error; of one step it is `reward`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.batch.supervised import JudgedSteps, LabelledResponses, PreferencePairs
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.commands import evaluate_reward
from megarlhf.commands.evaluate_reward import EvalRewardConfig
from megarlhf.config import load_config
from megarlhf.data.arithmetic import ArithmeticConfig, labelled_rows
from megarlhf.data.judged_steps import StepData, load_steps
from megarlhf.data.steps import PARAGRAPH
from megarlhf.errors import ConfigError
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import SequenceScores, StepScores
from megarlhf.ops.calibration import calibration
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runs.measuring import PART_ROWS
from megarlhf.trainers import process_reward, reward
from megarlhf.trainers.process_reward import ProcessRewardConfig, step_batch, step_loss
from megarlhf.trainers.reward_measures import measure_steps
from tests.data.test_shapes import written
from tests.helpers.bytes_tokenizer import of_bytes
from tests.helpers.models import frozen, learner, name_of, ragged_rollout, score_model, settings, whole_weights
from tests.helpers.ranks import run_ranks
from tests.runs.test_resume import logged_lines

LAYOUTS = [ParallelLayout(), ParallelLayout(data=2), ParallelLayout(tensor=2)]
WEIGHTS = {"step_weight": 0.7, "pointwise_weight": 0.3}
SMALL = ("model=tiny-xs", "tokenizer=arithmetic", "save_every=0", "tensorboard=false", "optim.schedule=constant")


def drawn(seed: int = 1) -> dict[str, Any]:
    """Eight responses of judged steps, some of which have no label, four pairs and four judged responses."""
    generator = torch.Generator().manual_seed(seed)
    judged, pairs, points = (ragged_rollout(count, seed=seed + at) for at, count in enumerate((8, 8, 4)))
    last = torch.arange(judged.tokens.shape[1]) == judged.lengths[:, None] - 1
    inside = torch.arange(judged.tokens.shape[1]) < judged.lengths[:, None]
    ends = last | (inside & (torch.rand(inside.shape, generator=generator) < 0.3))
    labelled = ends & (torch.rand(ends.shape, generator=generator) < 0.7)
    labelled[0], labelled[1] = ends[0] & ~last[0], ends[1]  # the last step of one has no label
    labels = torch.rand(ends.shape, generator=generator).round(decimals=1) * labelled
    return {
        "steps": JudgedSteps(judged.tokens, judged.lengths, ends, labels, labelled.float()),
        "pairs": PreferencePairs(pairs.tokens, pairs.prompt_lengths, pairs.lengths, torch.tensor([1.0, 0.5, 2.0, 1.5])),
        "labelled": LabelledResponses(points.tokens, points.lengths, torch.tensor([1.0, 0.0, 0.3, 1.0]), torch.ones(4)),
    }


def configured(**changes: Any) -> ProcessRewardConfig:
    given = {"run_dir": "unused", "pairs": {}, "labelled": {}, **WEIGHTS, **changes}
    return ProcessRewardConfig.model_validate(given)


def taught(layout: ParallelLayout, directory: str, kinds: tuple[str, ...], touched: bool) -> dict[str, Any]:
    """One optimiser step on rows of the kinds. touched: with labels where none counts."""
    mesh = start(layout, seed=1)
    rows = {name: batch for name, batch in drawn().items() if name in kinds}
    if touched:
        labels = torch.where(rows["steps"].step_weight > 0, rows["steps"].step_labels, 1.0)
        rows["steps"] = replace(rows["steps"], step_labels=labels)
    cfg = configured(**{name: None for name in ("pairs", "labelled") if name not in kinds})
    role = learner(directory, StepScores(), settings(mesh, 2), mesh, OptimConfig(lr=1e-3, max_grad_norm=1e9))
    update = role.update(step_batch(rows, cfg), step_loss(role, cfg))
    return {
        "numbers": {"loss": update.means.loss, "norm": update.grad_norm, **update.means.metrics},
        "weights": whole_weights(role),
    }


def by_hand(model: Any, kinds: tuple[str, ...]) -> dict[str, float]:
    """The same as loops over texts and positions, through transformers, with numbers and lists."""
    model.zero_grad()
    rows = drawn()

    def scores(tokens: Tensor, length: Tensor) -> Tensor:
        hidden = model.model(input_ids=tokens[None, : int(length)]).last_hidden_state
        return model.score(hidden)[0, :, 0]

    losses, hits = [], []
    judged = rows["steps"]
    for index in range(len(judged)):
        said = scores(judged.tokens[index], judged.lengths[index])
        for position in range(int(judged.lengths[index])):
            if judged.step_weight[index, position] > 0:
                label = judged.step_labels[index, position]
                p = torch.sigmoid(said[position])
                losses.append(-(label * p.log() + (1 - label) * (1 - p).log()))
                hits.append(float((p >= 0.5) == (label >= 0.5)))
    total = WEIGHTS["step_weight"] * torch.stack(losses).mean()
    found = {
        "reward/step_loss": float(torch.stack(losses).detach().mean()),
        "reward/step_accuracy": sum(hits) / len(hits),
    }
    if "pairs" in kinds:
        pairs, loss = rows["pairs"], torch.zeros(())
        for index in range(len(pairs)):
            sides = [scores(pairs.tokens[at], pairs.lengths[at])[-1] for at in (2 * index, 2 * index + 1)]
            loss = loss - pairs.weight[index] * F.logsigmoid(sides[0] - sides[1])
        total = total + loss / pairs.weight.sum()
        found["reward/pairwise_loss"] = float((loss / pairs.weight.sum()).detach())
    if "labelled" in kinds:
        points, loss = rows["labelled"], torch.zeros(())
        for index in range(len(points)):
            last = scores(points.tokens[index], points.lengths[index])[-1]
            loss = loss + F.binary_cross_entropy_with_logits(last, points.correct[index]) / len(points)
        total = total + WEIGHTS["pointwise_weight"] * loss
        found["reward/pointwise_loss"] = float(loss.detach())
    total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return {"loss": float(total.detach()), "norm": float(norm), **found}


KINDS = [("steps",), ("steps", "pairs"), ("steps", "labelled"), ("steps", "pairs", "labelled")]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = tmp_path_factory.mktemp("judge")
    return str(folder), score_model(folder, seed=3)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_loss_and_gradient_are_those_of_a_loop_over_positions(
    kinds: tuple[str, ...], layout: ParallelLayout, judge: tuple[str, Any]
) -> None:
    """Each mean is over all labelled steps, or pairs, or responses, of the step, wherever the ranks have them."""
    expected = by_hand(judge[1], kinds)
    for rank in run_ranks(taught, layout.world_size, layout, judge[0], kinds, False):
        seen = {name: rank["numbers"][name] for name in expected}
        assert seen == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_what_has_no_label_has_no_influence(judge: tuple[str, Any]) -> None:
    one, other = (run_ranks(taught, 1, ParallelLayout(), judge[0], KINDS[-1], touched)[0] for touched in (False, True))
    assert one["numbers"] == other["numbers"]
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])


OF_ONE_STEP: dict[str, Any] = {"labelled": reward.TRAINER, "steps": process_reward.TRAINER}


def one_step(layout: ParallelLayout, where: str, name: str) -> dict[str, Tensor]:
    """The weights of what a trainer learns from the rows of its setting."""
    mesh, trainer = start(layout, seed=1), OF_ONE_STEP[name]
    shared = [*SMALL, "epochs=2", "micro_batch=2", "optim.lr=1e-3", "normalise=none", f"layout.data={layout.data}"]
    rows = [f"{name}.source={where}/{name}.jsonl", f"{name}.template=plain", f"{name}_batch=8"]
    cfg: Any = load_config(trainer.config, None, [*shared, *rows, f"run_dir={where}/{name}"])
    trainer.run(cfg, trainer.prepare(cfg), [], mesh)
    return whole_weights(frozen(str(cfg.model_dir), SequenceScores(), mesh))


def test_with_one_step_a_row_it_trains_as_reward_does(tmp_path: Path) -> None:
    """The outcome is a process of one step: the same losses and weights to the bit."""
    rows = labelled_rows(ArithmeticConfig(level=1, rows=24), "train")
    written(tmp_path / "labelled.jsonl", *rows)
    written(
        tmp_path / "steps.jsonl",
        *({"prompt": row["prompt"], "steps": [row["response"]], "labels": [row["correct"]]} for row in rows),
    )
    layout = ParallelLayout(data=2)
    outcome, process = (run_ranks(one_step, 2, layout, str(tmp_path), name)[0] for name in OF_ONE_STEP)
    assert all(torch.equal(process[name], weight) for name, weight in outcome.items())
    logged = [logged_lines(tmp_path / name) for name in OF_ONE_STEP]
    renamed = {"reward/pointwise_loss": "reward/step_loss", "reward/accuracy": "reward/step_accuracy"}
    measured_too = logged[0].pop()  # of whole responses, by which reward may normalise
    assert measured_too["step"] == len(logged[0]) == len(logged[1]) == 6
    for row, other in zip(*logged, strict=True):
        assert {renamed.get(name, name): value for name, value in row.items()} == other
    described = [describe_model(str(tmp_path / name / "model")) for name in ("labelled", "steps")]
    assert (described[0].step_separator, described[1].step_separator) == (None, PARAGRAPH)
    assert (described[1].score_offset, described[1].score_scale, described[1].score_wrong) == (0.0, 1.0, None)


BYTES = of_bytes()
HELD = [
    {"prompt": "a", "steps": ["b", "c", "d"], "labels": [1, 1, 1]},
    {"prompt": "b", "steps": ["b", "c", "d"], "labels": [1, 0, None]},
    {"prompt": "c", "steps": ["d", "e"], "labels": [None, 0]},  # it is not known whether the first is wrong
    {"prompt": "d", "steps": ["fg"], "labels": [0]},
    {"prompt": "e", "steps": ["h", "i"], "labels": [1, None]},  # nor whether there is an error
    {"prompt": "f", "steps": ["h", "i", "h"], "labels": [0.9, 0.8, 0.5]},
    {"prompt": "g", "steps": ["x", "y"], "labels": [0, None]},
]


def measured(layout: ParallelLayout, directory: str, source: str) -> tuple[dict[str, float], list[list[float]]]:
    """What is measured of rows, and the probabilities at the ends of their steps."""
    mesh = start(layout, seed=1)
    steps = load_steps(StepData(source=source, template="plain"), BYTES)
    role = frozen(directory, StepScores(), mesh)
    scores = role.score(steps.batch(torch.arange(len(steps))))
    said = [[float(scores[row, end - 1]) for end in ends] for row, ends in enumerate(steps.ends)]
    return measure_steps(role, steps), said


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=name_of)
def test_what_is_measured_is_what_a_loop_says(layout: ParallelLayout, tmp_path: Path) -> None:
    score_model(tmp_path / "judge", seed=6, vocab_size=272)
    source = written(tmp_path / "rows.jsonl", *HELD)
    found, said = run_ranks(measured, layout.world_size, layout, str(tmp_path / "judge"), source)[0]
    pairs = [
        (score, float(label))
        for row, scores in zip(HELD, said, strict=True)
        for score, label in zip(scores, row["labels"], strict=True)
        if label is not None
    ]
    scores, labels = (torch.tensor(each, dtype=torch.float64) for each in zip(*pairs, strict=True))
    error, correct = [], []
    for at, row in enumerate(HELD):
        first = next((i for i, score in enumerate(said[at]) if torch.tensor(score).sigmoid() < 0.5), -1)
        if at in (1, 3, 6):
            error.append(first == row["labels"].index(0))
        elif at in (0, 5):
            correct.append(first == -1)
    e, c = sum(error) / 3, sum(correct) / 2
    expected = {
        "reward/heldout_labelled_steps": 12.0,
        "reward/heldout_step_loss": float(F.binary_cross_entropy(scores.sigmoid(), labels)),
        "reward/heldout_step_accuracy": sum((s >= 0) == (label >= 0.5) for s, label in pairs) / 12,
        "reward/heldout_step_calibration_error": float(calibration(scores.sigmoid(), labels).error),
        "reward/heldout_wrong_solutions": 3.0,
        "reward/heldout_correct_solutions": 2.0,
        "reward/heldout_error_accuracy": e,
        "reward/heldout_correct_accuracy": c,
        "reward/heldout_first_error_f1": 2 * e * c / (e + c) if e + c else 0.0,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert e + c > 0
    assert found["reward/heldout_step_accuracy_stderr"] > 0
    assert len(HELD) < PART_ROWS


OPTIM = ("optim.lr=2e-3", "optim.schedule=cosine", "optim.warmup_steps=10", "optim.eps=1e-8")


def learnt(run_dir: str, *more: str) -> dict[str, float]:
    """Train on the built-in task, whose errors are planted: the last metrics."""
    task = [
        f"{name}.{setting}"
        for name, rows in (("steps", 6000), ("heldout_steps", 300))
        for setting in ("source=arithmetic", "template=plain", "arithmetic.level=1", f"arithmetic.rows={rows}")
    ]
    batch = ["steps_batch=64", "micro_batch=32"]
    words = [*SMALL[:-1], *task, *OPTIM, *batch, f"run_dir={run_dir}", *more]
    cfg: Any = load_config(ProcessRewardConfig, None, words)
    return process_reward.TRAINER.run(cfg, process_reward.prepare(cfg), [], start(cfg.layout, seed=1))


OTHERS = "{right: 0.5, drop_last_step: 0.3, wrong_operation: 0, guess: 0.2}"
OF_STEPS = tuple(f"{name}.arithmetic.mixture={OTHERS}" for name in ("steps", "heldout_steps"))


def test_it_finds_the_step_that_comes_too_early(tmp_path: Path) -> None:
    """An answer before the last operation, or at once, in 9 of 10 solutions, and hardly where there is none."""
    (found,) = run_ranks(learnt, 1, str(tmp_path), *OF_STEPS, "epochs=0.6")
    assert found["reward/heldout_error_accuracy"] > 0.9
    assert found["reward/heldout_correct_accuracy"] > 0.9
    assert found["reward/heldout_first_error_f1"] > 0.9
    assert found["reward/heldout_step_calibration_error"] < 0.1


@pytest.mark.slow  # a minute or two
def test_it_finds_wrong_operations_too(tmp_path: Path) -> None:
    (found,) = run_ranks(learnt, 1, str(tmp_path), "epochs=3")
    assert found["reward/heldout_error_accuracy"] > 0.9
    assert found["reward/heldout_first_error_f1"] > 0.9


OUTCOMES = ("pairs", "labelled", "heldout", "heldout_pairs")
OF_OUTCOMES = (
    *(f"{name}.{word}" for name in OUTCOMES for word in ("source=arithmetic", "template=plain", "arithmetic.level=1")),
    *(f"{name}.arithmetic.mixture={OTHERS}" for name in OUTCOMES),
    *("pairs.arithmetic.rows=1500", "labelled.arithmetic.rows=6000", "pairs_batch=16", "labelled_batch=64"),
    *("heldout.arithmetic.rows=600", "heldout_pairs.arithmetic.rows=300", "eval_every=1000", "micro_batch=16"),
)


def outcomes_learnt(run_dir: str) -> dict[str, float]:
    """The reward model of the same outcomes, after as many steps: its last metrics."""
    words = [*SMALL[:-1], *OPTIM, *OF_OUTCOMES, "epochs=0.6", f"run_dir={run_dir}"]
    cfg: Any = load_config(reward.RewardConfig, None, words)
    return reward.TRAINER.run(cfg, reward.prepare(cfg), [], start(cfg.layout, seed=1))


@pytest.mark.slow  # a minute or two
def test_one_model_of_steps_and_outcomes_is_no_worse_than_one_of_each(tmp_path: Path) -> None:
    """Beyond the 95 % interval of the difference."""
    (both,) = run_ranks(learnt, 1, str(tmp_path / "both"), *OF_STEPS, *OF_OUTCOMES, "epochs=0.6")
    (steps,) = run_ranks(learnt, 1, str(tmp_path / "steps"), *OF_STEPS, "epochs=0.6")
    (outcomes,) = run_ranks(outcomes_learnt, 1, str(tmp_path / "outcomes"))
    for name, other in (("reward/heldout_first_error_f1", steps), ("reward/auc", outcomes)):
        error = (both[f"{name}_stderr"] ** 2 + other[f"{name}_stderr"] ** 2) ** 0.5
        assert both[name] >= other[name] - 1.96 * error, f"{name}: {both[name]} and {other[name]}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("normalise=centre",), "normalise=centre measures the scores of whole responses, and there are none"),
        (("steps_batch=7",), "steps_batch=7 is odd; responses travel two by two"),
        (("steps_batch=128",), "steps_batch=128 is more than the 64 rows of steps"),
        (
            ("heldout_steps.arithmetic.rows=8", "heldout_steps.template=plain", "heldout_steps.separator=' '"),
            r"steps are joined differently: steps.separator='. ' and heldout_steps.separator=' '; set both alike",
        ),
        (("eval_every=2",), "eval_every=2: nothing is held out to measure; set heldout_steps.source"),
        (
            (
                *(
                    "heldout_steps.arithmetic.rows=8",
                    "heldout_steps.template=plain",
                    "keep_best=-reward/heldout_first_error_f1",
                ),
                *("heldout_steps.arithmetic.mixture={right: 1, drop_last_step: 0, wrong_operation: 0, guess: 0}",),
                *("eval_every=2", "save_every=2"),
            ),
            "first error is known 0 have one and 8 have none; hold out both kinds",
        ),
        (
            (
                *("heldout.arithmetic.rows=8", "heldout.template=plain", "keep_best=reward/auc", "eval_every=2"),
                *("heldout.arithmetic.mixture={right: 1, drop_last_step: 0, wrong_operation: 0, guess: 0}",),
                "save_every=2",
            ),
            "keep_best=reward/auc is not measured: of the 8 responses of heldout 8 are right; hold out both",
        ),
        (("micro_batch=3",), "steps_batch / 2 [+] pairs_batch [+] labelled_batch / 2"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = [*SMALL, "run_dir=run", "steps.arithmetic.rows=64", "steps_batch=8", "micro_batch=4", "steps.template=plain"]
    cfg = load_config(ProcessRewardConfig, None, [*base, *words])
    with pytest.raises(ConfigError, match=message):
        process_reward.prepare(cfg)


def test_the_command_that_is_named_next_measures_the_model(tmp_path: Path) -> None:
    """With a file in place of FILE nothing else is needed; `score` wants an output, and reads the last step alone."""
    score_model(tmp_path / "run" / "model", seed=6, vocab_size=272)
    BYTES.save(tmp_path / "run" / "model")
    cfg = configured(run_dir=tmp_path / "run", pairs=None, labelled=None)
    assert process_reward.TRAINER.following is not None
    (command,) = process_reward.TRAINER.following(cfg)
    program, *words = shlex.split(command.replace("FILE", written(tmp_path / "rows.jsonl", *HELD)))
    assert (program, words[:2]) == ("megarlhf", ["eval", "reward"])
    settings = load_config(EvalRewardConfig, None, words[2:])
    inputs = evaluate_reward.prepare(settings)
    assert inputs.steps is not None
    assert len(inputs.steps) == len(HELD)
