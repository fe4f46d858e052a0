"""`megarlhf generate`: sample responses to one prompt or to a file of them, as JSON lines or into a pool.

Responses are drawn in parts and written part by part. The same command again goes on after the last whole line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from megarlhf.batch.rollouts import Rollout
from megarlhf.checkpoint.model_directory import ModelDescription
from megarlhf.commands.pool_files import PoolFiles, day_of, rounds_of
from megarlhf.commands.row_file import RowFile, finite, output_file, who_draws, who_reads
from megarlhf.data.prompts import PromptSet, load_prompts
from megarlhf.data.row import Row
from megarlhf.data.rows import DataConfig
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError, printable
from megarlhf.eval.pool import Order
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole
from megarlhf.observe.files import json_line
from megarlhf.observe.progress import Progress
from megarlhf.parallel.collectives import on_main
from megarlhf.parallel.mesh import Mesh
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import RolloutConfig, SamplingConfig, check_drawn_by, check_rolls_out
from megarlhf.runtime.checks import Model, check_room, check_tokenizer, checked_model, resolve_tokenizer
from megarlhf.runtime.command import on_ranks
from megarlhf.runtime.outputs import lock_of_file, sole_writer
from megarlhf.runtime.roles import frozen, print_choices, print_dropped
from megarlhf.runtime.said import DataSet, ends, remarks, say, say_data
from megarlhf.runtime.settings import RanksConfig
from megarlhf.runtime.texts import check_one_day, check_one_source, chosen_data, chosen_template

Write = Callable[[int, Rollout], None]
"""Takes the place of the first of some responses among all, and them."""
ADDED = ("response", "logprob", "tokens", "terminated")
"""Fields that are added to the prompt of a row."""


class GenerateConfig(RanksConfig):
    """`megarlhf generate`: sample responses."""

    first: ClassVar[tuple[str, ...]] = (
        *("model", "prompt", "prompts.source", "n", "output", "pool", "sampling.temperature"),
        *("sampling.max_new_tokens", "layout.data", "layout.tensor"),
    )

    model: str
    """Directory of a language model, Hugging Face or megarlhf; or a preset, drawn at random from `seed`."""
    tokenizer: str = ""
    """Tokenizer directory, `arithmetic` or `programs` for a built-in one, or empty for the model's own."""
    prompt: str = ""
    """One prompt, as text; `prompts` then says only how it is rendered. Empty reads the prompts of `prompts.source`."""
    prompts: DataConfig = DataConfig()
    """Prompts: column prompt."""
    sampling: SamplingConfig = SamplingConfig()
    """How responses are drawn."""
    rollout: RolloutConfig = RolloutConfig()
    """How much is drawn at once."""
    n: int = Field(default=1, ge=1)
    """Responses to each prompt."""
    output: Path | None = None
    """JSON lines file to write, one response a line. Where it is there already the same command goes on with it, and
    any other is refused. null prints to standard output, unless there is a pool."""
    pool: Path | None = None
    """Directory to write in place of a file: a pool, which `judge`, `eval pool` and `rows` read. It has all columns of
    each prompt, and text, tokens and log-probs of each response. The same command goes on with it; with a larger n it
    grows, and keeps what is there."""


@dataclass(frozen=True)
class GenerateInputs:
    """Everything that was read and checked before the model is built."""

    model: ModelDescription
    tokenizer: Tokenizer
    data: DataConfig
    """Without a source for `prompt`."""
    prompts: PromptSet
    order: Order
    """In which the responses come."""
    output: RowFile | None
    """None for standard output, or a pool."""
    pool: PoolFiles | None

    def asked(self, places: range) -> list[Row]:
        """The prompt of each of some responses."""
        indices = [self.order.at(place).prompt for place in places]
        columns = [{"prompt": self.prompts.columns[index]["prompt"]} for index in indices]
        source = self.data.source or "prompt"
        return [Row(source, self.prompts.ids[at] + 1, of) for at, of in zip(indices, columns, strict=True)]


