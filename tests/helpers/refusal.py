"""Commands with small good input that a test spoils in one place, and what a refusal must look like."""

from __future__ import annotations

import re
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import build_tiny_tokenizer

SFT = (
    "sft",
    "model=tiny-xs",
    "tokenizer=arithmetic",
    "data.template=plain",
    "data.arithmetic.rows=64",
    "global_batch=16",
)
REWARD = (
    *("reward", "model=tiny-xs", "tokenizer=arithmetic", "labelled.template=plain", "labelled.arithmetic.rows=64"),
    *("labelled_batch=16",),
)
DPO = (
    *("dpo", "model=tiny-xs", "tokenizer=arithmetic", "pairs.template=plain", "pairs.arithmetic.rows=64"),
    "global_batch=16",
)
PPO = (
    *("ppo", "actor.init=tiny-xs", "reward.init=tiny-xs", "tokenizer=arithmetic", "prompts.template=plain"),
    *(
        "prompts.arithmetic.rows=32",
        "rollout_batch=16",
        "global_batch=16",
        "sampling.max_new_tokens=16",
        "iterations=2",
    ),
)
GENERATE = (
    *("generate", "model=tiny-xs", "tokenizer=arithmetic", "prompts.template=plain", "prompts.arithmetic.rows=4"),
    "sampling.max_new_tokens=16",
)

EVAL = (
    *("eval", "model=tiny-xs", "tokenizer=arithmetic", "prompts.template=plain", "prompts.arithmetic.rows=4"),
    "sampling.max_new_tokens=16",
)


class ModelWasBuiltError(Exception):
    """A model was about to be built, so no check had found fault."""


def write_model(
    path: Path, *, layers: int = 2, ffn_size: int = 192, vocab_size: int = 160, shard: str = "1GB", scalar: bool = False
) -> None:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=ffn_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    if scalar:
        config.num_labels = 1
    kind = LlamaForSequenceClassification if scalar else LlamaForCausalLM
    kind(config).save_pretrained(path, max_shard_size=shard)
    build_tiny_tokenizer(words()).save(path)


def assert_matches(said: str, message: str) -> None:
    """`message` may skip words with `.*`; everything else in it is literal."""
    pattern = ".*".join(map(re.escape, message.split(".*")))
    assert re.search(pattern, said), said
