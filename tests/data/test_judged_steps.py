"""Judged steps: every public form by its row in docs/data.md, what its traps do, and where the labels come to stand."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from megarlhf import cli
from megarlhf.config import load_config
from megarlhf.data.arithmetic import STEP_SEPARATOR, ArithmeticConfig, step_rows, words
from megarlhf.data.judged_steps import StepData, StepSet, load_steps
from megarlhf.data.steps import PARAGRAPH
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import ConfigError, DataError
from megarlhf.runtime.said import DataSet, _how
from tests.data.test_shapes import OF_STEPS, SHOWN, written
from tests.helpers.bytes_tokenizer import of_bytes
from tests.helpers.llama3 import llama3, needed

BYTES = of_bytes()
PROMPT = "Name a prime above 4."
RIGHT, WRONG = "4 is 2 times 2.", "So it is 9."
OWN = {"prompt": PROMPT, "steps": [RIGHT, WRONG], "labels": [1, 0]}


def steps_of(folder: Path, *rows: Any, **settings: Any) -> StepSet:
    return load_steps(StepData(source=written(folder / "rows.jsonl", *rows), **settings), BYTES)


def first_errors(found: StepSet) -> list[int]:
    """The first step of each row whose label is below 1/2; -1 where none is."""
    wrong = ([at for at, label in enumerate(labels) if label is not None and label < 0.5] for labels in found.labels)
    return [places[0] if places else -1 for places in wrong]


def read(found: StepSet, row: int, separator: str = PARAGRAPH) -> tuple[list[str], list[float | None]]:
    """The steps as the tokens between their ends have them, the first without the prompt, and their labels."""
    ids, text = found.tokens[row], []
    before = len(BYTES.encode_chat([{"role": "user", "content": PROMPT}]))
    for end in found.ends[row]:
        text.append(BYTES.decode(ids[before : end + 1]))
        before = end + 1
    whole = "".join(text)
    assert found.ends[row][-1] == len(ids) - 1
    assert all(piece[-1:] == separator[0] for piece in text[:-1])  # bytes: the end is the separator's first
    return whole.split(separator), list(found.labels[row])


@pytest.mark.parametrize(
    "shown", [shown for shown in SHOWN if shown[1] == OF_STEPS], ids=lambda shown: shown[2].split()[1]
)
def test_a_row_of_the_document_is_read_by_its_command(
    shown: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row, command, settings = shown
    cfg = load_config(cli.program(cli.commands()[command])[0], None, [*shlex.split(settings), "run_dir=run"])
    group = settings.split()[1].partition(".")[0]
    data = dict(cfg)[group]
    written(Path(data.source), json.loads(row))
    found = load_steps(data, BYTES, group)
    assert found.origin.shape
    assert _how(DataSet(group, data, data, found))[0] == f"{group}, read as: {found.origin.shape}"
    steps, labels = read(found, 0, data.joint)
    assert steps[0] in (RIGHT, f"Step 1: {RIGHT}")
    assert WRONG in steps[-1] or steps[-1] == "9 is above 4."
    assert labels in ([1.0, 0.0], [1.0, None, 0.0], [1.0, 0.0, None])
    assert first_errors(found)[0] == labels.index(0.0)


def completions(*rated: tuple[str, int | None]) -> list[dict[str, Any]]:
    return [{"text": text, "rating": rating, "flagged": None} for text, rating in rated]


TREE = {
    "question": {"problem": PROMPT, "ground_truth_answer": "5"},
    "label": {
        "steps": [
            {
                "completions": completions(("a", 1), ("b", 0), ("c", -1), ("unrated", None)),
                "human_completion": None,
                "chosen_completion": 0,
            },
            {
                "completions": completions(("d", -1), ("e", -1)),
                "human_completion": {"text": "f", "rating": None, "source": "human", "flagged": False},
                "chosen_completion": None,
            },
            {"completions": completions(("g", 0)), "human_completion": None, "chosen_completion": 0},
            {"completions": completions(("h", -1), ("i", 1)), "human_completion": None, "chosen_completion": None},
        ],
        "finish_reason": "found_error",
    },
}


def test_a_tree_of_prm800k_is_a_row_for_the_solution_and_one_for_each_alternative(tmp_path: Path) -> None:
    found = steps_of(tmp_path, TREE, TREE)
    expected = [
        (["a", "f", "g", "h"], [1.0, 1.0, 1.0, 0.0]),
        (["b"], [1.0]),
        (["c"], [0.0]),
        (["a", "d"], [None, 0.0]),
        (["a", "e"], [None, 0.0]),
        (["a", "f", "g", "i"], [None, None, None, 1.0]),
    ]
    assert [read(found, row) for row in range(len(found))] == expected * 2
    wrong = steps_of(tmp_path, TREE, neutral="wrong")
    assert (wrong.labels[0], wrong.labels[1]) == ([1.0, 1.0, 0.0, None], [0.0])
    assert first_errors(wrong) == [2, 0, 0, 1, 1, -1]
    unknown = steps_of(tmp_path, TREE, neutral="unlabelled")
    assert (unknown.labels[0], len(unknown)) == ([1.0, 1.0, None, 0.0], 5)
    parquet = tmp_path / "rows.parquet"
    datasets.Dataset.from_list([TREE, TREE]).to_parquet(str(parquet))
    assert load_steps(StepData(source=str(parquet)), BYTES).labels == found.labels


def changed(path: list[Any], value: Any) -> dict[str, Any]:
    """TREE with something else in one place."""
    row = json.loads(json.dumps(TREE))
    place = row
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return row


def shepherd(text: str, label: str) -> dict[str, Any]:
    return {"input": text, "label": label, "task": "GSM8K"}


def talk(*said: str, **more: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"conversations": [{"role": roles[at % 2], "content": text} for at, text in enumerate(said)], **more}


STEP = f"{PROMPT} Step 1: a"
BENCH = {"problem": PROMPT, "steps": [RIGHT, WRONG], "final_answer_correct": False, "label": 1}
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a label missing": (OWN, {**OWN, "labels": [1]}, "'labels': 1 labels of 2 steps"),
    "a label too large": (OWN, {**OWN, "labels": [1, 1.5]}, "'labels': number 2, 1.5, is out of range; use 0 to 1"),
    "a label that is no number": (OWN, {**OWN, "labels": [1, "+"]}, r"'labels': number 2, '\+', is not a number"),
    "not a number": (OWN, {**OWN, "labels": [1, float("nan")]}, "'labels': number 2, nan, is out of range"),
    "no label": (OWN, {**OWN, "labels": [None, None]}, "'labels': no step has a label"),
    "no labels": (OWN, {"prompt": PROMPT, "steps": [RIGHT]}, "'labels': missing"),
    "an empty step": (OWN, {**OWN, "steps": [RIGHT, " "]}, "'steps': number 2 is empty"),
    "no step": (OWN, {**OWN, "steps": [], "labels": []}, r"'steps': \[\] is not a list of at least one"),
    "text for steps": (OWN, {**OWN, "steps": "a b"}, "'steps': 'a b' is not a list"),
    "a step that is a number": (OWN, {**OWN, "steps": [RIGHT, 9]}, "'steps': number 2, 9, is not text"),
    "half a letter": (OWN, {**OWN, "steps": [RIGHT, "\ud800"]}, "'steps': .* is half a character"),
    "TRL, a label missing": (
        {"prompt": PROMPT, "completions": [RIGHT], "labels": [True]},
        {"prompt": PROMPT, "completions": [RIGHT, WRONG], "labels": [True]},
        "'labels': 1 labels of 2 steps",
    ),
    "PRM800K, no steps": (TREE, changed(["label", "steps"], []), r"'label': its steps are \[\]"),
    "PRM800K, a rating": (
        TREE,
        changed(["label", "steps", 0, "completions", 0, "rating"], 2),
        "'label': the rating 2 is none of -1, 0, 1",
    ),
    "PRM800K, goes on with nothing": (
        TREE,
        changed(["label", "steps", 2, "chosen_completion"], None),
        "'label': step 3 goes on with completion None of 1",
    ),
    "PRM800K, goes on with what is not there": (
        TREE,
        changed(["label", "steps", 2, "chosen_completion"], 1),
        "'label': step 3 goes on with completion 1 of 1",
    ),
    "PRM800K, no text": (
        TREE,
        changed(["label", "steps", 0, "completions", 0, "text"], None),
        "'label': number 1, None, is not text",
    ),
    "PRM800K, no problem": (TREE, changed(["question", "problem"], None), "'question': missing"),
    "Math-Shepherd, the first step missing": (
        shepherd(f"{STEP} ки", f"{STEP} +"),
        shepherd(f"{PROMPT} Step 2: b ки", f"{PROMPT} Step 2: b +"),
        "'input': no prompt and Step 1: before the first ки",
    ),
    "Math-Shepherd, a tag in the prompt": (
        shepherd(f"{STEP} ки", f"{STEP} +"),
        shepherd(f"Name ки {STEP} ки", f"Name + {STEP} +"),
        "'input': no prompt and Step 1: before the first ки",
    ),
    "Math-Shepherd, no prompt": (
        shepherd(f"{STEP} ки", f"{STEP} +"),
        shepherd("Step 1: a ки", "Step 1: a +"),
        "'input': no prompt and Step 1:",
    ),
    "Math-Shepherd, a sign missing": (
        shepherd(f"{STEP} ки", f"{STEP} +"),
        shepherd(f"{STEP} ки\nStep 2: b ки", f"{STEP} +\nStep 2: b "),
        r"'label': not the text of input with \+ or - in place of its tag 2 of 2",
    ),
    "Math-Shepherd, a tag missing": (
        shepherd(f"{STEP} ки", f"{STEP} +"),
        shepherd(f"{STEP} ки\nStep 2: b", f"{STEP} +\nStep 2: b -"),
        "'label': not the text of input after its 1 tags",
    ),
    "RLHFlow, another sign": (talk(STEP, "+"), talk(STEP, "yes"), "'conversations': not a user's step and"),
    "RLHFlow, a step without a sign": (talk(STEP, "+"), talk(STEP, "+", "b"), "'conversations': not a user's"),
    "RLHFlow, no number": (
        talk(STEP, "+"),
        talk(f"{PROMPT} a", "+"),
        "'conversations': no prompt and Step 1: before the first sign; .* by columns.prompt",
    ),
    "RLHFlow, another prompt": (
        talk(STEP, "+"),
        talk(STEP, "+", prompt="b"),
        "'conversations': does not begin with the prompt 'b'",
    ),
    "ProcessBench, a step too far": (BENCH, {**BENCH, "label": 2}, "'label': 2 is no step of 2, from 0, nor -1"),
    "ProcessBench, a truth": (BENCH, {**BENCH, "label": True}, "'label': True is no step of 2"),
    "Qwen, a mark missing": (
        {"prompt": PROMPT, "response": "a<extra_0>b<extra_0>", "labels": [1, 0]},
        {"prompt": PROMPT, "response": "a<extra_0>b", "labels": [1]},
        "'labels': 1 labels of 2 steps",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_refused_by_file_row_and_column_or_dropped(name: str, tmp_path: Path) -> None:
    good, bad, message = BAD[name]
    with pytest.raises(DataError, match=rf"bad row: .*rows\.jsonl, row 2, column {message}.*steps\.bad_rows=drop\."):
        steps_of(tmp_path, good, bad, good)
    found, alone = steps_of(tmp_path, good, bad, good, bad_rows="drop"), steps_of(tmp_path, good)
    assert len(found) == 2 * len(alone)
    assert re.search(message, found.origin.bad[0])


def test_rlhflow_s_prompt_may_be_a_column_of_its_own(tmp_path: Path) -> None:
    row = talk(f"{PROMPT}\n\n{RIGHT}", "+", WRONG, " - ", asked=PROMPT)
    assert read(steps_of(tmp_path, row, columns={"prompt": "asked"}), 0) == ([RIGHT, WRONG], [1.0, 0.0])


def test_what_follows_math_shepherd_s_last_tag_is_a_step_that_nobody_judged(tmp_path: Path) -> None:
    row = shepherd(f"{STEP} ки\nStep 2: b", f"{STEP} +\nStep 2: b")
    assert read(steps_of(tmp_path, row), 0) == (["Step 1: a", "Step 2: b"], [1.0, None])


def test_labels_are_as_the_settings_want_them(tmp_path: Path) -> None:
    row = {**OWN, "steps": list("abcde"), "labels": [0.9, None, 0.25, 0.6, 0.0]}
    of = {
        (): [0.9, None, 0.25, None, None],
        (("until", "all"),): row["labels"],
        (("labels", "hard"),): [1.0, None, 0.0, None, None],
        (("labels", "hard"), ("threshold", 0.125)): [1.0, None, 1.0, 1.0, 0.0],
        (("labels", "hard"), ("threshold", 0.7), ("until", "all")): [1.0, None, 0.0, 0.0, 0.0],
    }
    for settings, expected in of.items():
        found = steps_of(tmp_path, row, **dict(settings))
        assert found.labels == [expected], settings
    assert first_errors(steps_of(tmp_path, row)) == [2]
    assert first_errors(steps_of(tmp_path, {**row, "labels": [0.5, 1, 1, None, 1]})) == [-1]


def test_a_batch_has_each_label_where_its_step_ends(tmp_path: Path) -> None:
    """Weight 1 where there is one, and a mark at every end."""
    rows = [{**OWN, "steps": list("abc"), "labels": [0.5, None, 1]}, {**OWN, "steps": ["d"], "labels": [0]}]
    found = steps_of(tmp_path, *rows, template="plain")
    batch = found.batch(torch.tensor([1, 0, 1]))
    prompt = len(BYTES.encode_prompt(PROMPT, "plain"))
    last = prompt + len("a\n\nb\n\nc")
    assert batch.step_ends.nonzero().tolist() == [
        [0, prompt + 1],
        [1, prompt + 1],
        [1, prompt + 4],
        [1, last],
        [2, prompt + 1],
    ]
    assert batch.lengths.tolist() == [prompt + 2, last + 1, prompt + 2]
    assert batch.step_weight.nonzero().tolist() == [[0, prompt + 1], [1, prompt + 1], [1, last], [2, prompt + 1]]
    assert batch.step_labels[1, [prompt + 1, last]].tolist() == [0.5, 1.0]
    assert float(batch.step_labels.sum()) == 1.5


def test_the_built_in_task_is_joined_by_what_parts_its_steps() -> None:
    known = build_tiny_tokenizer(words())
    config = StepData(source="arithmetic", template="plain", arithmetic=ArithmeticConfig(rows=50))
    found, rows = load_steps(config, known), step_rows(config.arithmetic, "train")
    assert config.joint == STEP_SEPARATOR
    for row, tokens, ends in zip(rows, found.tokens, found.ends, strict=True):
        assert known.decode(tokens) == f"{row['prompt']} {STEP_SEPARATOR.join(row['steps'])}"
        assert len(ends) == len(row["steps"])
    assert first_errors(found) == [row["labels"].index(0) if 0 in row["labels"] else -1 for row in rows]
    assert set(first_errors(found)) >= {-1, 0, 1}


def test_an_empty_line_joins_the_steps_of_several_sources() -> None:
    assert StepData(source="x").joint == StepData().joint == PARAGRAPH
    mixed = {"a": {"source": "arithmetic"}, "b": {"source": "x"}}
    assert StepData.model_validate({"mix": mixed}).joint == PARAGRAPH
    assert StepData.model_validate({"mix": {"a": mixed["a"]}}).joint == STEP_SEPARATOR
    assert StepData(source="arithmetic", separator="|").joint == "|"


def test_rows_over_the_limit_are_refused_or_counted_never_cut(tmp_path: Path) -> None:
    """Each of the rows that are one of PRM800K's has its length, under its number."""
    found = steps_of(tmp_path, TREE)
    lengths = [len(tokens) for tokens in found.tokens]
    limit = sorted(lengths)[-2] - 1
    over = sum(length > limit for length in lengths)
    with pytest.raises(DataError, match=rf"longer than max_tokens={limit}: {over} of 6 in .*, row \(tokens\) 1 \("):
        steps_of(tmp_path, TREE, max_tokens=limit)
    kept = steps_of(tmp_path, TREE, max_tokens=limit, overlong="drop")
    assert (len(kept), kept.dropped) == (6 - over, over)
    assert [list(tokens) for tokens in kept.tokens] == [t for t in map(list, found.tokens) if len(t) <= limit]


