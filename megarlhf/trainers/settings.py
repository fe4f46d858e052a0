"""What every training run has: where it writes, how it is split, what it may do to the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megarlhf.checkpoint.sharded import ModelDescription, describe_model, tokenizer_directory
from megarlhf.config import Config
from megarlhf.data.arithmetic import words
from megarlhf.data.tokenizer import Tokenizer, build_tiny_tokenizer, load_tokenizer
from megarlhf.errors import ConfigError
from megarlhf.models.compute import ComputeConfig
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.layout import ParallelLayout

BUILT_IN_TOKENIZER = "arithmetic"


class RunConfig(Config):
    """Settings shared by every command that trains."""

    run_dir: Path
    """Directory for metrics, samples, models and the resolved settings; must not hold another run."""
    seed: int = Field(default=1, ge=0)
    """Seed of initial weights, data order, rollouts and mini-batches."""
    layout: ParallelLayout = ParallelLayout()
    """Ranks along each parallel axis."""
    compute: ComputeConfig = ComputeConfig()
    """Number formats and implementations."""
    micro_batch: int = Field(default=8, ge=1)
    """Rows of one forward pass on one data rank; bounds the memory of activations, changes no result."""
    offload: Literal["host", "none"] = "host"
    """Where a model's bytes wait while another works: in (pinned) host memory, or where they are."""
    max_skipped_steps: int = Field(default=3, ge=0)
    """Optimiser steps that may be skipped because loss or gradient is not finite before the run stops."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Longest wait in a collective, in seconds, before the run stops."""
    tensorboard: bool = True
    """Write TensorBoard events besides metrics.jsonl."""
    wandb: bool = False
    """Log to Weights & Biases; the key is read from WANDB_API_KEY."""

    def check_fresh(self) -> None:
        """Raise ConfigError where `run_dir` already holds a finished or unfinished run: nothing is overwritten."""
        if (self.run_dir / "metrics.jsonl").exists():
            raise ConfigError(f"run_dir={self.run_dir} already holds a run; choose another, or remove it.")


def check_batch(name: str, batch: int, layout: ParallelLayout, micro_batch: int) -> None:
    """Check that `batch` rows divide over data ranks and micro-batches.

    Raises:   ConfigError naming the numbers; an interleaved schedule also wants micro-batches in multiples of the stages.
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
            f"{name}={tokens} tokens exceed the model's context of {spec.max_positions}; lower {name} or use another model."
        )


def checked_model(init: str, layout: ParallelLayout, name: str) -> ModelDescription:
    """The model behind `init`, once it is known to fit the layout."""
    found = describe_model(init)
    found.spec.check_layout(layout, name)
    return found