def prepare(cfg: GenerateConfig) -> GenerateInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    if cfg.output is not None and cfg.pool is not None:
        raise ConfigError(f"output={cfg.output} and pool={cfg.pool}: responses go to one place; give one of the two.")
    output = None if cfg.output is None else output_file(cfg.output, {}, ADDED)
    if output is not None:
        output.check_writable()
    check_rolls_out(cfg.layout, cfg.rollout, offload=cfg.offload, fp8=cfg.compute.fp8 != "off")
    model = checked_model(cfg.model, cfg.layout, "model", needs="language")
    check_drawn_by(model.spec, cfg.layout, cfg.rollout, "model")
    speaker = Model("model", cfg.model, model)
    # An output that is gone on with after midnight has rows of one day.
    begun = output.day() if output else day_of(cfg.pool) if cfg.pool else None
    tokenizer = resolve_tokenizer(cfg.tokenizer, speaker, cfg.date or begun)
    check_tokenizer(tokenizer, model.spec, "model")
    if cfg.prompt:
        data = cfg.prompts.model_copy(update={"template": chosen_template(cfg.prompts.template, speaker)})
        tokens = tokenizer.taking(data.control_tokens).encode_prompt(cfg.prompt, data.rendering)
        prompts = PromptSet([tokens], [""], [0], tokenizer.pad_id, dropped=0, columns=[{"prompt": cfg.prompt}])
    else:
        check_one_source(cfg.prompts, "prompts")
        data = chosen_data(cfg.prompts, "prompts", speaker)
        prompts = load_prompts(data, tokenizer)
    check_room(prompts.longest, cfg.sampling.max_new_tokens, model.spec, "model")
    settings = _decisive(cfg, data, tokenizer)
    if cfg.pool is not None:
        order = Order(len(prompts), rounds_of(cfg.pool, cfg.n))
        source = f"{data.source or 'prompt'}{f' ({data.split})' if data.split else ''}"
        pool = PoolFiles(cfg.pool, settings, source, prompts, tokenizer, order)
        pool.check()
        return GenerateInputs(model, tokenizer, data, prompts, order, None, pool)
    order = Order(len(prompts), (cfg.n,))
    if output is not None:
        output = replace(output, settings={**settings, "n": cfg.n})
    inputs = GenerateInputs(model, tokenizer, data, prompts, order, output, None)
    if output is not None:
        asked = inputs.asked(range(order.total))
        output.check_room(asked[output.done(asked).rows :])
    return inputs


