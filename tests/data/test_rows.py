from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.data.arithmetic import ArithmeticConfig, words
from megarlhf.data.preferences import LabelledSet, PreferenceSet, load_labelled, load_preferences
from megarlhf.data.prompts import PromptSet, check_prompt_count, load_prompts
from megarlhf.data.rows import DataConfig, pad_right
from megarlhf.data.sft import SftSet, load_sft
from megarlhf.data.tokenizer import Message, Tokenizer, build_tiny_tokenizer
from megarlhf.errors import ConfigError, DataError

TOKENIZER = build_tiny_tokenizer(words())
Load = Callable[[DataConfig, Tokenizer], PromptSet | SftSet | PreferenceSet | LabelledSet]


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plain(source: str, **settings: Any) -> DataConfig:
    return DataConfig(source=source, template="plain", **settings)


def test_prompt_batch_in_closed_form(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "p.jsonl",
        [{"prompt": "How many?", "answer": "3"}, {"prompt": "How many books?"}, {"prompt": "Tom?", "answer": None}],
    )
    prompts = load_prompts(plain(source), TOKENIZER)
    batch = prompts.batch(torch.tensor([2, 0]))
    how, many, tom, question = (TOKENIZER.encode(word)[0] for word in ("How", "many", "Tom", "?"))
    bos, pad = TOKENIZER.bos_id, TOKENIZER.pad_id
    assert batch.tokens.tolist() == [[bos, tom, question, pad], [bos, how, many, question]]
    assert batch.lengths.tolist() == [3, 4]
    assert batch.ids.tolist() == [2, 0]
    assert batch.answers == ("", "3")
    assert (len(prompts), prompts.longest, prompts.dropped) == (3, 5, 0)


def test_sft_supervises_the_response_and_its_eos(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "s.jsonl",
        [{"prompt": "How many?", "response": "3."}, {"prompt": "How many books?", "response": "The answer is 3."}],
    )
    batch = load_sft(plain(source), TOKENIZER).batch(torch.tensor([0, 1]))
    assert batch.lengths.tolist() == [7, 11]
    # Prompts of 4 and 5 tokens: the first supervised label is token 4 (index 3), or 5 (index 4).
    assert batch.loss_mask.tolist() == [
        [False] * 3 + [True] * 3 + [False] * 4,
        [False] * 4 + [True] * 6,
    ]
    assert TOKENIZER.decode(batch.labels[1][batch.loss_mask[1]].tolist()) == "The answer is 3."
    assert batch.labels[0][batch.loss_mask[0]].tolist()[-1] == TOKENIZER.eos_id


def test_messages_equal_prompt_and_response_and_the_chat_template(tmp_path: Path) -> None:
    turns: list[Message] = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": " The answer is 3.\n"},
    ]
    source = lines(tmp_path / "s.jsonl", [{"messages": turns}])
    other = lines(tmp_path / "t.jsonl", [{"prompt": turns[:1], "response": "The answer is 3."}])
    index = torch.tensor([0])
    batch = load_sft(DataConfig(source=source), TOKENIZER).batch(index)
    same = load_sft(DataConfig(source=other), TOKENIZER).batch(index)
    assert torch.equal(batch.tokens, same.tokens)
    assert torch.equal(batch.loss_mask, same.loss_mask)
    assert batch.tokens[0].tolist() == TOKENIZER.encode_chat(turns, add_generation_prompt=False)
    assert TOKENIZER.decode(batch.labels[0][batch.loss_mask[0]].tolist()) == "The answer is 3."


def test_preferences_interleave_chosen_and_rejected(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "p.jsonl",
        [
            {"prompt": "How many?", "chosen": "3.", "rejected": "5 books."},
            {"prompt": "Tom?", "chosen": "7.", "rejected": "8.", "margin": 2.5},
        ],
    )
    pairs = load_preferences(plain(source), TOKENIZER)
    batch = pairs.batch(torch.tensor([1, 0]))
    texts = [TOKENIZER.decode(row.tolist()) for row in batch.tokens]
    assert texts == ["Tom? 7.", "Tom? 8.", "How many? 3.", "How many? 5 books."]
    assert batch.lengths.tolist() == [6, 6, 7, 8]
    said = [TOKENIZER.decode(row[read].tolist()) for row, read in zip(batch.labels, batch.response_mask, strict=True)]
    assert said == ["7.", "8.", "3.", "5 books."]
    assert (batch.labels[batch.response_mask] == TOKENIZER.eos_id).sum() == 4  # EOS is learnt
    ends = batch.tokens.gather(1, batch.lengths[:, None] - 1)
    assert (ends == TOKENIZER.eos_id).all()
    assert batch.weight.tolist() == [2.5, 1.0]


def test_labelled_batch(tmp_path: Path) -> None:
    rows = [
        {"prompt": "How many?", "response": "3.", "correct": True},
        {"prompt": "How many?", "response": "5 books.", "correct": 0.25},
    ]
    batch = load_labelled(plain(lines(tmp_path / "l.jsonl", rows)), TOKENIZER).batch(torch.tensor([1, 0]))
    assert [TOKENIZER.decode(row.tolist()) for row in batch.tokens] == ["How many? 5 books.", "How many? 3."]
    assert batch.correct.tolist() == [0.25, 1.0]
    assert batch.weight.tolist() == [1.0, 1.0]
    assert batch.lengths.tolist() == [8, 7]


