"""The real tokenizer of Llama 3, as Meta's package llama-models has it, and as `transformers` would load it."""

from __future__ import annotations

import base64
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from megarlhf.data.tokenizer import LLAMA3_CHAT_TEMPLATE, Message, Tokenizer

needed = pytest.mark.skipif(
    importlib.util.find_spec("llama_models") is None, reason="needs llama-models, which has Llama 3's tokenizer"
)
"""Of tests that use it."""


@cache
def meta() -> Any:
    """Meta's own tokenizer."""
    return importlib.import_module("llama_models.llama3.tokenizer").Tokenizer.get_instance()


def of_meta(messages: list[Message]) -> list[int]:
    """What Meta's own code makes of a conversation, up to where the assistant speaks."""
    made = importlib.import_module("llama_models.datatypes").RawMessage
    chat = importlib.import_module("llama_models.llama3.chat_format").ChatFormat(meta())
    return chat.encode_dialog_prompt([made(**turn) for turn in messages]).tokens


def llama3(template: str = LLAMA3_CHAT_TEMPLATE) -> Tokenizer:
    """Ours, made from the same ranks."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_backend(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=template,
    )
    return Tokenizer(fast, "Llama 3's")


@cache
def _backend() -> Backend:
    theirs = meta()
    found = importlib.util.find_spec("llama_models")
    assert found is not None
    assert found.origin is not None
    lines = (Path(found.origin).parent / "llama3" / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(text): int(rank) for text, rank in (line.split() for line in lines)}
    letters = _letters()
    spelt = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (rank, ranks[left], ranks[right], spelt[left], spelt[right])
        for token, rank in ranks.items()
        for left, right in ((token[:at], token[at:]) for at in range(1, len(token)))
        if left in ranks and right in ranks
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    vocabulary = {spelt[token]: rank for token, rank in ranks.items()}
    backend = Backend(models.BPE(vocabulary, pairs, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(theirs.pat_str), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(sorted(theirs.special_tokens, key=theirs.special_tokens.__getitem__))
    return backend


def _letters() -> dict[int, str]:
    """How byte-level vocabularies spell each byte (GPT-2's table)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + at) for at, byte in enumerate(others)}
