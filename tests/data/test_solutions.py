"""Solutions to be labelled: where they are parted, and which cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarlhf.data.arithmetic import words
from megarlhf.data.rows import DataConfig
from megarlhf.data.solutions import SolutionSet, load_solutions
from megarlhf.data.tokenizer import Tokenizer, build_tiny_tokenizer
from megarlhf.errors import DataError
from tests.data.test_shapes import written
from tests.helpers.bytes_tokenizer import of_bytes
from tests.helpers.llama3 import llama3, needed

ROW = {"prompt": "Tom has 5 apples.", "answer": "8"}
BYTES = of_bytes()


def solutions(folder: Path, separator: str, tokenizer: Tokenizer = BYTES, **columns: Any) -> SolutionSet:
    source = written(folder / "rows.jsonl", {**ROW, **columns})
    return load_solutions(DataConfig(source=source, template="plain"), separator, tokenizer)


def test_a_response_is_parted_where_it_has_the_separator_and_text_between(tmp_path: Path) -> None:
    (found,) = solutions(tmp_path, "\n\n", response="a\n\n\n\nbc\n\n ").solutions
    assert found.steps == ["a", "bc"]
    assert (found.ends, len(found.response)) == ([1, 5], 6)
    first = (*found.prompt, *found.response[:2])
    assert found.beginnings() == [first]
    assert BYTES.decode(first[len(found.prompt) :]) == "a\n"


def test_a_response_of_separators_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1, column 'response': nothing but '\.', which parts steps"):
        solutions(tmp_path, ".", response=". .")


def test_a_text_that_the_tokenizer_changes_is_refused(tmp_path: Path) -> None:
    """Its steps would end, and be gone on from, where the text does not say."""
    said = "5 + 3 = 8.\n\n8 + 1 = 9.\n\nThe answer is 9."
    with pytest.raises(DataError, match=r"joined by '\\n\\n'; set a separator that it knows"):
        solutions(tmp_path, "\n\n", build_tiny_tokenizer(words()), response=said)
    (found,) = solutions(tmp_path, ". ", build_tiny_tokenizer(words()), response=said.replace("\n\n", " ")).solutions
    assert len(found.ends) == 3


@needed
def test_steps_that_end_with_one_token_are_refused(tmp_path: Path) -> None:
    """Nothing could be gone on with between them."""
    with pytest.raises(DataError, match=r"row 1, column 'steps': steps 1 and 2 end with one token, '\?\?\?'"):
        solutions(tmp_path, "?", llama3(), steps=["It is 9", "?", "So."])