def test_parquet_and_a_directory_through_datasets_equal_json_lines(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "How many?", "response": "3."}, {"prompt": "Tom?", "response": "5."}]
    expected = load_sft(plain(lines(tmp_path / "rows.jsonl", rows)), TOKENIZER)
    (tmp_path / "hub").mkdir()
    file = tmp_path / "hub" / "train.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(file))
    for source in (str(file), str(tmp_path / "hub")):
        found = load_sft(plain(source), TOKENIZER)
        assert found.rows == expected.rows


def test_text_that_looks_like_a_date_or_a_number_stays_text(tmp_path: Path) -> None:
    source = lines(
        tmp_path / "p.jsonl", [{"prompt": "How many?", "answer": "2024-01-01"}, {"prompt": "Tom?", "answer": "1"}]
    )
    assert load_prompts(plain(source), TOKENIZER).answers == ["2024-01-01", "1"]


def test_built_in_task_feeds_every_kind_within_its_short_limit() -> None:
    config = plain("arithmetic", max_tokens=64, arithmetic=ArithmeticConfig(rows=200))
    loads: list[Load] = [load_prompts, load_sft, load_preferences, load_labelled]
    sets = [load(config, TOKENIZER) for load in loads]
    assert [len(found) for found in sets[:2]] == [200, 200]
    # BOS, five for the start, four a step, seven for the question: two or three steps.
    assert {len(ids) for ids in load_prompts(config, TOKENIZER).tokens} == {21, 25}
    # At most six tokens a step, five for the answer, EOS.
    assert max(found.longest for found in sets) == 25 + 24
    heldout = load_prompts(plain("arithmetic", split="heldout", arithmetic=ArithmeticConfig(rows=200)), TOKENIZER)
    assert not {tuple(ids) for ids in heldout.tokens} & {tuple(ids) for ids in load_prompts(config, TOKENIZER).tokens}


PROMPT = {"prompt": "How many?"}
BAD: list[tuple[Load, dict, str, str]] = [
    (load_prompts, {}, "prompt", "missing; the row has []"),
    (load_prompts, {"prompt": None}, "prompt", "missing"),
    (load_prompts, {"prompt": 5}, "prompt", "5 is not text"),
    (load_prompts, {"prompt": " \n"}, "prompt", "empty"),
    (load_prompts, {"prompt": []}, "prompt", "[] is not a conversation"),
    (load_prompts, {"prompt": [{"role": "user"}]}, "prompt", "needs a role and a content"),
    (load_prompts, {"prompt": ["How"]}, "prompt", "needs a role and a content"),
    (load_prompts, {"prompt": [{"role": "user", "content": "How"}]}, "prompt", "set template=chat"),
    (load_prompts, {"prompt": "How elephants?"}, "prompt", "'elephants'"),
    (load_prompts, {**PROMPT, "answer": True}, "answer", "True is not text"),
    (load_sft, PROMPT, "response", "missing; the row has ['prompt']"),
    (load_sft, {**PROMPT, "response": ""}, "response", "empty"),
    (load_sft, {**PROMPT, "response": "elephants"}, "response", "'elephants'"),
    (load_sft, {"messages": "How"}, "messages", "'How' is not a conversation"),
    (load_sft, {"messages": [{"role": "user", "content": "How"}]}, "messages", "must end with the assistant"),
    (load_sft, {"messages": [{"role": "assistant", "content": "How"}]}, "messages", "after at least one other turn"),
    (load_preferences, {**PROMPT, "chosen": "3."}, "rejected", "missing"),
    (load_preferences, {**PROMPT, "rejected": "3."}, "chosen", "missing"),
    (load_preferences, {**PROMPT, "chosen": "3.", "rejected": "3."}, "rejected", "the same text"),
    (load_preferences, {**PROMPT, "chosen": "3.", "rejected": "5.", "margin": "2"}, "margin", "'2' is not a number"),
    (load_preferences, {**PROMPT, "chosen": "3.", "rejected": "5.", "margin": -1}, "margin", "-1 is out of range"),
    (load_preferences, {**PROMPT, "chosen": "3.", "rejected": "5.", "margin": 0}, "margin", "0 is out of range"),
    (load_labelled, {**PROMPT, "response": "3."}, "correct", "missing"),
    (load_labelled, {**PROMPT, "response": "3.", "correct": "yes"}, "correct", "'yes' is not a number"),
    (load_labelled, {**PROMPT, "response": "3.", "correct": 1.5}, "correct", "1.5 is out of range; use 0 to 1"),
    (load_labelled, {**PROMPT, "response": "3.", "correct": float("nan")}, "correct", "nan is out of range"),
    (load_labelled, {**PROMPT, "correct": 1}, "response", "missing"),
]


