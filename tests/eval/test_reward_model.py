"""What `eval reward` measures: by hand, by brute force, and of a model as transformers has it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaForSequenceClassification

from megarlhf import cli
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.commands import evaluate_reward
from megarlhf.commands.evaluate_reward import EvalRewardConfig
from megarlhf.data.arithmetic import STEP_SEPARATOR, ArithmeticConfig, labelled_rows, step_rows, words
from megarlhf.data.judged_steps import StepData
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.eval.reward_model import OfSteps, Reading, of_judged, of_pairs, of_steps, read
from megarlhf.models.readings import StepScores
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runtime.checks import Model
from megarlhf.runtime.roles import frozen
from tests.helpers.models import score_model
from tests.helpers.ranks import run_ranks


def test_pairs_by_hand() -> None:
    """Three of five in order and one tie; of the two whose longer response is chosen, both."""
    chosen, rejected = torch.tensor([0.9, 0.8, 0.5, 0.4, 0.1]), torch.tensor([0.1, 0.2, 0.5, 0.6, 0.0])
    lengths = torch.tensor([[9, 5], [7, 6], [4, 4], [3, 8], [2, 5]])
    found = of_pairs(chosen, rejected, lengths, prompts=5)
    assert found.accuracy.mean == pytest.approx(3.5 / 5)
    assert found.accuracy.low < 0.7 < found.accuracy.high
    assert [(part.count, part.found) for part in found.by_length] == [(2, 0.5), (1, 0.5), (2, 1.0)]
    fewer = of_pairs(chosen, rejected, lengths, prompts=2)
    assert fewer.accuracy.low < found.accuracy.low


def test_judged_responses_by_brute_force() -> None:
    """The area is over all couples; the best of n over all choices of n responses to a prompt."""
    draws = torch.Generator().manual_seed(3)
    worth, right = torch.rand(24, generator=draws).round(decimals=1), torch.rand(24, generator=draws).round()
    lengths, prompts = torch.randint(3, 40, (24,), generator=draws), [row // 6 for row in range(24)]
    found = of_judged(worth, right, lengths, prompts)
    rights, wrongs = worth[right > 0.5].tolist(), worth[right < 0.5].tolist()
    couples = [0.5 if a == b else float(a > b) for a in rights for b in wrongs]
    assert found.auc.mean == pytest.approx(sum(couples) / len(couples))
    assert found.accuracy.mean == pytest.approx(float(((worth >= 0.5) == (right > 0.5)).double().mean()))
    assert sum(part.count for part in found.by_length) == 24
    assert list(found.best_of) == [1, 4]
    by_prompt = []
    for prompt in range(4):
        rows = range(6 * prompt, 6 * prompt + 6)
        values = []
        for chosen in itertools.combinations(rows, 4):
            best = [row for row in chosen if worth[row] == max(worth[list(chosen)])]
            values.append(sum(float(right[row]) for row in best) / len(best))
        by_prompt.append(sum(values) / len(values))
    assert found.best_of[4].mean == pytest.approx(sum(by_prompt) / 4)
    assert found.best_of[1].mean == pytest.approx(float(right.mean()))


def test_first_errors_by_hand() -> None:
    """Of three wrong solutions one is found, of two right ones one passes: F1 is 2/5; unlabelled steps do not count."""
    p = torch.tensor([[0.9, 0.2, 0.9], [0.3, 0.1, 0.0], [0.9, 0.9, 0.0], [0.8, 0.7, 0.6], [0.9, 0.4, 0.9]])
    ends = torch.tensor([[True] * 3, [True, True, False], [True, True, False], [True] * 3, [True] * 3])
    labels = [[1, 0, None], [1, 0], [1, 0], [1, 1, 1], [1, 1, 1]]
    found = of_steps(Reading(p.double().logit(), ends), labels)
    assert (found.wrong, found.right, found.steps) == (3, 2, 12)
    assert found.wrong_found.mean == pytest.approx(1 / 3)
    assert found.right_passed.mean == pytest.approx(1 / 2)
    assert found.f1.mean == pytest.approx(2 / 5)
    assert found.f1.low < 0.4 < found.f1.high
    # 12 labelled steps, of which the first of the second, the second of the third and one of the last are miscalled.
    assert found.accuracy.mean == pytest.approx(9 / 12)


def of(p: Sequence[Sequence[float]], labels: Sequence[Sequence[float | None]]) -> OfSteps:
    values = torch.tensor(p, dtype=torch.float64)
    return of_steps(Reading(values.logit(), torch.ones_like(values, dtype=torch.bool)), labels)


def test_a_solution_counts_where_its_first_error_is_known() -> None:
    """Of a right beginning nobody knows whether the solution is right; nor, before a wrong step, of one unlabelled."""
    known = of([[0.9, 0.2], [0.9, 0.8]], [[1, 0], [1, 1]])
    more = of(
        [[0.9, 0.2], [0.9, 0.8], [0.9, 0.2], [0.2, 0.2], [0.2, 0.9]], [[1, 0], [1, 1], [1, None], [None, 0], [0, None]]
    )
    assert (known.wrong, known.right, known.steps, known.f1.mean) == (1, 1, 4, 1.0)
    assert (more.wrong, more.right, more.steps) == (2, 1, 7)
    assert (more.wrong_found.mean, more.right_passed.mean, more.f1.mean, more.accuracy.mean) == (1.0, 1.0, 1.0, 1.0)


def test_what_is_always_found_is_not_certain() -> None:
    """Ten of ten say less than all of thousands do: of F1 as of the shares, about 0.8 and 0.85 at the least."""
    few = of([[0.9, 0.2], [0.9, 0.8]] * 10, [[1, 0], [1, 1]] * 10)
    assert few.wrong_found.low == pytest.approx(10 / (10 + 1.96**2), abs=1e-3)
    one = 2 * few.wrong_found.low / (few.wrong_found.low + 1)
    assert few.f1 == pytest.approx((1.0, 1 - 2**0.5 * (1 - one), 1.0))
    assert few.accuracy.low < 0.9
    many = of([[0.9, 0.2], [0.9, 0.8]] * 1000, [[1, 0], [1, 1]] * 1000)
    assert many.f1.low > 0.99


def test_the_interval_of_f1_is_two_standard_errors_where_there_are_many() -> None:
    found = of([[0.9, 0.2]] * 300 + [[0.9, 0.8]] * 400 + [[0.2, 0.2]] * 200, [[1, 0]] * 400 + [[1, 1]] * 500)
    assert (found.wrong, found.right, found.wrong_found.mean, found.right_passed.mean) == (400, 500, 0.75, 0.6)
    assert found.f1.mean == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert (found.f1.high - found.f1.low) / 2 == pytest.approx(1.96 * found.f1_error, rel=0.01)


def test_without_wrong_solutions_or_without_right_ones_there_is_no_f1() -> None:
    """Not one of 0: nothing was missed."""
    right, wrong = of([[0.9, 0.8]], [[1, 1]]), of([[0.9, 0.2]], [[1, 0]])
    assert (right.right_passed.mean, wrong.wrong_found.mean) == (1.0, 1.0)
    for nothing in (right.wrong_found, right.f1, wrong.right_passed, wrong.f1):
        assert all(math.isnan(value) for value in nothing)


def test_a_half_is_right_wherever_steps_are_called_right_or_wrong() -> None:
    """As where the first error is: of a label, and of a probability."""
    halves = of([[0.5, 0.9], [0.9, 0.4]], [[1, 0.5], [0.5, 0]])
    assert (halves.wrong, halves.right, halves.f1.mean, halves.accuracy.mean) == (1, 1, 1.0, 1.0)
    assert of([[0.4, 0.9], [0.9, 0.5]], [[1, 0.5], [0.5, 0]]).accuracy.mean == 0.5


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of Hugging Face, with normalised scores, that is said to judge steps."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    score_model(folder, seed=2, vocab_size=161, max_position_embeddings=128)
    described = json.loads((folder / "config.json").read_text())
    told = {"score_offset": 0.25, "score_scale": 2.0, "step_separator": STEP_SEPARATOR, "template": "plain"}
    (folder / "config.json").write_text(json.dumps({**described, "megarlhf": told}))
    build_tiny_tokenizer(words()).save(folder)
    return folder


def texts() -> tuple[list[list[int]], list[list[int]]]:
    """Rows of steps, and where those end."""
    tokenizer, rows = build_tiny_tokenizer(words()), step_rows(ArithmeticConfig(rows=21), "train")
    tokens = [
        [*tokenizer.encode_prompt(row["prompt"], "plain"), *tokenizer.encode_response(". ".join(row["steps"]))]
        for row in rows
    ]
    stop = tokenizer.encode(".")[0]
    places = [len(tokenizer.encode_prompt(row["prompt"], "plain")) for row in rows]
    ends = [
        [at for at in range(start, len(ids) - 2) if ids[at] == stop] + [len(ids) - 1]
        for ids, start in zip(tokens, places, strict=True)
    ]
    return tokens, ends


def reading(layout: ParallelLayout, folder: Path) -> Reading:
    cfg = EvalRewardConfig.model_validate({"model": str(folder), "layout": layout})
    mesh = start(layout, seed=1)
    role = frozen("model", Model("model", str(folder), describe_model(str(folder))), StepScores(), cfg, mesh)
    return read(role, *texts(), "steps")


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tensor=2), ParallelLayout(data=2)], ids=str)
def test_steps_are_worth_what_transformers_reads_at_their_ends(layout: ParallelLayout, judge: Path) -> None:
    """Before normalisation, row by row, whatever the order in which they are read."""
    model: Any = LlamaForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    for found in run_ranks(reading, layout.world_size, layout, judge):
        for row, (ids, ends) in enumerate(zip(*texts(), strict=True)):
            with torch.no_grad():
                hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
                expected = model.score(hidden)[0, ends, 0].double()
            assert found.ends[row].sum() == len(ends)
            torch.testing.assert_close(found.values[row, : len(ends)], expected, atol=2e-5, rtol=0)


def measured(folder: Path, output: Path, changes: dict[str, Any]) -> None:
    small = {"source": "arithmetic", "arithmetic": {"rows": 30}}
    given = {"model": str(folder), "output": output, "pairs": small, "labelled": small, "steps": small}
    cfg = EvalRewardConfig.model_validate({**given, **changes})
    evaluate_reward.run(cfg, evaluate_reward.prepare(cfg), start(cfg.layout, seed=cfg.seed))


def test_a_model_of_steps_is_measured_by_every_way_and_any_other_by_its_last(judge: Path, tmp_path: Path) -> None:
    """And the same model, said to judge outcomes, is what it was by its last step."""
    run_ranks(measured, 1, judge, tmp_path / "steps.json", {})
    found = json.loads((tmp_path / "steps.json").read_text())
    assert list(found["pairs"]) == list(found["labelled"]) == ["min", "product", "mean", "last"]
    assert found["steps"]["f1"].keys() == {"mean", "low", "high"}
    rows = labelled_rows(ArithmeticConfig(rows=30), "heldout")
    best = found["labelled"]["min"]["best_of"]
    assert best == {"1": best["1"]}
    assert best["1"]["mean"] == pytest.approx(sum(row["correct"] for row in rows) / 30)
    described = json.loads((judge / "config.json").read_text())
    del described["megarlhf"]["step_separator"]
    outcome = tmp_path / "outcome"
    outcome.mkdir()
    for file in judge.iterdir():
        (outcome / file.name).write_bytes(file.read_bytes())
    (outcome / "config.json").write_text(json.dumps(described))
    run_ranks(measured, 1, outcome, tmp_path / "outcome.json", {"steps": None})
    alone = json.loads((tmp_path / "outcome.json").read_text())
    assert list(alone["pairs"]) == ["last"]
    assert alone["pairs"]["last"]["accuracy"] == pytest.approx(found["pairs"]["last"]["accuracy"])
    assert alone["labelled"]["last"]["auc"] == pytest.approx(found["labelled"]["last"]["auc"])
    assert alone["steps"] is None


def chosen(folder: Path, **settings: Any) -> str:
    """What joins the judged steps that are measured on."""
    inputs = evaluate_reward.prepare(EvalRewardConfig.model_validate({"model": str(folder), **settings}))
    data = inputs.data["steps"]
    assert isinstance(data, StepData)
    assert inputs.steps is not None
    return data.joint


def test_judged_steps_are_joined_as_the_model_was_taught_unless_a_setting_says_otherwise(
    judge: Path, tmp_path: Path
) -> None:
    """Else it is asked at tokens that ended no step when it learnt."""
    source = tmp_path / "steps.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in step_rows(ArithmeticConfig(rows=3), "train")))
    steps = {"source": str(source)}
    assert chosen(judge, steps=steps) == STEP_SEPARATOR
    assert chosen(judge, steps=steps, separator=" + ") == " + "
    assert chosen(judge, steps={**steps, "separator": " - "}, separator=" + ") == " - "
    with pytest.raises(ValidationError, match="at least 1 character"):
        EvalRewardConfig.model_validate({"model": str(judge), "separator": ""})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model=tiny-xs tokenizer=arithmetic", "nothing to measure on: pairs, labelled and steps are unset"),
        ("model=nowhere pairs.source=arithmetic", "model 'nowhere' is neither a directory nor a preset"),
        ("model=tiny-xs pairs.source=arithmetic", "is a language model, whose scores would be noise; train a reward"),
        ("model=tiny-xs pairs.source=arithmetic output=there.json", "output=there.json exists; choose another file"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("mine")
    assert cli.main(["eval", "reward", *words.split()]) == 2
    assert said in capfd.readouterr().err
