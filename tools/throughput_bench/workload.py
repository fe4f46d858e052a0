"""What a measured run works on: its own settings, with random weights, made-up rows, and nothing but iterations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megarlhf.config.load import load_config
from megarlhf.errors import ConfigError, MegarlhfError
from megarlhf.models.spec import ModelSpec
from megarlhf.runs.settings import RunConfig
from megarlhf.runtime.checks import checked_model
from megarlhf.trainers.policy_config import PolicyConfig
from megarlhf.trainers.policy_loop import Cast
from megarlhf.trainers.trainer import Trainer
from tools.step_bench.workload import EOS, PAD, write_tokenizer
from tools.throughput_bench.kinds import Kind, kind_of
from tools.throughput_bench.lengths import EndsWhereTold, Lengths

QUIET = (
    *("save_every=0", "keep_every=0", "keep_best=''", "save_before=0", "eval_every=0", "patience=0"),
    *("tensorboard=false", "wandb=false"),
)
"""What a run does besides its iterations is left out, so that it is not measured."""


def measured_settings(
    trainer: Trainer[Any, Any, Any], path: Path | None, overrides: list[str], folder: Path, iterations: int
) -> tuple[RunConfig, Kind]:
    """The settings of the run file, for `iterations` iterations of rows that `write_rows` makes; and what they are.

    Raises:   ConfigError where the settings are not right, or name models that are not there.
    """
    own = [*overrides, *QUIET, f"run_dir={folder / 'run'}"]
    kind = kind_of(load_config(trainer.config, path, own), iterations)
    made = [each for name in kind.sets for each in _made_up(name, folder)]
    cfg = load_config(trainer.config, path, [*own, *kind.settings, f"tokenizer={folder / 'tokenizer'}", *made])
    return cfg, kind


def _made_up(name: str, folder: Path) -> list[str]:
    """That the rows of the setting `name` are those that `write_rows` makes."""
    values = {"source": folder / f"{name}.jsonl", "columns": "{}", "mix": "{}", "subset": "''", "split": "''"}
    return [f"{name}.{setting}={value}" for setting, value in {**values, "template": "plain"}.items()]


def first_spec(cfg: RunConfig, kind: Kind) -> ModelSpec:
    """Of the first model, once all are known to be there.

    Raises:   ConfigError naming the preset that stands for a directory that is not there.
    """
    asked: dict[str, str] = {}
    for setting, init in kind.starts.items():
        asked.setdefault(init, setting)  # the first says it for all that start there
    try:
        found = [checked_model(init, cfg.layout, setting) for init, setting in asked.items()]
    except MegarlhfError as error:
        named = " ".join(f"{setting}=llama3-8b" for setting in asked.values())
        remedy = f"the weights may be random: name a preset for each model, as {named}"
        raise ConfigError(f"{str(error).rstrip('.')}; {remedy}.") from None
    return found[0].spec


def write_rows(folder: Path, kind: Kind, vocab: int, iterations: int, prompts: str, responses: str | None) -> None:
    """A tokenizer with one word a token, and the rows of all sets, of lengths that are distributed as told.

    responses: None for all that a row has room for.
    """
    words = write_tokenizer(vocab, folder)
    for name, rows in kind.sets.items():
        said, count = responses or f"fixed:{rows.longest_response}", iterations * rows.of_iteration
        rows.write(folder / f"{name}.jsonl", words, count, prompts, said)


def drawn_lengths(cfg: RunConfig, responses: str | None) -> Lengths | None:
    """Of the responses that a policy draws, all of the greatest where `responses` is None; None where none are drawn.

    Raises:   ConfigError where `responses` is no distribution, or goes beyond what the run allows.
    """
    if not isinstance(cfg, PolicyConfig):
        return None
    most = cfg.sampling.max_new_tokens
    return Lengths(responses or f"fixed:{most}", most)


def ending_where_told(models: Any, lengths: Lengths) -> Any:
    """The cast, with a sampler over the same weights whose responses are as long as `lengths` says."""
    given: Cast = models
    sampler = EndsWhereTold(
        given.actor,
        eos_ids=(EOS,),
        pad_id=PAD,
        max_sequence_length=given.sampler.max_sequence_length,
        settings=given.sampler.settings,
    )
    sampler.lengths = lengths
    return replace(given, sampler=sampler)
