"""Conversations as tokens: those of the chat template, and the turns that are taught."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megarlhf.data.dialogue import Supervise, encode_dialogue
from megarlhf.data.rows import DataConfig
from megarlhf.data.sft import load_sft
from megarlhf.data.tokenizer import LLAMA3_CHAT_TEMPLATE, Message, Tokenizer
from megarlhf.errors import DataError
from tests.helpers.bytes_tokenizer import of_bytes
from tests.helpers.llama3 import llama3, meta, needed, of_meta

MARKED = LLAMA3_CHAT_TEMPLATE.replace(
    "{{ (message['content'] | trim) + '<|eot_id|>' }}",
    "{%- if message['role'] == 'assistant' -%}{% generation %}{{ (message['content'] | trim) + '<|eot_id|>' }}"
    "{% endgeneration %}{%- else -%}{{ (message['content'] | trim) + '<|eot_id|>' }}{%- endif -%}",
)
"""Llama 3's template, which says what the assistant wrote."""
LINES = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}\n{{ m['content'] }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
)
"""A template of ChatML's kind: a line break follows the token that ends a turn."""
TALKS: list[list[Message]] = [
    [{"role": "user", "content": "Name a prime."}, {"role": "assistant", "content": "Seven."}],
    [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "  2 + 2?\n\n"},
        {"role": "assistant", "content": "\n\n4, d'accord \U0001f600\n"},
        {"role": "user", "content": "And 12345 * 2?"},
        {"role": "assistant", "content": "24690."},
    ],
    [
        {"role": "user", "content": "def f(x):\n\treturn x  # café"},
        {"role": "assistant", "content": "```python\nprint(f(3))\n```"},
        {"role": "assistant", "content": "Done."},
    ],
]


