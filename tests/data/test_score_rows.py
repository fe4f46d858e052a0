"""What is scored of rows: an empty response is its end alone, as `generate` writes it of a model that ends at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarlhf.data.score_rows import load_score_rows
from megarlhf.errors import DataError
from tests.helpers.bytes_tokenizer import of_bytes

BYTES = of_bytes()


def test_an_empty_response_is_its_end(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "Hi", "response": text}) + "\n" for text in ("", "a")))
    found = load_score_rows(rows, lambda: BYTES, "chat")
    found.check(BYTES.vocab_size, 512, ())
    batch = found.batch([0, 1])
    asked = BYTES.encode_chat([{"role": "user", "content": "Hi"}])
    assert batch.tokens[0, : batch.lengths[0]].tolist() == [*asked, *BYTES.eos_ids[:1]]
    assert batch.loss_mask.sum(1).tolist() == [1, 2]


@pytest.mark.parametrize("row", [{"prompt": "", "response": ""}, {"prompt": "Hi", "response": " "}])
def test_what_is_blank_otherwise_is_refused(row: dict[str, str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1, column '(prompt|response)': empty"):
        load_score_rows(rows, lambda: BYTES, "chat").check(BYTES.vocab_size, 512, ())