@needed
def test_labelled_steps_that_end_with_one_token_are_refused_and_unlabelled_ones_are_not(tmp_path: Path) -> None:
    """Llama 3 writes a full stop and the empty line after it as one token: all of a step that is nothing else."""
    row = {"prompt": PROMPT, "steps": ["It is 9", "?", "So."], "labels": [1, 0, 0]}
    config = StepData(source=written(tmp_path / "rows.jsonl", row), until="all", separator="?")
    with pytest.raises(DataError, match=r"row 1, column 'steps': steps 1 and 2 end with one token, '\?\?\?'"):
        load_steps(config, llama3())
    written(tmp_path / "rows.jsonl", {**row, "labels": [1, None, 0]})
    found = load_steps(config, llama3())
    assert found.ends[0][0] == found.ends[0][1]
    batch = found.batch(torch.tensor([0]))
    assert (int(batch.step_ends.sum()), float(batch.step_weight.sum())) == (2, 2.0)


def test_a_text_that_the_tokenizer_changes_is_refused(tmp_path: Path) -> None:
    """Where its steps end would be counted in another text."""
    row = {"prompt": "Tom has 5 apples.", "steps": ["5  + 3 = 8", "The answer is 8."], "labels": [1, 1]}
    config = StepData(source=written(tmp_path / "rows.jsonl", row), template="plain", separator=". ")
    known = build_tiny_tokenizer(words())
    with pytest.raises(DataError, match=r"column 'steps': the tokenizer does not .* joined by '\. '; .* white space"):
        load_steps(config, known)
    written(tmp_path / "rows.jsonl", {**row, "steps": ["5 + 3 = 8", "The answer is 8."]})
    with pytest.raises(DataError, match=r"joined by '\\n\\n'; set a separator that it knows"):
        load_steps(config.model_copy(update={"separator": PARAGRAPH}), known)
    assert len(load_steps(config, known).ends[0]) == 2


