"""Public data as they are: every row of docs/data.md by the command below it, and what becomes of each shape."""

from __future__ import annotations

import gzip
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from megarlhf import cli
from megarlhf.config import load_config
from megarlhf.data.preferences import PreferenceSet, load_labelled, load_preferences
from megarlhf.data.prompts import load_prompts
from megarlhf.data.rows import DataConfig
from megarlhf.data.sft import load_sft
from megarlhf.errors import ConfigError, DataError
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runtime.said import DataSet, _how
from megarlhf.trainers import reward, sft
from tests.helpers.bytes_tokenizer import of_bytes
from tests.helpers.ranks import run_ranks

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```json\n(.*?)```\n```\nmegarlhf (\w+) (.*?)\n```", DOCUMENT, re.DOTALL)
OF_STEPS = "process_reward"
"""Whose rows test_judged_steps.py reads."""
BYTES = of_bytes()
ASKED = [{"role": "user", "content": "Name a prime."}]


def turn(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


def written(path: Path, *rows: Any) -> str:
    """Rows in the form that the name says."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = json.dumps(rows) if ".json" in path.suffixes else lines
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def pairs_of(tmp_path: Path, *rows: Any, **settings: Any) -> PreferenceSet:
    return load_preferences(DataConfig(source=written(tmp_path / "rows.jsonl", *rows), **settings), BYTES)


def chat(*turns: dict[str, str]) -> list[int]:
    """What transformers makes of a conversation."""
    return BYTES._fast.apply_chat_template(list(turns), tokenize=True, return_dict=False)  # pyright: ignore[reportReturnType]


def test_the_document_shows_every_shape() -> None:
    kinds = [command for _, command, _ in SHOWN]
    assert (kinds.count("reward"), kinds.count("sft"), kinds.count("grpo")) == (5, 5, 1)
    assert kinds.count(OF_STEPS) == 7


@pytest.mark.parametrize(
    "shown", [shown for shown in SHOWN if shown[1] != OF_STEPS], ids=lambda shown: shown[2].split()[1]
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
    if group == "data":
        found = load_sft(data, BYTES, data.supervise)
        taught = [BYTES.decode(found.rows[0].ids[first:last]) for first, last in found.rows[0].spans]
        assert taught in (["Seven."], ["Seven.", "Five."], ["5"], ["2 + 2 = <<2+2=4>>4\n#### 4"])
    elif group == "pairs":
        found = load_preferences(data, BYTES)
        assert found.chosen[0] == chat(*ASKED, turn("Seven."))
        assert found.rejected[0] == chat(*ASKED, turn("Nine."))
        assert found.prompt_lengths[0] == len(BYTES.encode_chat(ASKED))  # pyright: ignore[reportArgumentType]
    elif group == "labelled":
        found = load_labelled(data, BYTES, "labelled", data.scale)
        assert found.correct == [0.75]
        assert found.tokens[0] == chat(*ASKED, turn("Nine."), turn("Sure?", "user"), turn("No, seven."))
    else:
        found = load_prompts(data, BYTES)
        assert found.answers == ["4"]
    assert len(found) == 1
    assert found.origin.shape
    assert _how(DataSet(group, data, data, found))[0] == f"{group}, read as: {found.origin.shape}"


def test_alpaca_is_rendered_with_an_empty_line_and_without_one(tmp_path: Path) -> None:
    rows = [{"instruction": "Add.", "input": given, "output": 5} for given in ("2 and 3", "", None)]
    source = written(tmp_path / "rows.json", *rows)
    found = load_sft(DataConfig(source=source, template="plain"), BYTES)
    bos = BYTES.decode_all([BYTES.bos_id or 0])
    assert [BYTES.decode_all(row.ids[: row.spans[0][0]]) for row in found.rows] == [
        f"{bos}Add.\n\n2 and 3",
        f"{bos}Add.",
        f"{bos}Add.",
    ]
    prompts = load_prompts(DataConfig(source=source, template="plain"), BYTES)
    assert [list(ids) for ids in prompts.tokens] == [row.ids[: row.spans[0][0]] for row in found.rows]


def test_several_turns_in_common_are_the_prompt(tmp_path: Path) -> None:
    before = [turn("Hi", "user"), turn("Hello."), turn("Name a prime.", "user")]
    talk = {"chosen": [*before, turn("Seven.")], "rejected": [*before, turn("Nine.")]}
    hh = {
        side: "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Name a prime.\n\nAssistant: " + said
        for side, said in (("chosen", "Seven."), ("rejected", "Nine."))
    }
    for row in (talk, hh, {"prompt": "Name a prime.", **talk}, {"prompt": before, **talk}):
        found = pairs_of(tmp_path, row)
        assert found.chosen[0] == chat(*before, turn("Seven."))
        assert found.rejected[0] == chat(*before, turn("Nine."))


SEVEN, NINE = [*ASKED, turn("Seven.")], [*ASKED, turn("Nine.")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": SEVEN, "rejected": [turn("Name two.", "user"), turn("Nine.")]}, "rejected is empty, where a user"),
        (
            {"chosen": [*SEVEN, turn("a", "user"), turn("b")], "rejected": [*SEVEN, turn("c", "user"), turn("d")]},
            "ends with 'assistant', where a user must have asked",
        ),
        ({"chosen": SEVEN, "rejected": [*NINE, turn("Sure?", "user"), turn("No.")]}, "more than the last turn"),
        ({"chosen": SEVEN, "rejected": SEVEN}, "the same text as chosen; a pair must differ"),
        ({"prompt": "Name another.", "chosen": SEVEN, "rejected": NINE}, "begin with another one"),
        ({"chosen": SEVEN, "rejected": ["Nine."]}, "is not a conversation"),
        ({"chosen": SEVEN, "rejected": [*ASKED, turn(" ")]}, "the last turn is empty"),
        ({"chosen": SEVEN, "rejected": [*ASKED, {"role": "assistant", "content": None}]}, "both text"),
    ],
)
def test_pairs_that_are_none_are_named_or_dropped(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"chosen": SEVEN, "rejected": NINE}
    with pytest.raises(DataError, match=rf"row 2, column .*{message}.*\. Or leave .*: pairs\.bad_rows=drop\."):
        pairs_of(tmp_path, good, row, good)
    found = pairs_of(tmp_path, good, row, good, bad_rows="drop")
    assert len(found) == 2
    (said,) = found.origin.bad
    assert re.search(rf"row 2, column .*{message}", said)


def test_the_first_bad_rows_are_listed_at_once_and_dropped_ones_counted(tmp_path: Path) -> None:
    rows = [{"prompt": 0}, {"prompt": "a"}, *[{"prompt": number} for number in range(6)]]
    path = tmp_path / "rows.jsonl"
    source = written(path, *rows)
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(DataError) as caught:
        load_prompts(DataConfig(source=source), BYTES)
    assert [line.partition(", column")[0] for line in str(caught.value).splitlines()[:5]] == [
        f"bad row: {source}, row {number}" for number in (1, 3, 4, 5, 6)
    ]
    assert str(caught.value).splitlines()[5:] == [
        "There may be more. Mend them, or leave such rows out: prompts.bad_rows=drop."
    ]
    config = DataConfig(source=source, bad_rows="drop")
    found = load_prompts(config, BYTES)
    assert (len(found), found.ids, len(found.origin.bad)) == (1, [1], 8)
    said = _how(DataSet("prompts", config, config, found))
    assert said[1] == "prompts: 8 bad rows dropped (prompts.bad_rows=drop), such as"
    assert said[2:] == list(found.origin.bad[:5])
    assert "row 9, character 2: not JSON" in found.origin.bad[-1]
    with pytest.raises(DataError, match=r"no row is left: all 1 of .* are bad, the first so: bad row: .*5 is not text"):
        load_prompts(DataConfig(source=written(path, {"prompt": 5}), bad_rows="drop"), BYTES)


def test_forms_that_fit_alike_are_refused_with_what_chooses(tmp_path: Path) -> None:
    talk = [*ASKED, turn("Seven.")]
    rows = {
        "data.columns.messages=messages": {"messages": talk, "prompt": "Add.", "response": "5"},
        "data.columns.prompt=question data.columns.response=answer": {
            "question": "Name a prime.",
            "answer": "Seven.",
            "instruction": "Add.",
            "output": "5",
        },
    }
    for remedy, row in rows.items():
        source = written(tmp_path / "rows.jsonl", row)
        with pytest.raises(ConfigError, match=r"^data\.source=.* can be read as .* and as .*; set ") as caught:
            load_sft(DataConfig(source=source), BYTES)
        assert remedy in str(caught.value)
        columns = dict(part.removeprefix("data.columns.").split("=") for part in remedy.split())
        found = load_sft(DataConfig(source=source, columns=columns), BYTES)
        assert found.rows[0].ids == chat(*talk)


def test_calls_of_tools_are_refused_with_the_reason(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [
        ({"messages": [*ASKED, call, turn("7", "tool"), turn("Seven.")]}, "calls a tool, and calls are not rendered"),
        ({"messages": [*ASKED, turn("Seven.")], "tools": [{"type": "function"}]}, "definitions of tools are not"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "is from 'function_call'; there are human"),
    ]
    for row, message in rows:
        with pytest.raises(DataError, match=f"row 1, column .*{message}"):
            load_sft(DataConfig(source=written(tmp_path / "rows.jsonl", row)), BYTES)
    nothing = {**turn("Seven."), "tool_calls": None, "function_call": None}
    source = written(tmp_path / "rows.jsonl", {"messages": [*ASKED, nothing], "tools": None})
    assert load_sft(DataConfig(source=source), BYTES).rows[0].ids == chat(*ASKED, turn("Seven."))


def test_grades_need_their_scale(tmp_path: Path) -> None:
    row = {"prompt": "a", "response": "b", "helpfulness": 4}
    source = written(tmp_path / "rows.jsonl", row)
    with pytest.raises(DataError, match=r"'correct': missing; .*; set labelled\.columns\.correct=helpfulness"):
        load_labelled(DataConfig(source=source), BYTES)
    config = DataConfig(source=source, columns={"correct": "helpfulness"})
    with pytest.raises(DataError, match=r"4 is out of range; use 0 to 1, or set labelled\.scale"):
        load_labelled(config, BYTES)
    assert load_labelled(config, BYTES, "labelled", 4.0).correct == [1.0]


def test_every_form_of_file_has_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u00e4", "answer": 1}, {"prompt": "b", "answer": 2.5}]
    names = ("rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.json.gz")
    sources = [written(tmp_path / name, *rows) for name in names]
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "wide.json").write_text("\n\n" + json.dumps(rows, indent=2))
    for source in (*sources, str(tmp_path / "lines.json"), str(tmp_path / "wide.json")):
        found = load_prompts(DataConfig(source=source), BYTES)
        assert (found.answers, [row["prompt"] for row in found.columns]) == (["1", "2.5"], ["a\u00e4", "b"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b'[{"prompt": "a"}, 5]', r"row 2: 5; every item must be one JSON object"),
        ("rows.json", b'[{"prompt": "a"},\n {]', r"no list of rows: .*, line 2, character 3: not JSON .*; mend it"),
        ("rows.json", b'{"data": [\n1]}', r"row 1, character 11: not JSON"),
        ("rows.json", b"[]", "data is empty"),
        ("rows.jsonl.gz", b"no gzip", "data file is damaged: .*rows.jsonl.gz: Not a gzipped file"),
        (
            "rows.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}\n' * 99, mtime=0)[:-9],
            "data file is damaged: .*ended before",
        ),
    ],
)
@pytest.mark.parametrize("bad_rows", ["error", "drop"])
def test_files_that_are_damaged(name: str, content: bytes, message: str, bad_rows: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    config = DataConfig(source=str(tmp_path / name), bad_rows=bad_rows)  # pyright: ignore[reportArgumentType]
    if bad_rows == "drop" and "every item" in message:
        assert len(load_prompts(config, BYTES)) == 1
        return
    with pytest.raises(DataError, match=message):
        load_prompts(config, BYTES)


TOM, EVA = "Tom has 5 apples.", "Eva has 7 shells."
SAID = ("The answer is 5.", "The answer is 7.")
TALK = [{"role": "user", "content": TOM}]
HH_ROW = {
    side: f"\n\nHuman: {TOM}\n\nAssistant: {said}" for side, said in zip(("chosen", "rejected"), SAID, strict=True)
}
GRADES = {"helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 2}
PUBLIC: dict[str, tuple[str, dict[str, Any]]] = {
    "UltraFeedback": (
        "pairs.source",
        {"prompt": TOM, "chosen": [*TALK, turn(SAID[0])], "rejected": [*TALK, turn(SAID[1])], "score_chosen": 8.5},
    ),
    "HH-RLHF": ("pairs.source", HH_ROW),
    "HelpSteer2": (
        "labelled.columns.correct=helpfulness labelled.scale=4 labelled.source",
        {"prompt": f"{TOM}\n\n<extra_id_1>Assistant\n5\n\n<extra_id_1>User\n{EVA}", "response": SAID[1], **GRADES},
    ),
    "GSM8K": ("data.source", {"question": TOM, "answer": SAID[0]}),
    "TRL": ("data.source", {"prompt": TOM, "completion": SAID[0]}),
    "Alpaca": ("data.source", {"instruction": TOM, "input": EVA, "output": SAID[0], "text": "all of it"}),
    "ShareGPT": (
        "data.supervise=all data.source",
        {
            "conversations": [
                {"from": "human", "value": TOM},
                {"from": "gpt", "value": SAID[0]},
                {"from": "human", "value": EVA},
                {"from": "gpt", "value": SAID[1]},
            ]
        },
    ),
}
"""A row of each public set, in words that the smallest models know."""


def _two_steps(directory: str) -> dict[str, list[float]]:
    mesh = start(ParallelLayout(), seed=1)
    found = {}
    for name, (settings, row) in PUBLIC.items():
        source = written(Path(directory) / f"{name}.jsonl", *[row] * 4)
        *others, where = settings.split()
        trainer: Any
        trainer, batch = (
            (sft.TRAINER, "global_batch=2") if where == "data.source" else (reward.TRAINER, "pairs_batch=2")
        )
        overrides = [*others, f"{where}={source}", batch, "model=tiny-xs", "tokenizer=arithmetic", "micro_batch=1"]
        overrides += [f"run_dir={directory}/{name}", "optim.schedule=constant", "optim.warmup_steps=0", "save_every=0"]
        overrides += ["labelled_batch=2"] if trainer is reward.TRAINER else []
        cfg = load_config(trainer.config, None, overrides)
        inputs: Any = trainer.prepare(cfg)
        metrics = trainer.run(cfg, inputs, [], mesh)
        found[name] = [inputs.steps, metrics.get("sft/loss", metrics.get("reward/loss", math.nan))]
    return found


def test_two_steps_are_learnt_from_rows_of_seven_public_sets(tmp_path: Path) -> None:
    """No script converts anything: the rows lie as they are published."""
    (found,) = run_ranks(_two_steps, 1, str(tmp_path))
    assert list(found) == list(PUBLIC)
    for name, (steps, loss) in found.items():
        assert steps == 2, name
        assert 0 < loss < 10, name
