"""`megarlhf generate`: sample responses to one prompt or to a file of them, as JSON lines.

Responses are drawn in parts and written part by part. The same command again goes on after the last whole line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field

from megarlhf.batch.rollouts import Rollout
from megarlhf.checkpoint.model_directory import ModelDescription
from megarlhf.commands.row_file import DAY, RowFile, finite, who_reads
from megarlhf.data.prompts import PromptSet, load_prompts
from megarlhf.data.row import Row
from megarlhf.data.rows import DataConfig
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import printable
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole
from megarlhf.observe.files import json_line
from megarlhf.observe.progress import Progress
from megarlhf.parallel.collectives import on_main
from megarlhf.parallel.mesh import Mesh
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import RolloutConfig, SamplingConfig, check_rolls_out
from megarlhf.runtime.checks import Model, check_room, check_tokenizer, checked_model, resolve_tokenizer
from megarlhf.runtime.command import on_ranks
from megarlhf.runtime.outputs import lock_of_file, sole_writer
from megarlhf.runtime.roles import frozen, print_choices, print_dropped
from megarlhf.runtime.said import DataSet, ends, remarks, say, say_data
from megarlhf.runtime.settings import RanksConfig
from megarlhf.runtime.texts import check_one_day, check_one_source, chosen_data, chosen_template

ROLLOUTS = 512
"""Responses drawn between two writes; the engine itself decodes as many of them at once as fit."""
Write = Callable[[Sequence[Row], Sequence[dict[str, Any]]], None]
ADDED = ("response", "logprob", "tokens", "terminated")
"""Fields that are added to the prompt of a row."""


class GenerateConfig(RanksConfig):
    """`megarlhf generate`: sample responses."""

    first: ClassVar[tuple[str, ...]] = (
        *("model", "prompt", "prompts.source", "output", "group_size", "sampling.temperature"),
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
    group_size: int = Field(default=1, ge=1)
    """Responses per prompt."""
    output: Path | None = None
    """JSON lines file to write, one response a line. Where it is there already the same command goes on with it, and
    any other is refused. null prints to standard output."""


@dataclass(frozen=True)
class GenerateInputs:
    """Everything that was read and checked before the model is built."""

    model: ModelDescription
    tokenizer: Tokenizer
    data: DataConfig
    """Without a source for `prompt`."""
    prompts: PromptSet
    asked: Sequence[Row]
    """The prompt of every response, in the order of the output."""
    output: RowFile | None
    """None for standard output."""


def prepare(cfg: GenerateConfig) -> GenerateInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    output = None if cfg.output is None else RowFile(cfg.output, {}, ADDED)
    if output is not None:
        output.check_writable()
    check_rolls_out(cfg.layout, cfg.rollout, offload=cfg.offload, fp8=cfg.compute.fp8 != "off")
    model = checked_model(cfg.model, cfg.layout, "model", needs="language")
    speaker = Model("model", cfg.model, model)
    # An output that is gone on with after midnight has rows of one day.
    tokenizer = resolve_tokenizer(cfg.tokenizer, speaker, cfg.date or (output.day() if output else None))
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
    asked = [
        Row(data.source or "prompt", index + 1, {"prompt": columns["prompt"]})
        for index, columns in zip(prompts.ids, prompts.columns, strict=True)
        for _ in range(cfg.group_size)
    ]
    if output is not None:
        output = replace(output, settings=_decisive(cfg, data, tokenizer))
        output.check_room(asked[output.done(asked).rows :])
    return GenerateInputs(model, tokenizer, data, prompts, asked, output)


def _decisive(cfg: GenerateConfig, data: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings that decide what is drawn, by name. The layout is none: it changes rounding at most."""
    sampling = {f"sampling.{name}": value for name, value in cfg.sampling.model_dump(mode="json").items()}
    return {
        **who_reads(cfg.model, cfg.tokenizer),
        "prompts.template": data.rendering,
        "prompts.control_tokens": data.control_tokens,
        **sampling,
        "group_size": cfg.group_size,
        "seed": cfg.seed,
        "compute.dtype": cfg.compute.dtype,
        "compute.fp8": cfg.compute.fp8,
        **({} if tokenizer.date is None else {DAY: str(tokenizer.date)}),
    }


