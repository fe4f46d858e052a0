"""`megarlhf score` says what transformers says in every layout, keeps what it is given, goes on where it stopped."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megarlhf import cli
from megarlhf.checkpoint.model_directory import Card, load_model, save_model
from megarlhf.commands import score
from megarlhf.commands.score import ScoreConfig
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer, load_tokenizer
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runtime import command as runtime_command
from tests.helpers.models import language_model, name_of, score_model, settings
from tests.helpers.ranks import run_ranks
from tests.helpers.refusal import assert_matches
from tests.test_cli_runs import megarlhf

CLOSE = 2e-5
"""fp32 through four layers, as in tests/models/test_transformers_agree.py."""
OFFSET, SCALE = 0.25, 2.0
"""What the reward model's directory says of its scores."""
PART = 3
"""Rows of a data rank in a part: 13 rows are parts of 3, 3, 3, 3, 1, or of 6, 6, 1 on two data ranks."""
ASK = {"role": "user", "content": "How many apples does Tom have?"}
ROWS: list[dict[str, Any]] = [
    {"prompt": "Tom has 5 apples.", "response": "The answer is 5.", "messages": None, "share": 0.1, "note": "naïve ✓"},
    {"tokens": [5, 90, 17, 44, 3], "nested": {"b": [1, None, True], "a": 1e-7}},
    {"messages": [ASK, {"role": "assistant", "content": " The answer is 3. "}]},
    {"tokens": [9, 8]},
    {"prompt": [{"role": "system", "content": "Tom has 5."}, ASK], "response": "5", "score_by_hand": 1},
    {"response": "5 + 3 = 8. 8 - 2 = 6. The answer is 6.", "prompt": "Tom has 5 apples. Tom buys 3. Tom loses 2."},
    {"prompt": None, "response": None, "messages": None, "tokens": list(range(1, 60))},
    {"prompt": "Ann has 9 books.", "messages": [ASK, {"role": "assistant", "content": "9"}], "tokens": 12},
    {"prompt": "Ann has 9 books.", "response": "9", "tokens": 3, "logprob": -0.5, "terminated": True},
    *({"tokens": [11 + 7 * i, 30, 20 + i] * (1 + i), "half": "\ud83d"} for i in range(4)),
]
LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2),
    ParallelLayout(tensor=2, sequence_parallel=True),
    ParallelLayout(pipeline=2),
    ParallelLayout(pipeline=2, virtual_pipeline=2),
    ParallelLayout(data=2),
]


@dataclass(frozen=True)
class Oracle:
    """A language model, a reward model, rows, and what transformers says of them."""

    folder: Path
    logprobs: Callable[[float], list[list[float]]]
    """At a temperature, of every row."""
    scores: list[float]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("score")
    shape = {"vocab_size": 161, "max_position_embeddings": 128}  # 161 is odd: two tensor ranks pad it
    speaker, judge = language_model(folder / "speaker", seed=1, **shape), score_model(folder / "judge", seed=2, **shape)
    described = json.loads((folder / "judge" / "config.json").read_text())
    normalisation = {"megarlhf": {"score_offset": OFFSET, "score_scale": SCALE}}
    (folder / "judge" / "config.json").write_text(json.dumps({**described, **normalisation}))
    for name in ("speaker", "judge"):
        build_tiny_tokenizer(words()).save(folder / name)
    write(folder / "rows.jsonl", ROWS)
    texts = [encode(row, AutoTokenizer.from_pretrained(folder / "speaker")) for row in ROWS]

    def logprobs(temperature: float) -> list[list[float]]:
        found = []
        for ids, first in texts:
            logits = speaker(input_ids=torch.tensor([ids]), use_cache=False).logits[0, first - 1 : -1]
            labels = torch.tensor(ids[first:])[:, None]
            found.append((logits / temperature).log_softmax(-1).gather(-1, labels)[:, 0].tolist())
        return found

    with torch.no_grad():
        raw = [float(judge(input_ids=torch.tensor([ids]), use_cache=False).logits[0, 0]) for ids, _ in texts]
        by_temperature = {temperature: logprobs(temperature) for temperature in (0.7, 1.0)}
    return Oracle(folder, by_temperature.__getitem__, [(value - OFFSET) / SCALE for value in raw])


