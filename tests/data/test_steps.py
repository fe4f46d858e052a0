"""Where steps end: as the tokens that were drawn have it, and as the steps that were given have it."""

from __future__ import annotations

from functools import cache

import pytest

from megarlhf.data.arithmetic import STEP_SEPARATOR, ArithmeticConfig, step_rows, words
from megarlhf.data.steps import PARAGRAPH, given_ends, step_ends, tokens_at, tokens_at_ref
from megarlhf.data.tokenizer import Tokenizer, build_tiny_tokenizer
from tests.helpers.bytes_tokenizer import of_bytes
from tests.helpers.llama3 import llama3, needed

STEPS = {
    "sentences": ["2 + 2 = 4.", "So it is four."],
    "no stop": ["first", "second", "third"],
    "a list, whose marks merge with the line ends": ["Note:", "- one;", "- two)"],
    "letters of several bytes": ["é → ü.", "答案是四。", "🙂"],
    "line ends within": ["one\ntwo", "three\n four"],
    "one": ["The answer is 4."],
}


@cache
def of_llama3() -> Tokenizer:
    """The real one, whose tokens merge a full stop with the empty line."""
    return llama3()


TOKENIZERS = [
    pytest.param(of_bytes, id="bytes"),
    pytest.param(of_llama3, id="llama3", marks=needed),
]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("separator", [PARAGRAPH, "\n", ". ", " ки "])
@pytest.mark.parametrize("steps", STEPS.values(), ids=list(STEPS))
def test_each_step_ends_with_the_token_that_begins_its_separator(tokenizer, separator, steps):
    """Whatever tokens merge: up to the end there is the step and a piece of the separator, before it there is not."""
    known = tokenizer()
    ids = known.encode_response(separator.join(steps))
    ends = given_ends(ids, steps, separator, known)
    assert len(ends) == len(steps)
    assert ends[-1] == len(ids) - 1
    for count, end in enumerate(ends[:-1], start=1):
        through = separator.join(steps[:count])
        assert known.decode(ids[: end + 1]).startswith(through + separator[0])
        assert not known.decode(ids[:end]).startswith(through + separator[0])
    if not any(separator in step for step in steps):
        assert step_ends(ids, separator, known) == ends


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("steps", STEPS.values(), ids=list(STEPS))
def test_every_character_is_in_the_token_that_the_slow_twin_finds(tokenizer, steps):
    """Of the text, and of one that was cut, within a letter too."""
    known = tokenizer()
    ids = known.encode_response(PARAGRAPH.join(steps))
    for cut in (ids, ids[:-2], ids[:-3]):
        places = range(len(known.decode(cut)))
        assert tokens_at(cut, places, known) == tokens_at_ref(cut, places, known)


@needed
def test_many_steps_take_no_more_decoding_than_few(monkeypatch: pytest.MonkeyPatch):
    """Each token once, and the whole text once: not every step's beginning again and again."""
    known, asked = of_llama3(), []
    steps = [f"Step {number}: so it is {number}." for number in range(40)]
    ids = known.encode_response(PARAGRAPH.join(steps))
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids: asked.append(len(ids)) or decode(self, ids))
    assert len(given_ends(ids, steps, PARAGRAPH, known)) == 40
    assert len(ids) <= sum(asked) <= 2 * len(ids)


@needed
def test_the_empty_line_of_llama_3_is_many_tokens():
    """An end is never looked for by one id: a stop, a bracket and a letter each merge with the line ends otherwise."""
    known = of_llama3()
    steps = ["It is 4.", "It is (4)", "It is x", "It is 4?"]
    ids = known.encode_response(PARAGRAPH.join(steps))
    last = {ids[end] for end in step_ends(ids, PARAGRAPH, known)[:-1]}
    assert len(last) == 3


def test_empty_lines_earn_no_steps():
    """White space is no step, before, between or after others; a response without any text is one."""
    known = of_bytes()
    for text, steps in {"a\n\n\n\nb": 2, "\n\na": 1, "a\n\n": 1, "a\n\n \n\n": 1, "": 1, "\n\n\n\n": 1}.items():
        ids = known.encode_response(text)
        ends = step_ends(ids, PARAGRAPH, known)
        assert len(ends) == steps, text
        assert ends[-1] == len(ids) - 1


def test_a_cut_response_ends_a_step_where_it_was_cut():
    """Its last token, whatever that is, within a word or within the separator."""
    known = of_bytes()
    ids = known.encode("ab\n\ncd")
    assert step_ends(ids, PARAGRAPH, known) == [2, 5]
    assert step_ends(ids[:5], PARAGRAPH, known) == [2, 4]
    assert step_ends(ids[:4], PARAGRAPH, known) == [3]
    assert step_ends(ids[:3], PARAGRAPH, known) == [2]


def test_steps_of_the_built_in_task():
    """The rows say where each begins to be wrong: right so far is 1, and from the first mistake on 0."""
    known = build_tiny_tokenizer(words())
    rows = step_rows(ArithmeticConfig(rows=300), "train")
    for row in rows:
        ids = known.encode_response(STEP_SEPARATOR.join(row["steps"]))
        ends = given_ends(ids, row["steps"], STEP_SEPARATOR, known)
        assert step_ends(ids, STEP_SEPARATOR, known) == ends
        assert [known.decode([ids[end]]) for end in ends[:-1]] == ["."] * (len(ends) - 1)
        assert row["labels"] == sorted(row["labels"], reverse=True)
    assert {len(row["steps"]) for row in rows} >= {1, 2, 3, 4}
    right = sum(row["labels"][-1] for row in rows) / len(rows)
    assert 0.3 < right < 0.45
