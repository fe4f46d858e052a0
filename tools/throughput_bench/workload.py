"""What a measured run works on: its own settings, with random weights, made-up prompts, and nothing but iterations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.config.load import load_config
from megarlhf.errors import ConfigError, MegarlhfError
from megarlhf.models.spec import ModelSpec
from megarlhf.runtime.checks import checked_model
from megarlhf.trainers.policy_config import PolicyConfig
from megarlhf.trainers.policy_loop import Cast
from megarlhf.trainers.ppo import PPOConfig
from tools.step_bench.workload import EOS, PAD
from tools.throughput_bench.lengths import EndsWhereTold, Lengths

QUIET = (
    *("save_every=0", "eval_every=0", "patience=0", "heldout=null", "gates=off", "tensorboard=false", "wandb=false"),
    *("samples=0", "verifier=none", "stop_when_over_optimised=false", "kl_bound=null"),
)
"""What a run does besides its iterations is left out, so that it is not measured."""


def measured_settings(
    config: type[PolicyConfig], path: Path | None, overrides: list[str], folder: Path, iterations: int
) -> PolicyConfig:
    """The settings of the run file, for `iterations` iterations, with prompts and tokenizer that `write_texts` makes.

    Raises:   ConfigError where the settings are not right, or name models that are not there.
    """
    # PPO warms its critic up without the actor, whose steps are what is to be measured.
    warm = ["value_warmup_iterations=0"] if issubclass(config, PPOConfig) else []
    made = [f"tokenizer={folder / 'tokenizer'}", f"prompts.source={folder / 'prompts.jsonl'}", "prompts.columns={}"]
    run = [f"run_dir={folder / 'run'}", f"iterations={iterations}", "prompts.template=plain", "prompts.split=''"]
    learners = ("actor", "critic") if warm else ("actor",)
    constant = [f"{name}.optim.warmup_steps=0" for name in learners]  # or there would have to be more steps
    return load_config(config, path, [*overrides, *QUIET, *warm, *made, *run, *constant])


def actor_spec(cfg: PolicyConfig) -> ModelSpec:
    """Of the policy.

    Raises:   ConfigError naming the preset that stands for a directory that is not there.
    """
    try:
        return checked_model(cfg.actor.init, cfg.layout, "actor.init").spec
    except MegarlhfError as error:
        remedy = (
            "the weights may be random: name a preset for each model, as actor.init=llama3-8b reward.init=llama3-8b"
        )
        raise ConfigError(f"{str(error).rstrip('.')}; {remedy}.") from None


def write_texts(folder: Path, vocab: int, lengths: Tensor) -> None:
    """A tokenizer with one word a token, and prompts of random words, of `lengths` [n] tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", *(f"w{token}" for token in range(2, vocab))]
    made = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token=words[PAD]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=words[EOS], pad_token=words[PAD])
    fast.save_pretrained(folder / "tokenizer")
    draw = torch.Generator().manual_seed(2)
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for length in lengths.tolist():
            tokens = torch.randint(2, vocab, (length,), generator=draw).tolist()
            file.write(json.dumps({"prompt": " ".join(words[token] for token in tokens), "answer": "18"}) + "\n")


def ending_where_told(cast: Any, lengths: Lengths) -> Any:
    """The cast, with a sampler over the same weights whose responses are as long as `lengths` says."""
    given: Cast = cast
    sampler = EndsWhereTold(
        given.actor,
        eos_ids=(EOS,),
        pad_id=PAD,
        max_sequence_length=given.sampler.max_sequence_length,
        settings=given.sampler.settings,
    )
    sampler.lengths = lengths
    return replace(given, sampler=sampler)
