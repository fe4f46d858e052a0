"""Checks that input must pass before a model is built; each message names the setting, the values and the remedy."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from megarlhf.checkpoint.model_directory import ModelDescription, describe_model, tokenizer_directory
from megarlhf.data import arithmetic, programs
from megarlhf.data.tokenizer import Tokenizer, build_tiny_tokenizer, load_tokenizer
from megarlhf.errors import CheckpointError, ConfigError
from megarlhf.models.lora import LoraConfig
from megarlhf.models.spec import PRESETS, ModelSpec
from megarlhf.models.transformer import HeadKind
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.micro_batches import Cut, InTokens, sequence_multiple
from megarlhf.runtime.settings import RanksConfig

BUILT_IN_TOKENIZER = "arithmetic"
_WORDS = {BUILT_IN_TOKENIZER: arithmetic.words, "programs": programs.words}
"""Of the built-in tokenizers."""


def checked_model(init: str, layout: ParallelLayout, name: str, *, needs: HeadKind = "scalar") -> ModelDescription:
    """The model behind `init`, once it is known to fit the layout and its use; `name` is the setting.

    needs: the head of the role it fills. Any body can carry a scalar head, a new one if need be; only a language model
    can speak.
    """
    if not init:
        raise ConfigError(
            f"{name} is empty; name a model directory (Hugging Face or megarlhf) or one of {', '.join(PRESETS)}."
        )
    found = describe_model(init)
    if needs == "language" and found.head == "scalar":
        raise CheckpointError(
            f"{name}={init} has a scalar head, as reward models have, but a language model is needed; name another."
        )
    found.spec.check_layout(layout, name)
    return found


def check_adapters(lora: LoraConfig | None, spec: ModelSpec, name: str) -> None:
    """Raise ConfigError where there are adapters, and a matrix has a side shorter than their rank; `name`: setting."""
    if lora is not None:
        lora.check(spec, name)


def check_batch(name: str, batch: int, layout: ParallelLayout, cut: Cut) -> None:
    """Check that `batch` rows divide over data ranks and micro-batches.

    Raises:   ConfigError naming the numbers. The interleaved schedule wants a multiple of the stages in micro-batches.
    """
    if batch % layout.data:
        raise ConfigError(
            f"{name}={batch} does not divide over layout.data={layout.data} ranks; use a multiple of {layout.data}."
        )
    share = batch // layout.data
    if isinstance(cut, InTokens):
        if layout.virtual_pipeline > 1 and share < layout.pipeline:
            raise ConfigError(
                f"{name}={batch} is {share} rows a data rank, too few for the interleaved schedule, which needs a "
                f"micro-batch for each of layout.pipeline={layout.pipeline} stages; use at least "
                f"{layout.data * layout.pipeline}."
            )
        return
    micro_batch = cut.rows
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


def check_budget(what: str, tokens: int, cfg: RanksConfig) -> None:
    """Raise ConfigError where micro_batch_tokens cannot be filled, or not hold a row of `what`, of so many tokens."""
    check_cut(what, tokens, cfg.cut, cfg.layout, cfg.compute.fp8_multiple)


def check_cut(what: str, tokens: int, cut: Cut, layout: ParallelLayout, fp8_multiple: int) -> None:
    """The same of any layout; fp8_multiple: 1 without FP8."""
    if not isinstance(cut, InTokens):
        return
    budget, multiple = cut.tokens, sequence_multiple(1, layout, fp8_multiple)
    if budget % multiple:
        parts = [f"layout.tensor={layout.tensor} with layout.sequence_parallel"] if layout.sequence_parallel else []
        parts += [f"layout.context={layout.context}"] if layout.context > 1 else []
        why = " and ".join([*parts, *(["compute.fp8"] if fp8_multiple > 1 else [])])
        near = [str(each) for each in (budget // multiple * multiple, -(-budget // multiple) * multiple) if each]
        raise ConfigError(
            f"micro_batch_tokens={budget} is not a multiple of {multiple}, as {why} needs; set it to "
            f"{' or '.join(near)}."
        )
    if tokens > budget:
        raise ConfigError(
            f"{what} has up to {tokens} tokens, and is not cut in two, but micro_batch_tokens={budget}; set it to "
            f"{-(-tokens // multiple) * multiple} or more, or to null, to count rows by micro_batch."
        )


def check_rows(name: str, batch: int, data: str, rows: int) -> None:
    """Raise ConfigError where a batch is larger than the data set that the setting `data` describes."""
    if batch > rows:
        raise ConfigError(
            f"{name}={batch} is more than the {rows} rows of {data}; lower {name} to at most {rows}, or add rows."
        )


def check_longest(data: str, tokens: int, spec: ModelSpec) -> None:
    """Raise ConfigError where the longest row of the setting `data` exceeds the model's context."""
    if tokens > spec.max_positions:
        raise ConfigError(
            f"the longest row of {data} has {tokens} tokens, but the model's context is {spec.max_positions}; set "
            f"{data}.max_tokens={spec.max_positions} and {data}.overlong=drop, or use another model."
        )


