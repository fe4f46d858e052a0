"""Checks that input must pass before a model is built; each message names the setting, the values and the remedy."""

from __future__ import annotations

from pathlib import Path

from megarlhf.checkpoint.sharded import ModelDescription, describe_model, tokenizer_directory
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import Tokenizer, build_tiny_tokenizer, load_tokenizer
from megarlhf.errors import ConfigError
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.layout import ParallelLayout

BUILT_IN_TOKENIZER = "arithmetic"


def check_batch(name: str, batch: int, layout: ParallelLayout, micro_batch: int) -> None:
    """Check that `batch` rows divide over data ranks and micro-batches.

    Raises:   ConfigError naming the numbers. The interleaved schedule wants a multiple of the stages in micro-batches.
    """
    if batch % layout.data:
        raise ConfigError(
            f"{name}={batch} does not divide over layout.data={layout.data} ranks; use a multiple of {layout.data}."
        )
    share = batch // layout.data
    if share % micro_batch:
        raise ConfigError(
            f"{name}={batch} is {share} rows a data rank, not divisible by micro_batch={micro_batch}; "
            f"set micro_batch to a divisor of {share}."
        )
    if layout.virtual_pipeline > 1 and (share // micro_batch) % layout.pipeline:
        raise ConfigError(
            f"{name}={batch} makes {share // micro_batch} micro-batches, but the interleaved schedule needs a multiple "
            f"of layout.pipeline={layout.pipeline}; change micro_batch={micro_batch}."
        )


def resolve_tokenizer(tokenizer: str, init: str) -> Tokenizer:
    """The tokenizer called `tokenizer`: "" for the model's own, "arithmetic" for the tiny one, else a directory.

    Raises:   ConfigError or CheckpointError when there is none.
    """
    if tokenizer == BUILT_IN_TOKENIZER:
        return build_tiny_tokenizer(words())
    return load_tokenizer(Path(tokenizer) if tokenizer else tokenizer_directory(init))


def check_tokenizer(tokenizer: Tokenizer, spec: ModelSpec, name: str) -> None:
    """Raise ConfigError where the tokenizer makes ids that the model has no row for."""
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but {name} has {spec.vocab_size} embedding rows; "
            "use the model's own tokenizer."
        )


def check_context(name: str, tokens: int, spec: ModelSpec) -> None:
    """Raise ConfigError where rows of `tokens` tokens exceed the model's context."""
    if tokens > spec.max_positions:
        raise ConfigError(
            f"{name} = {tokens} tokens, which exceed the model's context of {spec.max_positions}; lower {name} or use "
            "another model."
        )


def checked_model(init: str, layout: ParallelLayout, name: str) -> ModelDescription:
    """The model behind `init`, once it is known to fit the layout."""
    found = describe_model(init)
    found.spec.check_layout(layout, name)
    return found