def main(cfg: GenerateConfig, argv: Sequence[str]) -> int:
    """`megarlhf generate`."""
    return on_ranks(cfg, argv, prepare, run)


def run(cfg: GenerateConfig, inputs: GenerateInputs, mesh: Mesh) -> None:
    """Draw what the output lacks and write it. Collective: every rank of the layout calls it."""
    check_one_day(inputs.tokenizer, mesh)
    output, rows = inputs.output, len(inputs.asked)
    if output is None:
        _generate(cfg, inputs, 0, _printed, mesh)
        return
    with sole_writer(lock_of_file(output.path), "output", output.path, mesh):
        # Again: since the input was checked, another process may have written it.
        done = on_main(lambda: output.done(inputs.asked), mesh)
        say(output.said(done, rows), mesh)
        if done.rows < rows:
            with output.open_after(done) if mesh.is_main else nullcontext() as file:
                _generate(cfg, inputs, done.rows, _printed if file is None else partial(output.write, file), mesh)


def _generate(cfg: GenerateConfig, inputs: GenerateInputs, done: int, write: Write, mesh: Mesh) -> None:
    speaker = Model("model", cfg.model, inputs.model)
    policy = frozen("model", speaker, LabelLogprobs(cfg.sampling.temperature), cfg, mesh)
    print_choices(policy.settings.compute.choices, mesh)
    _say_start(cfg, inputs, mesh)
    print_dropped("prompts", inputs.prompts.dropped, len(inputs.prompts), mesh)
    with Progress(len(inputs.asked) - done, "generate", enabled=mesh.is_main) as bar:
        for first, rollout in rollouts(policy, inputs, cfg, done):
            known = max(done - first, 0)
            fields = fields_of(rollout, inputs)[known:]
            if mesh.is_main:
                write(inputs.asked[first + known :][: len(fields)], fields)
            bar.advance(len(fields))


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
    prompts, group = inputs.prompts, cfg.group_size
    engine = RolloutEngine.of(policy, inputs.tokenizer, prompts.longest + cfg.sampling.max_new_tokens, cfg.rollout)
    parts = min(-(-len(prompts) * group // ROLLOUTS), len(prompts))
    for part in torch.arange(len(prompts)).tensor_split(parts):
        first = int(part[0]) * group
        if first + len(part) * group > done:
            yield first, engine.generate(prompts.batch(part), cfg.sampling, seed=cfg.seed, group_size=group)


def fields_of(rollout: Rollout, inputs: GenerateInputs) -> list[dict[str, Any]]:
    """What is added to the prompt of each response. `logprob`: of all of it, EOS in, in nats, at the temperature."""
    logprobs = rollout.sampler_logprobs.double().sum(1).tolist()
    # EOS ends a response and is no part of its text.
    ends = (rollout.lengths - rollout.terminated.long()).tolist()
    starts = rollout.prompt_lengths.tolist()
    return [
        {
            "response": inputs.tokenizer.decode(rollout.tokens[row, starts[row] : ends[row]].tolist()),
            "logprob": finite(logprobs[row]),
            "tokens": int(rollout.lengths[row]) - starts[row],
            "terminated": bool(rollout.terminated[row]),
        }
        for row in range(len(rollout))
    ]


def _printed(rows: Sequence[Row], fields: Sequence[dict[str, Any]]) -> None:
    lines = (printable(json_line({**row.columns, **added})) for row, added in zip(rows, fields, strict=True))
    sys.stdout.writelines(lines)
    sys.stdout.flush()