def test_steps_that_joined_are_not_the_response_are_refused(tmp_path: Path) -> None:
    """A model that learnt with a separator of no response would take each response for one step."""
    row = {"prompt": "Tom has 5 apples.", "steps": ["5 + 3 = 8", "The answer is 8."], "labels": [1, 1]}
    known = build_tiny_tokenizer(words())
    for response in ("5 + 3 = 8. The answer is 8.", "5 + 3 = 8. . The answer is 8."):
        source = written(tmp_path / "rows.jsonl", {**row, "response": response})
        assert len(load_steps(StepData(source=source, template="plain", separator=". "), known)) == 1
        with pytest.raises(
            DataError, match=r"row 1, column 'steps': joined by separator='\\n\\n' they are not the row's"
        ):
            load_steps(StepData(source=source, template="plain"), known)


def test_a_form_is_chosen_by_its_columns(tmp_path: Path) -> None:
    """Two that fit are refused, and the library's own comes first."""
    both = {**BENCH, "input": f"{STEP} ки"}
    with pytest.raises(ConfigError, match=r"can be read as Math-Shepherd's .* and as ProcessBench's"):
        steps_of(tmp_path, {**both, "label": 1})
    assert read(steps_of(tmp_path, {**OWN, "completions": ["x"]}), 0) == ([RIGHT, WRONG], [1.0, 0.0])