def encode(row: dict[str, Any], tokenizer: Any) -> tuple[list[int], int]:
    """Ids of a row by transformers' chat template, and the place of the first that is predicted."""
    if row.get("messages") is None and row.get("response") is None:
        return row["tokens"], 1
    turns = row.get("messages")
    if turns is None:
        prompt = row["prompt"]
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        turns = [*before, {"role": "assistant", "content": row["response"]}]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    before = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(before)
    ids, prompt_ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (whole, before))
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == "<|eot_id|>"
    return ids, len(prompt_ids)


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def scored(layout: ParallelLayout, folder: Path, model: str, output: Path, changes: dict[str, Any]) -> str:
    """Run the command on this rank with parts of a few rows; return what it said."""
    given = {"layout": layout, "model": str(folder / model), "input": folder / "rows.jsonl", "output": output}
    cfg = ScoreConfig.model_validate({"micro_batch": 2, **given, **changes})
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        patch.setattr(score, "PART_ROWS", PART)
        inputs = score.prepare(cfg)
        score.run(cfg, inputs, start(cfg.layout, seed=cfg.seed))
    return said.getvalue()


def run(layout: ParallelLayout, folder: Path, model: str, output: Path, **changes: Any) -> str:
    """Score on the ranks of `layout`; return what rank 0 said."""
    return run_ranks(scored, layout.world_size, layout, folder, model, output, changes)[0]


def without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_every_layout_says_what_transformers_says(layout: ParallelLayout, oracle: Oracle, tmp_path: Path) -> None:
    run(layout, oracle.folder, "speaker", tmp_path / "spoken.jsonl", sampling={"temperature": 0.7})
    rows = read(tmp_path / "spoken.jsonl")
    assert [without(row, "logprobs", "logprob_sum") for row in rows] == ROWS
    for row, expected in zip(rows, oracle.logprobs(0.7), strict=True):
        assert row["logprobs"] == pytest.approx(expected, abs=CLOSE)
        assert row["logprob_sum"] == pytest.approx(math.fsum(row["logprobs"]), abs=1e-12)
    run(layout, oracle.folder, "judge", tmp_path / "judged.jsonl")
    rows = read(tmp_path / "judged.jsonl")
    assert [without(row, "score") for row in rows] == ROWS
    assert [row["score"] for row in rows] == pytest.approx(oracle.scores, abs=CLOSE)


