"""`megarlhf label_steps`: what each step of given solutions is worth, by completions that go on from it.

Solutions are labelled in parts and written part by part. The same command again goes on after the last whole line.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from megarlhf.checkpoint.model_directory import ModelDescription
from megarlhf.commands.row_file import Done, RowFile, output_file, who_draws, who_reads
from megarlhf.data.prompts import check_answered
from megarlhf.data.rows import DataConfig
from megarlhf.data.solutions import SolutionSet, load_solutions
from megarlhf.data.steps import usual_separator
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.eval.step_labels import Beginnings, complete, shares
from megarlhf.judges.rules import RuleConfig, check_verified
from megarlhf.judges.texts import Reader
from megarlhf.judges.verifiers import UNANSWERED, AutoVerifier, Verifier, chosen_verifier
from megarlhf.models.readings import LabelLogprobs
from megarlhf.observe.progress import Progress, clock_time
from megarlhf.parallel.collectives import broadcast_object, on_main
from megarlhf.parallel.mesh import Mesh
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import RolloutConfig, SamplingConfig, check_drawn_by, check_rolls_out
from megarlhf.runtime.checks import Model, check_room, check_tokenizer, checked_model, resolve_tokenizer
from megarlhf.runtime.command import on_ranks
from megarlhf.runtime.outputs import lock_of_file, sole_writer
from megarlhf.runtime.roles import frozen, print_choices, print_dropped
from megarlhf.runtime.said import DataSet, ends, remarks, say, say_data
from megarlhf.runtime.settings import RanksConfig
from megarlhf.runtime.texts import check_one_day, check_one_source, chosen_data, chosen_separator

PART = 64
"""Solutions labelled between two writes. Those of a part that begin alike share their completions."""
ADDED = ("labels", "hard_labels")
"""Fields that are added to a row, beside its steps."""


class LabelStepsConfig(RanksConfig):
    """`megarlhf label_steps`: labels of steps from completions."""

    first: ClassVar[tuple[str, ...]] = (
        *("model", "solutions.source", "output", "completions", "verifier", "separator", "sampling.temperature"),
        *("sampling.max_new_tokens", "layout.data", "layout.tensor"),
    )

    model: str
    """Who goes on from the steps: directory of a language model, Hugging Face or megarlhf. Labels are of its skill: the
    better it is, the more often a wrong step is mended."""
    tokenizer: str = ""
    """Tokenizer directory, `arithmetic` or `programs` for a built-in one, or empty for the model's own."""
    solutions: DataConfig = DataConfig()
    """Solutions: columns prompt, steps (a list of text) or response, and answer."""
    separator: str | None = Field(default=None, min_length=1)
    """What parts the steps of a response. null: `. ` where the source is the built-in task, or the model was
    trained on it, and an empty line elsewhere."""
    completions: int = Field(default=8, ge=1)
    """Completions of each beginning. Source: 8 in Math-Shepherd."""
    sampling: SamplingConfig = SamplingConfig()
    """How they are drawn."""
    rollout: RolloutConfig = RolloutConfig()
    """How much is drawn at once."""
    verifier: AutoVerifier = "auto"
    """What decides that a completion is right, as in `megarlhf eval`; for your own data one must be named."""
    output: Path
    """JSON lines file to write: every solution with its columns, and steps, labels (the share of right completions, one
    a step; of the last step, whether the solution is right) and hard_labels (1 where any was right). Where it is there
    already the same command goes on with it, and any other is refused."""


@dataclass(frozen=True)
class LabelStepsInputs:
    """Everything that was read and checked before the model is built."""

    model: ModelDescription
    tokenizer: Tokenizer
    data: DataConfig
    solutions: SolutionSet
    verifier: Verifier
    doubts: str
    """What is to be said of answers that are right for no response."""
    output: RowFile


def prepare(cfg: LabelStepsConfig) -> LabelStepsInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    output = output_file(cfg.output, {}, ADDED)
    output.check_writable()
    check_rolls_out(cfg.layout, cfg.rollout, offload=cfg.offload, fp8=cfg.compute.fp8 != "off")
    if cfg.sampling.temperature == 0 and cfg.completions > 1:
        raise ConfigError(
            f"sampling.temperature=0 with completions={cfg.completions}: they would all be the same; set it above 0."
        )
    check_one_source(cfg.solutions, "solutions")
    model = checked_model(cfg.model, cfg.layout, "model", needs="language")
    check_drawn_by(model.spec, cfg.layout, cfg.rollout, "model")
    speaker = Model("model", cfg.model, model)
    # An output that is gone on with after midnight has rows of one day.
    tokenizer = resolve_tokenizer(cfg.tokenizer, speaker, cfg.date or output.day())
    check_tokenizer(tokenizer, model.spec, "model")
    data = chosen_data(cfg.solutions, "solutions", speaker)
    separator = chosen_separator(cfg.separator, usual_separator({data.source}), speaker)
    verifier = chosen_verifier(cfg.verifier, data.source)
    if verifier is None:
        raise ConfigError(
            f"verifier: there is none by default for data of your own, here solutions.source={data.source}; set "
            "verifier=maths (answers equal as mathematics) or verifier=arithmetic (responses that end in 'The answer "
            "is N.')."
        )
    solutions = load_solutions(data, separator, tokenizer)
    for row in solutions.rows:
        row.check_free(ADDED)
    if verifier not in UNANSWERED:
        check_answered(solutions.prompts, data.source, "no answer to check against")
    doubts = check_verified(solutions.prompts, verifier, data.source)
    check_room(solutions.longest, cfg.sampling.max_new_tokens, model.spec, "model")
    output = replace(output, settings=_decisive(cfg, data, separator, verifier, tokenizer))
    output.check_room(solutions.rows[output.done(solutions.rows).rows :])
    return LabelStepsInputs(model, tokenizer, data, solutions, verifier, doubts, output)