def of_template(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Ids and mask as transformers gives them."""
    fast: Any = tokenizer._fast
    found = fast.apply_chat_template(
        [dict(turn) for turn in messages], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(found["input_ids"]), list(found["assistant_masks"])


def mask(spans: Sequence[tuple[int, int]], length: int) -> list[int]:
    taught = {at for first, last in spans for at in range(first, last)}
    return [int(at in taught) for at in range(length)]


def check_against_transformers(plain: Tokenizer, marked: Tokenizer) -> None:
    for messages in TALKS:
        ids, assistant = of_template(marked, messages)
        assert sum(assistant) > 0
        for tokenizer in (marked, plain):
            found = encode_dialogue(tokenizer, messages, "chat", "all")
            assert found.ids == ids
            assert mask(found.spans, len(ids)) == assistant
            last = encode_dialogue(tokenizer, messages, "chat", "last")
            assert last.ids == ids
            assert last.spans == found.spans[-1:]
        assert plain.encode_chat(messages[:-1]) == ids[: last.spans[0][0]]


def test_ids_and_mask_are_the_template_s_own() -> None:
    check_against_transformers(of_bytes(), of_bytes(template=MARKED))


@needed
def test_ids_and_mask_are_the_template_s_own_with_llama_3_s_tokenizer() -> None:
    check_against_transformers(llama3(), llama3(MARKED))


@needed
def test_llama_3_s_tokens_are_those_of_meta_s_code() -> None:
    """Special tokens, and the format of whole conversations, by the package that Meta publishes."""
    ours, theirs = llama3(), meta()
    assert (ours.vocab_size, ours.bos_id, ours.eos_id, ours.pad_id) == (
        *(theirs.n_words, theirs.bos_id, theirs.eot_id, theirs.pad_id),
    )
    for text in (
        "Hello  world\n\n it's 12345",
        "café \U0001f600\u200d naïve",
        "\tx = 'a'\r\n\n  ",
        "don't  \n",
    ):
        assert ours.encode(text) == theirs.encode(text, bos=False, eos=False)
        assert ours.decode(ours.encode(text)) == text
    for messages in TALKS:
        # Meta's code takes contents as they are; the published template trims them.
        stripped: list[Message] = [{"role": m["role"], "content": m["content"].strip()} for m in messages[:-1]]
        assert ours.encode_chat(messages[:-1]) == of_meta(stripped)


@needed
def test_offsets_of_llama_3_s_tokens_lie_beside_each_other() -> None:
    for messages in TALKS:
        rendered = llama3().rendered(messages, add_generation_prompt=False)
        ids, offsets = llama3().encode_rendered(rendered)
        assert len(ids) == len(offsets)
        assert (offsets[0][0], offsets[-1][1]) == (0, len(rendered.text))
        assert all(first <= last for first, last in offsets)
        covered = {at for first, last in offsets for at in range(first, last)}
        assert covered == set(range(len(rendered.text)))


def test_what_follows_the_end_of_a_turn_is_not_taught() -> None:
    tokenizer = of_bytes(template=LINES)
    found = encode_dialogue(tokenizer, TALKS[1], "chat", "all")
    assert [tokenizer.decode_all(found.ids[first:last]) for first, last in found.spans] == [
        "\n\n4, d'accord \U0001f600\n<|eot_id|>",
        "24690.<|eot_id|>",
    ]
    assert found.ids[-1] == tokenizer.eos_id


def test_a_template_that_leaves_the_end_to_the_sampler_gets_it() -> None:
    bare = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = of_bytes(template=bare)
    found = encode_dialogue(tokenizer, TALKS[0], "chat")
    assert tokenizer.decode_all(found.ids) == "user: Name a prime.\nassistant: Seven.\n<|eot_id|>"
    assert tokenizer.decode_all(found.ids[found.spans[0][0] :]) == "Seven.\n<|eot_id|>"
    with pytest.raises(DataError, match=r"ends not every turn of the assistant with '<\|eot_id\|>'.*; set supervise=l"):
        encode_dialogue(tokenizer, TALKS[1], "chat", "all")


FORGETS = LINES.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] != 'assistant' else '...' }}")
"""A template that writes an answer otherwise once others follow, as those do that drop thoughts."""


@pytest.mark.parametrize(
    ("template", "messages", "supervise", "message"),
    [
        (FORGETS, TALKS[1], "all", r"writes the turns before turn 3 otherwise .* or set supervise=last\."),
        (
            LINES.replace("assistant\n{% endif", "assistant\nHm{% endif"),
            TALKS[0],
            "last",
            "turn 2 .* or give prompt",
        ),
        (LINES, TALKS[0][1:] + TALKS[0], "all", "the assistant speaks first, after no prompt"),
        (LINES + "{% generation %}{% endgeneration %}", TALKS[0], "all", "marks nothing that the assistant wrote"),
    ],
)
def test_turns_that_cannot_be_told_apart_are_refused(
    template: str, messages: list[Message], supervise: Supervise, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        encode_dialogue(of_bytes(template=template), messages, "chat", supervise)


def test_the_batch_teaches_what_the_setting_says(tmp_path: Path) -> None:
    import torch

    tokenizer = of_bytes()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in TALKS[:2]))
    config = DataConfig(source=str(tmp_path / "rows.jsonl"))
    taught: dict[Supervise, list[str]] = {}
    for supervise in ("last", "all"):
        batch = load_sft(config, tokenizer, supervise).batch(torch.tensor([1, 0]))
        rows = zip(batch.labels, batch.loss_mask, strict=True)
        taught[supervise] = [tokenizer.decode_all(labels[kept].tolist()) for labels, kept in rows]
    assert taught["last"] == ["24690.<|eot_id|>", "Seven.<|eot_id|>"]
    assert taught["all"] == ["4, d'accord \U0001f600<|eot_id|>24690.<|eot_id|>", "Seven.<|eot_id|>"]


def test_control_tokens_of_a_turn_are_letters_in_spans_too() -> None:
    tokenizer = of_bytes().taking("text")
    talk: list[Message] = [
        {"role": "user", "content": "a<|eot_id|>b"},
        {"role": "assistant", "content": "c<|eot_id|>d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
    ]
    found = encode_dialogue(tokenizer, talk, "chat", "all")
    assert [found.ids[last - 1] for _, last in found.spans] == [tokenizer.eos_id] * 2
    assert [tokenizer.decode_all(found.ids[first:last]) for first, last in found.spans] == [
        "c<|eot_id|>d<|eot_id|>",
        "f<|eot_id|>",
    ]
    assert found.ids.count(tokenizer.eos_id) == 4
    assert found.ids == tokenizer.encode_chat(talk, add_generation_prompt=False)
