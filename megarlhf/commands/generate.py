"""`megarlhf generate`: sample responses to one prompt or to a file of them, as JSON lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import Field

from megarlhf.batch.rollouts import Rollout
from megarlhf.checkpoint.model_directory import ModelDescription
from megarlhf.data.prompts import PromptSet, load_prompts
from megarlhf.data.rows import DataConfig
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import printable
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole
from megarlhf.observe.files import json_line, opened, writing
from megarlhf.observe.progress import Progress
from megarlhf.parallel.collectives import on_main
from megarlhf.parallel.mesh import Mesh
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import RolloutConfig, SamplingConfig, check_rolls_out
from megarlhf.runtime.checks import Model, check_room, check_tokenizer, checked_model, resolve_tokenizer
from megarlhf.runtime.command import on_ranks
from megarlhf.runtime.outputs import check_new_file, lock_of_file, sole_writer
from megarlhf.runtime.roles import frozen, print_choices, print_dropped
from megarlhf.runtime.said import DataSet, ends, remarks, say, say_data
from megarlhf.runtime.settings import RanksConfig
from megarlhf.runtime.texts import check_one_day, check_one_source, chosen_data, chosen_template

ROLLOUTS = 512
"""Responses drawn between two writes; the engine itself decodes as many of them at once as fit."""


class GenerateConfig(RanksConfig):
    """`megarlhf generate`: sample responses."""

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
    """JSON lines file to write, which must not exist and appears once it is whole; null prints to standard output."""


@dataclass(frozen=True)
class GenerateInputs:
    """Everything that was read and checked before the model is built."""

    model: ModelDescription
    tokenizer: Tokenizer
    data: DataConfig
    """Without a source for `prompt`."""
    prompts: PromptSet


def prepare(cfg: GenerateConfig) -> GenerateInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    if cfg.output is not None:
        check_new_file(cfg.output)
    check_rolls_out(cfg.layout, cfg.rollout, offload=cfg.offload, fp8=cfg.compute.fp8 != "off")
    model = checked_model(cfg.model, cfg.layout, "model", needs="language")
    speaker = Model("model", cfg.model, model)
    tokenizer = resolve_tokenizer(cfg.tokenizer, speaker, cfg.date)
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
    return GenerateInputs(model, tokenizer, data, prompts)


def main(cfg: GenerateConfig, argv: Sequence[str]) -> int:
    """`megarlhf generate`."""
    return on_ranks(cfg, argv, prepare, _run)


def _run(cfg: GenerateConfig, inputs: GenerateInputs, mesh: Mesh) -> None:
    check_one_day(inputs.tokenizer, mesh)
    with _open(cfg, mesh) as file:
        _generate(cfg, inputs, file, mesh)


def _generate(cfg: GenerateConfig, inputs: GenerateInputs, file: IO[str], mesh: Mesh) -> None:
    speaker = Model("model", cfg.model, inputs.model)
    policy = frozen("model", speaker, LabelLogprobs(cfg.sampling.temperature), cfg, mesh)
    print_choices(policy.settings.compute.choices, mesh)
    _say_start(cfg, inputs, mesh)
    print_dropped("prompts", inputs.prompts.dropped, len(inputs.prompts), mesh)
    with Progress(len(inputs.prompts), "generate", enabled=mesh.is_main) as bar:
        for rollout in rollouts(policy, inputs, cfg):
            if mesh.is_main:
                with writing(cfg.output) if cfg.output else nullcontext():
                    file.writelines(printable(json_line(row)) for row in rows_of(rollout, inputs))
                    file.flush()
            bar.advance(len(rollout) // cfg.group_size)


def _say_start(cfg: GenerateConfig, inputs: GenerateInputs, mesh: Mesh) -> None:
    model, tokenizer = Model("model", cfg.model, inputs.model), inputs.tokenizer
    asked = cfg.prompts.model_copy(update={"source": "prompt"}) if cfg.prompt else cfg.prompts
    sets = [DataSet("prompts", asked, inputs.data, inputs.prompts)]
    if cfg.prompt:
        say([f"prompt: template {inputs.data.rendering}"], mesh)
    else:
        say_data(sets, tokenizer, mesh, epochs={})
    say([*remarks(sets, tokenizer, model), ends(tokenizer)], mesh)


def rollouts(policy: FrozenRole, inputs: GenerateInputs, cfg: GenerateConfig) -> Iterator[Rollout]:
    """Responses to all prompts in order, a part at a time. Collective; equal on every rank."""
    prompts = inputs.prompts
    engine = RolloutEngine.of(policy, inputs.tokenizer, prompts.longest + cfg.sampling.max_new_tokens, cfg.rollout)
    parts = min(-(-len(prompts) * cfg.group_size // ROLLOUTS), len(prompts))
    for part in torch.arange(len(prompts)).tensor_split(parts):
        yield engine.generate(prompts.batch(part), cfg.sampling, seed=cfg.seed, group_size=cfg.group_size)


def rows_of(rollout: Rollout, inputs: GenerateInputs) -> Iterator[dict[str, Any]]:
    """One mapping a response. `logprob`: of the whole response, EOS included, in nats, at the sampling temperature."""
    logprobs = rollout.sampler_logprobs.double().sum(1).tolist()
    # EOS ends a response and is no part of its text.
    ends = (rollout.lengths - rollout.terminated.long()).tolist()
    columns = inputs.prompts.columns_in(rollout.prompt_ids)
    for row in range(len(rollout)):
        start, terminated = int(rollout.prompt_lengths[row]), bool(rollout.terminated[row])
        yield {
            "prompt": columns[row]["prompt"],
            "response": inputs.tokenizer.decode(rollout.tokens[row, start : ends[row]].tolist()),
            "logprob": logprobs[row],
            "tokens": int(rollout.lengths[row]) - start,
            "terminated": terminated,
        }


@contextmanager
def _open(cfg: GenerateConfig, mesh: Mesh) -> Iterator[IO[str]]:
    """Where rank 0 writes: standard output, or a new file that has its name once it is whole."""
    if cfg.output is None:
        yield sys.stdout
        return
    output: Path = cfg.output
    partial = output.with_name(f"{output.name}.partial")
    with sole_writer(lock_of_file(output), "output", output, mesh):
        on_main(lambda: check_new_file(output), mesh)
        with opened(partial if mesh.is_main else Path(os.devnull), "w") as file:
            yield file
        if mesh.is_main:
            partial.rename(output)