def _decisive(
    cfg: LabelStepsConfig, data: DataConfig, separator: str, verifier: Verifier, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The settings that decide the labels, by name. The layout is none: it changes rounding at most."""
    return {
        **who_reads(cfg.model, cfg.tokenizer),
        "solutions.template": data.rendering,
        "solutions.control_tokens": data.control_tokens,
        "separator": separator,
        "completions": cfg.completions,
        "verifier": verifier,
        **who_draws(cfg, cfg.sampling, tokenizer),
    }


def main(cfg: LabelStepsConfig, argv: Sequence[str]) -> int:
    """`megarlhf label_steps`."""
    return on_ranks(cfg, argv, prepare, run)


def run(cfg: LabelStepsConfig, inputs: LabelStepsInputs, mesh: Mesh) -> None:
    """Label what the output lacks and write it. Collective: every rank of the layout calls it."""
    check_one_day(inputs.tokenizer, mesh)
    output, solutions = inputs.output, inputs.solutions
    with sole_writer(lock_of_file(output.path), "output", output.path, mesh):
        # Again: since the input was checked, another process may have written it.
        done = on_main(lambda: output.done(solutions.rows), mesh)
        say(output.said(done, len(solutions)), mesh)
        if done.rows < len(solutions):
            _label(cfg, inputs, done, mesh)


def _label(cfg: LabelStepsConfig, inputs: LabelStepsInputs, done: Done, mesh: Mesh) -> None:
    solutions, tokenizer = inputs.solutions, inputs.tokenizer
    speaker = Model("model", cfg.model, inputs.model)
    policy = frozen("model", speaker, LabelLogprobs(cfg.sampling.temperature), cfg, mesh)
    print_choices(policy.settings.compute.choices, mesh)
    sets = [DataSet("solutions", cfg.solutions, inputs.data, solutions)]
    print_dropped("solutions", solutions.dropped, len(solutions), mesh)
    say_data(sets, tokenizer, mesh, epochs={})
    said = [*remarks(sets, tokenizer, speaker), ends(tokenizer), f"verifier: {inputs.verifier}"]
    say([*said, *filter(None, [inputs.doubts])], mesh)
    reader = Reader(solutions.prompts, tokenizer, mesh, cfg.timeout_s)
    scorer = RuleConfig(kind="rule", rule=inputs.verifier).scorer("verifier", reader)
    engine = RolloutEngine.of(policy, tokenizer, solutions.longest + cfg.sampling.max_new_tokens, cfg.rollout)
    parts = list(_parts(solutions, done.rows))
    say(_cost(engine, cfg, parts, mesh), mesh)
    left = len(solutions) - done.rows
    opened = inputs.output.open_after(done) if mesh.is_main else nullcontext()
    with opened as file, Progress(left, "label steps", enabled=mesh.is_main) as bar:
        for part in parts:
            each = cfg.completions
            drawn = [complete(engine, part, cfg.sampling, completions=each, seed=cfg.seed)] if part.of else []
            labels = shares(part, drawn, reader, scorer, completions=each)
            known = max(done.rows - part.chosen[0], 0)
            fields = [{"labels": soft, "hard_labels": [float(share > 0) for share in soft]} for soft in labels[known:]]
            if file is not None:
                inputs.output.write(file, [solutions.rows[place] for place in part.chosen[known:]], fields)
            bar.advance(len(fields))


def _parts(solutions: SolutionSet, done: int) -> Iterator[Beginnings]:
    """What is not all among the first `done`. A part that is half done is labelled whole, as if nothing had stopped."""
    for first in range(done - done % PART, len(solutions), PART):
        yield Beginnings.among(solutions, range(first, min(first + PART, len(solutions))))


def _cost(engine: RolloutEngine, cfg: LabelStepsConfig, parts: Sequence[Beginnings], mesh: Mesh) -> list[str]:
    """Tokens and seconds that are to come, by how long some of the beginnings take. Collective."""
    begun = [part for part in parts if part.of]
    if not begun:
        return ["cost: no solution has more than one step, so that nothing need be drawn"]
    each, most = cfg.completions, cfg.sampling.max_new_tokens
    tried = replace(begun[0], of=dict(list(begun[0].of.items())[: -(-cfg.rollout.rows // each)]))
    start = time.perf_counter()
    drawn = complete(engine, tried, cfg.sampling, completions=each, seed=cfg.seed)
    seconds = broadcast_object(time.perf_counter() - start, mesh, "world")
    count, tokens = sum(len(part.of) for part in begun), int(drawn.response_lengths.sum())
    steps = sum(len(part.solutions.solutions[place].steps) - 1 for part in begun for place in part.chosen)
    whole, rate = tokens * count / len(tried.of), tokens / seconds
    alike = f"{steps:,} steps that are not the last; of {PART} solutions those that begin alike share it"
    at_most = f"at most {count * each * most:,}"
    cost = f"about {whole:,.0f} tokens ({at_most}) in {clock_time(whole / rate)}"
    return [
        f"beginnings to go on from: {count:,}, of {alike}",
        f"cost: {each} completions of each, {cost}, as the first {len(tried.of):,} did, at {rate:,.0f} tokens/s",
    ]