@pytest.mark.parametrize(("load", "row", "column", "problem"), BAD)
def test_a_bad_row_is_named_by_file_row_and_column(
    load: Load, row: dict, column: str, problem: str, tmp_path: Path
) -> None:
    good = {**PROMPT, "response": "3.", "chosen": "3.", "rejected": "5.", "correct": 1}
    source = lines(tmp_path / "rows.jsonl", [good, good, row])
    with pytest.raises(DataError) as caught:
        load(plain(source), TOKENIZER)
    message = str(caught.value)
    assert message.startswith(f"bad row: {source}, row 3, column '{column}': ")
    assert problem in message
    assert message.endswith(".")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"prompt": ', "row 2, character 11: not JSON"),
        (b"", "row 2, character 1: not JSON"),
        (b"[1, 2]", "row 2: [1, 2]; every line must be one JSON object"),
        (b'"text"', "row 2: 'text'; every line must be one JSON object"),
        (b'{"prompt": "\xff"}', "row 2: not UTF-8"),
    ],
)
def test_lines_that_are_not_rows(line: bytes, problem: str, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b'{"prompt": "How many?"}\n' + line + b'\n{"prompt": "Tom?"}\n')
    with pytest.raises(DataError) as caught:
        load_prompts(plain(str(source)), TOKENIZER)
    assert f"bad row: {source}, {problem}" in str(caught.value)


def test_a_bad_row_of_a_parquet_file(tmp_path: Path) -> None:
    import datasets

    source = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"prompt": ["How many?", None]}).to_parquet(str(source))
    with pytest.raises(DataError, match=r"rows.parquet, row 2, column 'prompt': missing"):
        load_prompts(plain(str(source)), TOKENIZER)


def test_missing_empty_and_unreadable_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not exist: .*no\.jsonl"):
        load_prompts(plain(str(tmp_path / "no.jsonl")), TOKENIZER)
    for source in (str(tmp_path / "no.parquet"), str(tmp_path / "no"), "./no", "some/other/no.csv"):
        with pytest.raises(DataError, match=f"does not exist: {source}"):
            load_prompts(plain(source), TOKENIZER)
    with pytest.raises(DataError, match="data is empty"):
        load_prompts(plain(lines(tmp_path / "empty.jsonl", [])), TOKENIZER)
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"cannot be read: .*bad\.parquet"):
        load_prompts(plain(str(tmp_path / "bad.parquet")), TOKENIZER)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"cannot be read: .*nothing"):
        load_prompts(plain(str(tmp_path / "nothing")), TOKENIZER)


def test_splits_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'test'; choose train or heldout"):
        load_prompts(plain("arithmetic", split="test"), TOKENIZER)
    with pytest.raises(ConfigError, match="a file is one split"):
        load_prompts(plain(lines(tmp_path / "p.jsonl", [PROMPT]), split="heldout"), TOKENIZER)


def test_overlong_rows_are_listed_or_dropped_when_asked(tmp_path: Path) -> None:
    # 4 tokens each, and 6 in rows 2, 4, 6, ..., 16.
    rows = [{"prompt": "How many?" if number % 2 else "How many books has?"} for number in range(1, 17)]
    source = lines(tmp_path / "p.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load_prompts(plain(source, max_tokens=5), TOKENIZER)
    assert "8 of 16" in str(caught.value)
    assert "row (tokens) 2 (6), 4 (6), 6 (6), 8 (6), 10 (6) and 3 more" in str(caught.value)
    kept = load_prompts(plain(source, max_tokens=5, overlong="drop"), TOKENIZER)
    assert (len(kept), kept.dropped) == (8, 8)
    assert kept.batch(torch.arange(8)).ids.tolist() == [0, 2, 4, 6, 8, 10, 12, 14]
    assert len(load_prompts(plain(source, max_tokens=6), TOKENIZER)) == 16
    with pytest.raises(DataError, match=r"no row is left: all 16 .* the shortest has 4"):
        load_prompts(plain(source, max_tokens=3, overlong="drop"), TOKENIZER)


@pytest.mark.parametrize("load", [load_sft, load_preferences, load_labelled])
def test_the_limit_counts_prompt_response_and_eos(load: Load, tmp_path: Path) -> None:
    # 4 + 2 + EOS; the rejected response is one longer.
    row = {**PROMPT, "response": "3.", "chosen": "3.", "rejected": "5 5.", "correct": 1}
    longest = 8 if load is load_preferences else 7
    source = lines(tmp_path / "p.jsonl", [row])
    assert load(plain(source, max_tokens=longest), TOKENIZER).longest == longest
    with pytest.raises(DataError, match=f"max_tokens={longest - 1}"):
        load(plain(source, max_tokens=longest - 1), TOKENIZER)


def test_prompt_set_smaller_than_the_rollout_batch() -> None:
    prompts = load_prompts(plain("arithmetic", arithmetic=ArithmeticConfig(rows=10)), TOKENIZER)
    check_prompt_count(prompts, 10)
    with pytest.raises(ConfigError, match="10 prompts, 11 needed"):
        check_prompt_count(prompts, 11)


def test_pad_right() -> None:
    tokens, lengths = pad_right([[1], [2, 3]], 9)
    assert tokens.tolist() == [[1, 9], [2, 3]]
    assert lengths.tolist() == [1, 2]