def test_fewer_rows_than_data_ranks(oracle: Oracle, tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", ROWS[:1])
    run(ParallelLayout(data=2), oracle.folder, "speaker", tmp_path / "out.jsonl", input=tmp_path / "one.jsonl")
    (row,) = read(tmp_path / "out.jsonl")
    assert row["logprobs"] == pytest.approx(oracle.logprobs(1.0)[0], abs=CLOSE)


def save(source: str, target: str) -> None:
    mesh = start(ParallelLayout(), seed=1)
    spec = score.checked_model(source, mesh.layout, "model").spec
    role = FrozenRole("model", spec, "language", LabelLogprobs(1.0), settings(mesh), mesh)
    load_model(role, source, seed=1)
    save_model(role, Path(target), Card(load_tokenizer(Path(source))))


def test_a_megarlhf_directory_says_the_same(oracle: Oracle, tmp_path: Path) -> None:
    run_ranks(save, 1, str(oracle.folder / "speaker"), str(tmp_path / "saved"))
    (tmp_path / "rows.jsonl").write_bytes((oracle.folder / "rows.jsonl").read_bytes())
    for folder, model, name in ((oracle.folder, "speaker", "first"), (tmp_path, "saved", "second")):
        run(ParallelLayout(), folder, model, tmp_path / f"{name}.jsonl")
    assert (tmp_path / "first.jsonl").read_bytes() == (tmp_path / "second.jsonl").read_bytes()


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(data=2)], ids=name_of)
def test_an_interrupted_output_becomes_the_whole_one(layout: ParallelLayout, oracle: Oracle, tmp_path: Path) -> None:
    """Cut inside the first row, between parts, inside one, inside the last row, and before its line break."""
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    run(layout, oracle.folder, "speaker", whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(ROWS)
    torn.with_name("torn.jsonl.settings.json").write_bytes(whole.with_name("whole.jsonl.settings.json").read_bytes())
    for kept, cut in ((0, 1), (6, 0), (7, 9), (12, 30), (12, len(lines[12]) - 1)):
        torn.write_bytes(b"".join(lines[:kept]) + lines[kept][:cut])
        said = run(layout, oracle.folder, "speaker", torn)
        assert torn.read_bytes() == whole.read_bytes()
        assert (f"{kept} of 13 rows are there, {13 - kept} left to do" in said) == (kept > 0)
    # What is there is not scored again, and nothing is done when all of it is.
    spoilt = {**json.loads(lines[0]), "logprob_sum": 99.0}
    torn.write_bytes(json.dumps(spoilt).encode() + b"\n" + b"".join(lines[1:5]))
    run(layout, oracle.folder, "speaker", torn)
    assert read(torn)[0]["logprob_sum"] == 99.0
    assert torn.read_bytes().splitlines()[1:] == whole.read_bytes().splitlines()[1:]
    before = torn.stat().st_mtime_ns
    said = run(layout, oracle.folder, "speaker", torn)
    assert said.strip() == f"{torn}: 13 of 13 rows are there, nothing is left to do"
    assert torn.stat().st_mtime_ns == before


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Score rows.jsonl, which must be refused before a mesh is made or a model built; return the line that was said."""

    def started(*_args: object, **_options: object) -> None:
        raise AssertionError("no check had found fault")

    monkeypatch.setattr(runtime_command, "start", started)
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)

    def refused(*overrides: str) -> str:
        given = ("model=tiny-xs", "tokenizer=arithmetic", "input=rows.jsonl", "output=out.jsonl")
        before = sorted(tmp_path.rglob("*"))
        assert cli.main(["score", *given, *overrides]) == 2
        said = capfd.readouterr()
        assert said.out == ""
        assert said.err.count("\n") == 1, said.err
        assert sorted(tmp_path.rglob("*")) == before, "a refused run has left files"
        return said.err

    return refused


GOOD = {"prompt": "Tom has 5 apples.", "response": "The answer is 5."}
ROW_2 = "bad row: rows.jsonl, row 2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", ", character 2: not JSON .*; every line must be one object"),
        ("", ", character 1: not JSON .*; every line must be one object"),
        ("[1, 2]", ": [1, 2]; every line must be one JSON object"),
        (
            {"text": "5"},
            ", column 'response': missing; the row has ['text'], it needs prompt and response, messages, or",
        ),
        ({"prompt": "5"}, ", column 'response': missing; the row has ['prompt'], it needs prompt and response, "),
        ({"response": "5"}, ", column 'prompt': missing; the row has ['response'], it needs text there"),
        ({**GOOD, "response": 5}, ", column 'response': 5 is not text; put it in quotes"),
        ({**GOOD, "response": " "}, ", column 'response': empty; write some text or remove the row"),
        ({**GOOD, "response": "Zed"}, ", column 'response': words outside the vocabulary .* 'Zed'; use a tokenizer"),
        ({"messages": [ASK]}, ", column 'messages': the conversation must end with the assistant, after at least one"),
        ({"messages": "5"}, ", column 'messages': '5' is not a conversation; give [{role, content}, ...]"),
        ({"tokens": []}, ", column 'tokens': a row needs a token to read and one to predict, it has 0 and 0; lengthen"),
        (
            {"tokens": [7]},
            ", column 'tokens': a row needs a token to read and one to predict, it has 1 and 0; lengthen",
        ),
        ({"tokens": 7}, ", column 'tokens': int is not a list; write token ids as [1, 2, ...]"),
        ({"tokens": [7, "8"]}, ", column 'tokens': '8' is not a token id; write whole numbers without quotes"),
        ({"tokens": [7, True]}, ", column 'tokens': True is not a token id; write whole numbers"),
        ({"tokens": [7, 8.0]}, ", column 'tokens': 8.0 is not a token id; write whole numbers"),
        ({"tokens": [7, 160]}, ", column 'tokens': the model has no token 160; use ids of 0 to 159"),
        ({"tokens": [-1, 7]}, ", column 'tokens': the model has no token -1; use ids of 0 to 159"),
        ({"tokens": [7] * 257}, ", column 'tokens': 257 tokens, but the model's context is 256; shorten the row"),
        ({**GOOD, "response": "5 " * 600}, ", column 'response': .* tokens, but the model's context is 256; shorten"),
        ({**GOOD, "logprobs": None}, ", column 'logprobs': the output adds a field of this name; rename or remove"),
        ({**GOOD, "logprob_sum": 1}, ", column 'logprob_sum': the output adds a field of this name; rename or remove"),
    ],
)
def test_a_bad_row_is_named(row: Any, message: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    write(tmp_path / "rows.jsonl", [GOOD, row, GOOD])
    assert_matches(refused(), ROW_2 + message)


def test_a_reward_model_refuses_its_own_field_alone(tmp_path: Path, oracle: Oracle, refused: Callable) -> None:
    write(tmp_path / "rows.jsonl", [{**GOOD, "logprobs": []}, {**GOOD, "score": 1}])
    said = refused(f"model={oracle.folder / 'judge'}")
    assert_matches(said, f"{ROW_2}, column 'score': the output adds a field of this name; rename or remove")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["input=no.jsonl"], "data file does not exist: no.jsonl; check the path"),
        (["input=rows.json"], "input=rows.json is not a .jsonl file; write one JSON object a line"),
        (["input=arithmetic"], "input=arithmetic is not a .jsonl file; write one JSON object a line"),
        (["output=no/out.jsonl"], "output=no/out.jsonl: there is no directory .*no; make it, or choose another"),
        (["output=."], "output=. is a directory; name a file"),
        (["output=rows.jsonl"], "output=rows.jsonl exists and rows.jsonl.settings.json does not: .*; choose another"),
        (["sampling.temperature=0"], "setting sampling.temperature = 0"),
        (["temperature=0.5"], "unknown setting temperature = 0.5 .*; did you mean sampling.temperature?"),
        (["template=plain"], "unknown setting template = 'plain' .*; did you mean prompts.template?"),
        (["model=nowhere"], "model 'nowhere' is neither a directory nor a preset"),
        (["tokenizer=''"], "tokenizer is empty and the preset tiny-xs has none of its own"),
        (["layout.tensor=3"], "model heads=4 is not divisible by layout.tensor=3"),
    ],
)
def test_settings(overrides: list[str], message: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    write(tmp_path / "rows.jsonl", [GOOD])
    assert_matches(refused(*overrides), message)


def test_an_output_that_cannot_be_written(tmp_path: Path, refused: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "rows.jsonl", [GOOD])
    monkeypatch.setattr(os, "access", lambda place, mode: Path(place) != tmp_path)  # root may write everywhere
    assert_matches(refused(), f"output=out.jsonl: {tmp_path} cannot be written to; mend that, or choose another.")


@pytest.mark.parametrize(
    ("done", "overrides", "message"),
    [
        (
            [GOOD],
            ["sampling.temperature=0.5"],
            "out.jsonl was begun with other settings (sampling.temperature 1.0 -> 0.5); put them back",
        ),
        (
            [GOOD],
            ["prompts.template=plain", "seed=2", "compute.dtype=bfloat16"],
            "(prompts.template 'chat' -> 'plain', seed 1 -> 2, compute.dtype 'auto' -> 'bfloat16'); put them back",
        ),
        ([GOOD], ["model=tiny-s"], "(model 'tiny-xs' -> 'tiny-s'); put them back to go on with it, or choose another"),
        ([{**GOOD, "id": 1}], [], "output=out.jsonl, row 1: other id than in row 1 of rows.jsonl; put the input back"),
        ([{**GOOD, "prompt": "5"}], [], "output=out.jsonl, row 1: other prompt than in row 1 of rows.jsonl; put"),
        ([GOOD, GOOD], [], "output=out.jsonl, row 2: other flag than in row 2 of rows.jsonl; put the input back"),
        ([GOOD, {**GOOD, "flag": 1}], [], "output=out.jsonl, row 2: other flag than in row 2"),  # 1 is not true
        ([GOOD, {**GOOD, "flag": True}, GOOD], [], "output=out.jsonl has more rows than the 2 of rows.jsonl; put the"),
        (["{"], [], "output=out.jsonl, row 1: not JSON .*; remove the file to begin anew"),
        (["5"], [], "output=out.jsonl, row 1: no JSON object ('5'); remove the file to begin anew"),
        (["[]"], [], "output=out.jsonl, row 1: no JSON object ('[]'); remove the file to begin anew"),
        (["null"], [], "output=out.jsonl, row 1: no JSON object ('null'); remove the file to begin anew"),
        (["[" * 5000], [], "output=out.jsonl, row 1: not JSON .*; remove the file to begin anew"),
    ],
)
def test_only_what_was_begun_alike_is_gone_on_with(
    done: list[Any], overrides: list[str], message: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    write(tmp_path / "rows.jsonl", [GOOD, {**GOOD, "flag": True}])
    added = {"logprobs": [-1.0], "logprob_sum": -1.0}
    write(tmp_path / "out.jsonl", [row if isinstance(row, str) else {**row, **added} for row in done])
    begun = ScoreConfig(model="tiny-xs", tokenizer="arithmetic", input=Path("rows.jsonl"), output=Path("out.jsonl"))
    (tmp_path / "out.jsonl.settings.json").write_text(json.dumps(begun.decisive()))
    assert_matches(refused(*overrides), message)


def test_rows_that_lack_what_is_added_are_not_gone_on_with(tmp_path: Path, refused: Callable[..., str]) -> None:
    write(tmp_path / "rows.jsonl", [GOOD])
    write(tmp_path / "out.jsonl", [{**GOOD, "logprobs": [-1.0]}])
    (tmp_path / "out.jsonl.settings.json").write_text("{")
    assert_matches(refused(), "out.jsonl.settings.json: not JSON .*; remove it and out.jsonl to begin anew")
    begun = ScoreConfig(model="tiny-xs", tokenizer="arithmetic", input=Path("rows.jsonl"), output=Path("out.jsonl"))
    (tmp_path / "out.jsonl.settings.json").write_text(json.dumps(begun.decisive()))
    assert_matches(refused(), "output=out.jsonl, row 1: other logprob_sum than in row 1 of rows.jsonl; put the input")


@pytest.mark.parametrize(
    ("text", "what"), [("[]", "no JSON object ('[]')"), ("5", "no JSON object ('5')"), ("", "not JSON .*")]
)
def test_settings_that_are_none_are_not_gone_on_with(
    text: str, what: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    write(tmp_path / "rows.jsonl", [GOOD])
    write(tmp_path / "out.jsonl", [GOOD])
    (tmp_path / "out.jsonl.settings.json").write_text(text)
    assert_matches(refused(), f"out.jsonl.settings.json: {what}; remove it and out.jsonl to begin anew")


def again(command: list[str]) -> tuple[int, str]:
    with redirect_stderr(io.StringIO()) as said:
        return cli.main(command), said.getvalue()


@pytest.mark.slow
def test_the_command_line_on_two_ranks(oracle: Oracle, tmp_path: Path) -> None:
    given = (f"model={oracle.folder / 'speaker'}", f"input={oracle.folder / 'rows.jsonl'}", "output=out.jsonl")
    done = megarlhf("score", *given, "layout.tensor=2", directory=tmp_path)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.count("what this run uses") == 1
    for row, expected in zip(read(tmp_path / "out.jsonl"), oracle.logprobs(1.0), strict=True):
        assert row["logprobs"] == pytest.approx(expected, abs=CLOSE)
    # Another layout may go on with it.
    output = tmp_path / "out.jsonl"
    (found,) = run_ranks(again, 1, ["score", *given, f"output={output}"])
    assert found == (0, f"{output}: 13 of 13 rows are there, nothing is left to do\n")
