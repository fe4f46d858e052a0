"""`megarlhf label_steps`: labels are what an engine that shares nothing draws; it goes on where it stopped."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf import cli
from megarlhf.batch.rollouts import Prompts
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.commands import label_steps
from megarlhf.commands.label_steps import LabelStepsConfig, prepare
from megarlhf.data.rows import DataConfig
from megarlhf.data.texts import response_texts
from megarlhf.errors import DataError
from megarlhf.eval.step_labels import Beginning, Beginnings
from megarlhf.judges.verifiers import verify
from megarlhf.models.readings import LabelLogprobs
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.runtime.checks import Model
from megarlhf.runtime.roles import frozen
from tests.helpers.ranks import run_ranks

PART = 4
COMPLETIONS = 24
ROWS = 14
GIVEN: dict[str, Any] = {
    "model": "tiny-xs",
    "tokenizer": "arithmetic",
    "completions": COMPLETIONS,
    # Their last number is what counts: right where it is the answer already, and no other is drawn after it.
    "verifier": "gsm8k",
    "solutions": {"source": "arithmetic", "template": "plain", "arithmetic": {"rows": ROWS, "level": 1}},
    "sampling": {"temperature": 1.0, "max_new_tokens": 1},
}


def labelled(layout: ParallelLayout, output: Path, changes: dict[str, Any]) -> str:
    """Run the command on this rank with parts of a few rows; what it said."""
    cfg = LabelStepsConfig.model_validate({**GIVEN, "layout": layout, "output": output, **changes})
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        patch.setattr(label_steps, "PART", PART)
        label_steps.run(cfg, label_steps.prepare(cfg), start(cfg.layout, seed=cfg.seed))
    return said.getvalue()


def run(layout: ParallelLayout, output: Path, **changes: Any) -> str:
    return run_ranks(labelled, layout.world_size, layout, output, changes)[0]


def by_hand(output: Path) -> list[list[float]]:
    """The same labels from completions that are drawn one by one, each prefilled in full, and judged as one text."""
    cfg = LabelStepsConfig.model_validate({**GIVEN, "output": output})
    inputs = label_steps.prepare(cfg)
    mesh = start(cfg.layout, seed=cfg.seed)
    policy = frozen("model", Model("model", cfg.model, describe_model(cfg.model)), LabelLogprobs(1.0), cfg, mesh)
    engine = RolloutEngine.of(policy, inputs.tokenizer, 96, cfg.rollout)
    labels = []
    for place, solution in enumerate(inputs.solutions.solutions):
        row, of = [], Beginnings.among(inputs.solutions, [place])
        for tokens in solution.beginnings():
            names = dict(zip(of.of, of.prompts.ids.tolist(), strict=True))
            text, name = torch.tensor([tokens]), names[Beginning(tokens, solution.answer)]
            prompt = Prompts(text, torch.tensor([len(tokens)]), torch.tensor([name]), ("",))
            drawn = engine.generate(prompt, cfg.sampling, seed=cfg.seed, group_size=COMPLETIONS)
            before = inputs.tokenizer.decode(tokens[len(solution.prompt) :])
            said = [f"{before} {after}" for after in response_texts(drawn, inputs.tokenizer)]
            row.append(sum(verify(each, solution.answer, "gsm8k") is True for each in said) / COMPLETIONS)
        whole = ". ".join(solution.steps)
        labels.append([*row, float(verify(whole, solution.answer, "gsm8k") is True)])
    return labels


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(data=2)], ids=["alone", "data2"])
def test_labels_are_shares_and_an_interrupted_output_becomes_the_whole_one(
    layout: ParallelLayout, tmp_path: Path
) -> None:
    """By completions drawn apart, without anything shared; and cut inside the first row, between parts, inside one."""
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    said = run(layout, whole)
    assert "cost: 24 completions of each, about " in said
    lines = whole.read_bytes().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert len(rows) == ROWS
    assert [row["labels"] for row in rows] == run_ranks(by_hand, 1, tmp_path / "none.jsonl")[0]
    assert len({label for row in rows for label in row["labels"]}) > 3
    for row in rows:
        assert len(row["steps"]) == len(row["labels"]) == len(row["hard_labels"])
        assert ". ".join(row["steps"]) == row["response"]
        for soft, hard in zip(row["labels"], row["hard_labels"], strict=True):
            assert hard == float(soft > 0) >= soft
    torn.with_name("torn.jsonl.settings.json").write_bytes(whole.with_name("whole.jsonl.settings.json").read_bytes())
    for kept, cut in ((0, 1), (PART, 0), (7, 9), (ROWS, 0)):
        torn.write_bytes(b"".join(lines[:kept]) + (lines[kept][:cut] if cut else b""))
        run(layout, torn)
        assert torn.read_bytes() == whole.read_bytes()


def test_steps_that_are_given_are_taken_as_they_are(tmp_path: Path) -> None:
    """Also where they hold the separator; and rows of one step need no completion."""
    row = {"prompt": "Tom has 5 apples.", "answer": "8", "note": 1}
    rows = [{**row, "steps": ["5 + 3 = 8. 8", "The answer is 8."]}, {**row, "steps": ["The answer is 8."]}]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(each) + "\n" for each in rows))
    run(
        ParallelLayout(), tmp_path / "out.jsonl", solutions={"source": str(source), "template": "plain"}, separator=". "
    )
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{name: each[name] for name in rows[0]} for each in found] == rows
    assert [len(each["labels"]) for each in found] == [2, 1]
    assert [each["labels"][-1] for each in found] == [1.0, 1.0]
    source.write_text(json.dumps(rows[1]) + "\n")
    said = run(
        ParallelLayout(), tmp_path / "one.jsonl", solutions={"source": str(source), "template": "plain"}, separator=". "
    )
    assert "cost: no solution has more than one step" in said


def test_a_separator_that_parts_nothing_is_refused(tmp_path: Path) -> None:
    """Every solution would be one step, and what was labelled an outcome; the remedy that is named works."""
    row = {"prompt": "Tom has 5 apples.", "answer": "8", "response": "5 + 3 = 8. The answer is 8."}
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(row) + "\n")
    cfg = {**GIVEN, "output": tmp_path / "out.jsonl"}
    solutions = DataConfig(source=str(source), template="plain")
    with pytest.raises(DataError, match=r"'\\n\\n' is in none of the 1 responses of .*rows.jsonl.*separator='\"\. \"'"):
        prepare(LabelStepsConfig.model_validate({**cfg, "solutions": solutions}))
    parted = LabelStepsConfig.model_validate({**cfg, "solutions": solutions, "separator": ". "})
    assert prepare(parted).solutions.solutions[0].steps == ["5 + 3 = 8", "The answer is 8."]


REFUSED = {
    "no verifier": ("verifier=auto", "there is none by default for data of your own, here solutions.source=rows.jsonl"),
    "greedy": ("sampling.temperature=0", "sampling.temperature=0 with completions=8: they would all be the same"),
    "a list of another kind": (
        '{"steps": "a"}',
        "rows.jsonl, row 1, column 'steps': 'a' is not a list of at least one",
    ),
    "a blank step": ('{"steps": ["a", " "]}', "row 1, column 'steps': number 2 is empty"),
    "no answer": ('{"answer": null}', "rows.jsonl, row 1: no answer to check against"),
    "labels already": ('{"labels": [1]}', "row 1, column 'labels': the output adds a field of this name"),
    "neither steps nor response": ('{"steps": null}', "row 1, column 'response': missing"),
    "no room": ("sampling.max_new_tokens=4000", "sampling.max_new_tokens=4000 after prompts of up to"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_labelled_is_refused_before_a_model_is_built(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    change, message = REFUSED[case]
    row = {"prompt": "Tom has 5 apples.", "steps": ["5 + 3 = 8", "The answer is 8."], "answer": "8"}
    changed = json.loads(change) if change.startswith("{") else {}
    Path("rows.jsonl").write_text(json.dumps({**row, **changed}) + "\n")
    words = [] if changed else [change]
    given = ["model=tiny-xs", "tokenizer=arithmetic", "solutions.source=rows.jsonl", "output=out.jsonl"]
    assert cli.main(["label_steps", *given, 'separator=". "', "verifier=gsm8k", *words]) == 2
    assert message in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
