"""A tokenizer that reads every text."""

from __future__ import annotations

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megarlhf.data.tokenizer import LLAMA3_CHAT_TEMPLATE, Tokenizer

SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>"]


def of_bytes(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None = None, template: str = LLAMA3_CHAT_TEMPLATE
) -> Tokenizer:
    """One token a byte, as Llama 3's spells what it has no word for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: at for at, token in enumerate([*SPECIAL, *alphabet])}, []))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_tokenizer is None)
    backend.pre_tokenizer = (
        byte_level if pre_tokenizer is None else pre_tokenizers.Sequence([pre_tokenizer, byte_level])
    )
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[3],
        pad_token=SPECIAL[4],
        extra_special_tokens=SPECIAL[1:3],
        chat_template=template,
    )
    return Tokenizer(fast, "a tokenizer of bytes")