def check_room(prompt: int, max_new_tokens: int, spec: ModelSpec, name: str) -> None:
    """Raise ConfigError where a response to the longest prompt could exceed the context of the model `name`."""
    room = spec.max_positions - prompt
    if max_new_tokens > room:
        fits = f"set sampling.max_new_tokens to at most {room}"
        remedy = fits if room > 0 else "lower prompts.max_tokens and set prompts.overlong=drop"
        raise ConfigError(
            f"sampling.max_new_tokens={max_new_tokens} after prompts of up to {prompt} tokens exceeds the context of "
            f"{name}, {spec.max_positions} tokens; {remedy}."
        )


def check_longest_response(what: str, tokens: int, spec: ModelSpec, name: str) -> None:
    """Raise ConfigError where a text that is there, of so many tokens, exceeds the context of the model `name`."""
    if tokens > spec.max_positions:
        raise ConfigError(
            f"{what} has responses of up to {tokens} tokens with their prompts, but the context of {name} is "
            f"{spec.max_positions}; use another model."
        )


@dataclass(frozen=True)
class Model:
    """A model as settings name it."""

    setting: str
    """The setting, such as `actor.init`."""
    init: str
    """Its value."""
    description: ModelDescription

    @property
    def tokenizer_directory(self) -> Path | None:
        """Where its own tokenizer lies; None where it has none."""
        directory = tokenizer_directory(self.init)
        return directory if self.init not in PRESETS and (directory / "tokenizer.json").is_file() else None

    def __str__(self) -> str:
        """The setting with its value."""
        return f"{self.setting}={self.init}"


def check_scores(judge: Model) -> None:
    """Raise CheckpointError where a judge is a language model, which has learnt no scores; presets are for tests."""
    if judge.description.head == "language" and judge.init not in PRESETS:
        raise CheckpointError(
            f"{judge} is a language model, whose scores would be noise; train a reward model from it with megarlhf "
            "reward."
        )


def resolve_tokenizer(tokenizer: str, model: Model, date: datetime.date | None = None) -> Tokenizer:
    """The tokenizer called `tokenizer` ("" for the model's own, a built-in one's name, else a directory).

    It ends responses where the model does. date: what a chat template is told; by default what it was when the model
    was trained, or today's.
    Raises:   ConfigError or DataError when there is none, or when the model has another.
    """
    if tokenizer in _WORDS:
        found = build_tiny_tokenizer(_WORDS[tokenizer]())
    elif not tokenizer and model.init in PRESETS:
        raise ConfigError(
            f"tokenizer is empty and the preset {model.init} has none of its own; set tokenizer={BUILT_IN_TOKENIZER} "
            "(the built-in task's) or name a tokenizer directory."
        )
    else:
        found = load_tokenizer(Path(tokenizer) if tokenizer else tokenizer_directory(model.init))
    if tokenizer:
        check_same_tokenizer(found, f"tokenizer={tokenizer}", model)
    description = model.description
    return found.of_model(description.eos_ids, date or description.date or datetime.date.today())


def check_same_tokenizer(tokenizer: Tokenizer, name: str, model: Model) -> None:
    """Raise ConfigError where the model has another tokenizer than `tokenizer`, which `name` says where from.

    For a model that reads the end of a response, as reward models do, it must be the same end.
    """
    if model.tokenizer_directory is None:
        return
    own = load_tokenizer(model.tokenizer_directory)
    difference = tokenizer.difference(own)
    if not difference and model.description.head == "scalar" and tokenizer.eos_id != own.eos_id:
        ends = [each.decode_all([each.eos_id]) for each in (tokenizer, own)]
        difference = f"a response ends with {ends[0]!r} in the first and with {ends[1]!r} in the second"
    if difference:
        raise ConfigError(
            f"{name} ({tokenizer.source}) and {model} ({own.source}) have different tokenizers: {difference}; what one "
            "writes the other misreads, so use models of one tokenizer, or copy the right tokenizer files over the "
            "wrong ones."
        )


def check_tokenizer(tokenizer: Tokenizer, spec: ModelSpec, name: str) -> None:
    """Raise ConfigError where the tokenizer makes ids that the model has no row for."""
    if tokenizer.vocab_size > spec.vocab_size:
        raise ConfigError(
            f"the tokenizer {tokenizer.source} has {tokenizer.vocab_size} tokens but {name} has {spec.vocab_size} "
            "embedding rows; use the model's own tokenizer."
        )
