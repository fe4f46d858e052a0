"""What both sides are given: sizes, a random Llama, prompts, where responses end, and how one is judged."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megarlhf.batch.rollouts import Prompts
from megarlhf.rollout.controller import Ledger
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import SamplingConfig

EOS, PAD = 0, 1
"""EOS is the first token: inverse-CDF sampling draws it for a random number of 0. No prompt has either."""
SHORTEST = 4
"""Shortest ragged response, in tokens."""


@dataclass(frozen=True)
class Sizes:
    """The workload; micro_batch and peer_micro_batch are rows of one forward pass, ours and theirs."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    prompts: int
    group: int
    prompt_tokens: int
    new_tokens: int
    micro_batch: int
    peer_micro_batch: int

    @property
    def rows(self) -> int:
        """Rollouts of an iteration."""
        return self.prompts * self.group


class FixedLengths(RolloutEngine):
    """Draws EOS exactly where told: its random numbers are 0 there, and elsewhere too large for the first token."""

    response_lengths: Tensor

    def _ledger(self, rows: Prompts, streams: Tensor, sampling: SamplingConfig, seed: int) -> Ledger:
        return ending_at(super()._ledger(rows, streams, sampling, seed), self.response_lengths, sampling)


def ending_at(ledger: Ledger, lengths: Tensor, sampling: SamplingConfig) -> Ledger:
    """The ledger, with random numbers that end responses after `lengths` [B] tokens.

    One of all the tokens that it may have is cut, and ends in whatever comes.
    """
    draws = ledger.uniforms.clamp(min=0.1)
    last = (ledger.starts + lengths - 1)[:, None]
    kept = draws.gather(1, last) * (lengths == sampling.max_new_tokens)[:, None]
    return replace(ledger, uniforms=draws.scatter(1, last, kept))


def response_lengths(sizes: Sizes) -> dict[str, Tensor]:
    """[B] each: `equal` ones, of which none ends before the limit, and `ragged` ones, uniform from SHORTEST to it."""
    draws = torch.Generator().manual_seed(3)
    return {
        "equal": torch.full((sizes.rows,), sizes.new_tokens),
        "ragged": torch.randint(SHORTEST, sizes.new_tokens + 1, (sizes.rows,), generator=draws),
    }


def prompts_of(sizes: Sizes) -> Prompts:
    """Random tokens, all of one length."""
    shape = (sizes.prompts, sizes.prompt_tokens)
    tokens = torch.randint(2, sizes.vocab, shape, generator=torch.Generator().manual_seed(2))
    return Prompts(tokens, torch.full(shape[:1], shape[1]), torch.arange(shape[0]), ("",) * shape[0])


def score(_prompt: object, response: str, _answer: str, _columns: object) -> float:
    """A judge that costs nothing, and tells responses to one prompt apart: the share of words that are new."""
    words = response.split()
    return len(set(words)) / max(1, len(words))


def write_models(sizes: Sizes, directory: Path) -> None:
    """A language model and a reward model of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        intermediate_size=sizes.ffn,
        vocab_size=sizes.vocab,
        rms_norm_eps=1e-5,
        max_position_embeddings=max(256, sizes.prompt_tokens + sizes.new_tokens),
        bos_token_id=None,
        eos_token_id=None,
    )
    config.num_labels = 1
    LlamaForCausalLM(config).save_pretrained(directory / "language")
    LlamaForSequenceClassification(config).save_pretrained(directory / "scalar")


def write_tokenizer(vocab: int, directory: Path) -> list[str]:
    """A tokenizer with one word a token, EOS and PAD first, in `directory`/tokenizer; the words by their token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", *(f"w{token}" for token in range(2, vocab))]
    made = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token=words[PAD]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=words[EOS], pad_token=words[PAD])
    fast.save_pretrained(directory / "tokenizer")
    return words


def write_texts(sizes: Sizes, directory: Path) -> list[str]:
    """A tokenizer with one word a token, and the prompts as texts of it, which are returned."""
    words = write_tokenizer(sizes.vocab, directory)
    texts = [" ".join(words[token] for token in row) for row in prompts_of(sizes).tokens.tolist()]
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return texts