def _decisive(cfg: GenerateConfig, data: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings that decide what is drawn, by name. The layout is none: it changes rounding at most."""
    return {
        **who_reads(cfg.model, cfg.tokenizer),
        "prompts.template": data.rendering,
        "prompts.control_tokens": data.control_tokens,
        **who_draws(cfg, cfg.sampling, tokenizer),
    }


def main(cfg: GenerateConfig, argv: Sequence[str]) -> int:
    """`megarlhf generate`."""
    return on_ranks(cfg, argv, prepare, run)


def run(cfg: GenerateConfig, inputs: GenerateInputs, mesh: Mesh) -> None:
    """Draw what the output or the pool lacks and write it. Collective: every rank of the layout calls it."""
    check_one_day(inputs.tokenizer, mesh)
    if inputs.output is not None:
        _into_file(cfg, inputs, inputs.output, mesh)
    elif inputs.pool is not None:
        _into_pool(cfg, inputs, inputs.pool, mesh)
    else:
        _generate(cfg, inputs, 0, partial(_print, inputs), mesh)


def _into_file(cfg: GenerateConfig, inputs: GenerateInputs, output: RowFile, mesh: Mesh) -> None:
    rows = inputs.order.total
    with sole_writer(lock_of_file(output.path), "output", output.path, mesh):
        # Again: since the input was checked, another process may have written it.
        done = on_main(lambda: output.done(inputs.asked(range(rows))), mesh)
        say(output.said(done, rows), mesh)
        if done.rows < rows:
            with output.open_after(done) if mesh.is_main else nullcontext() as file:

                def write(first: int, rollout: Rollout) -> None:
                    if file is not None:
                        asked = inputs.asked(range(first, first + len(rollout)))
                        output.write(file, asked, fields_of(rollout, inputs.tokenizer))

                _generate(cfg, inputs, done.rows, write, mesh)


def _into_pool(cfg: GenerateConfig, inputs: GenerateInputs, pool: PoolFiles, mesh: Mesh) -> None:
    def write(first: int, rollout: Rollout) -> None:
        pool.write(first, pool.lines(first, rollout, fields_of(rollout, inputs.tokenizer)))

    total = inputs.order.total
    with sole_writer(pool.lock, "pool", pool.directory, mesh):
        done = on_main(pool.done, mesh)
        there = f"{pool.directory}: {done:,} of {total:,} responses are there, {total - done:,} to do"
        say([there] if done else [], mesh)
        if done < total:
            on_main(pool.begin, mesh)
            _generate(cfg, inputs, done, write, mesh)


def _generate(cfg: GenerateConfig, inputs: GenerateInputs, done: int, write: Write, mesh: Mesh) -> None:
    speaker = Model("model", cfg.model, inputs.model)
    policy = frozen("model", speaker, LabelLogprobs(cfg.sampling.temperature), cfg, mesh)
    print_choices(policy.settings.compute.choices, mesh)
    _say_start(cfg, inputs, mesh)
    print_dropped("prompts", inputs.prompts.dropped, len(inputs.prompts), mesh)
    with Progress(inputs.order.total - done, "generate", enabled=mesh.is_main) as bar:
        for first, rollout in rollouts(policy, inputs, cfg, done):
            known = max(done - first, 0)
            if mesh.is_main:
                write(first + known, rollout.rows(slice(known, None)).to("cpu"))
            bar.advance(len(rollout) - known)


def _say_start(cfg: GenerateConfig, inputs: GenerateInputs, mesh: Mesh) -> None:
    model, tokenizer = Model("model", cfg.model, inputs.model), inputs.tokenizer
    asked = cfg.prompts.model_copy(update={"source": "prompt"}) if cfg.prompt else cfg.prompts
    sets = [DataSet("prompts", asked, inputs.data, inputs.prompts)]
    if cfg.prompt:
        say([f"prompt: template {inputs.data.rendering}"], mesh)
    else:
        say_data(sets, tokenizer, mesh, epochs={})
    say([*remarks(sets, tokenizer, model), ends(tokenizer)], mesh)


def rollouts(
    policy: FrozenRole, inputs: GenerateInputs, cfg: GenerateConfig, done: int = 0
) -> Iterator[tuple[int, Rollout]]:
    """Responses to all prompts in order, a part at a time: the place of the first, and they. Collective; the same on
    every rank.

    Parts of which all are among the first `done` are left out; one of which some are is drawn whole: a response then
    has the same neighbours, and the same last bits, whether or not the command was interrupted.
    """
    prompts = inputs.prompts
    engine = RolloutEngine.of(policy, inputs.tokenizer, prompts.longest + cfg.sampling.max_new_tokens, cfg.rollout)
    ranks = engine.mesh.layout.data
    for start, sample, group in inputs.order.parts:
        # As many as the ranks decode at once, and a prompt for each rank: all samples of one are drawn on one rank.
        together = max(cfg.rollout.rows * ranks // group, ranks)
        for part in torch.arange(len(prompts)).tensor_split(-(-len(prompts) // together)):
            first = start + int(part[0]) * group
            if first + len(part) * group > done:
                asked = prompts.batch(part)
                yield (
                    first,
                    engine.generate(asked, cfg.sampling, seed=cfg.seed, group_size=group, first_sample=sample),
                )


def fields_of(rollout: Rollout, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """What is added to the prompt of each response. `logprob`: of all of it, EOS in, in nats, at the temperature."""
    logprobs = rollout.sampler_logprobs.double().sum(1).tolist()
    # EOS ends a response and is no part of its text.
    ends = (rollout.lengths - rollout.terminated.long()).tolist()
    starts, lengths, tokens = rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), rollout.tokens.tolist()
    # Many responses to one prompt are alike.
    decoded = cache(tokenizer.decode)
    return [
        {
            "response": decoded(tuple(tokens[row][starts[row] : ends[row]])),
            "logprob": finite(logprobs[row]),
            "tokens": lengths[row] - starts[row],
            "terminated": terminated,
        }
        for row, terminated in enumerate(rollout.terminated.tolist())
    ]


def _print(inputs: GenerateInputs, first: int, rollout: Rollout) -> None:
    asked, fields = inputs.asked(range(first, first + len(rollout))), fields_of(rollout, inputs.tokenizer)
    lines = (printable(json_line({**row.columns, **added})) for row, added in zip(asked, fields, strict=True))
    sys.stdout.writelines(lines)
    sys.stdout.flush()
