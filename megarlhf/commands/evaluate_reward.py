"""`megarlhf eval reward`: what a reward model is worth on pairs, judged responses and judged steps, with intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from pydantic import Field
from rich.table import Table

from megarlhf.checkpoint.model_directory import ModelDescription
from megarlhf.data.judged_steps import StepData, StepSet, load_steps
from megarlhf.data.preferences import LabelledData, LabelledSet, PreferenceSet, load_labelled, load_preferences
from megarlhf.data.rows import DataConfig
from megarlhf.data.steps import step_ends
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.eval.intervals import Interval
from megarlhf.eval.reward_model import (
    OfJudged,
    OfLength,
    OfPairs,
    OfSteps,
    of_judged,
    of_pairs,
    of_steps,
    read,
)
from megarlhf.models.readings import StepScores
from megarlhf.models.role import Role
from megarlhf.observe.files import write_whole
from megarlhf.observe.terminal import Terminal
from megarlhf.ops.calibration import Calibration
from megarlhf.ops.step_scores import Aggregate
from megarlhf.parallel.mesh import Mesh
from megarlhf.runtime.checks import (
    Model,
    check_budget,
    check_longest,
    check_tokenizer,
    checked_model,
    resolve_tokenizer,
)
from megarlhf.runtime.command import on_ranks
from megarlhf.runtime.outputs import check_new_file, lock_of_file, sole_writer
from megarlhf.runtime.roles import frozen, print_dropped
from megarlhf.runtime.said import DataSet, remarks, say, say_data
from megarlhf.runtime.settings import RanksConfig
from megarlhf.runtime.texts import check_one_day, chosen_heldout, with_separator

Ids = Sequence[Sequence[int]]


class EvalRewardConfig(RanksConfig):
    """`megarlhf eval reward`: how far a reward model can be trusted."""

    first: ClassVar[tuple[str, ...]] = (
        *("model", "pairs.source", "labelled.source", "steps.source", "output", "micro_batch", "layout.data"),
        "layout.tensor",
    )

    model: str
    """The reward model, of outcomes or of steps: a model directory, Hugging Face or megarlhf."""
    tokenizer: str = ""
    """Tokenizer directory, `arithmetic` or `programs` for a built-in one, or empty for the model's own."""
    pairs: DataConfig | None = None
    """Preference pairs: columns prompt, chosen, rejected; all weigh alike, whatever their margin. They give the share
    in order, also of those whose longer response is chosen, and of the others."""
    labelled: LabelledData | None = None
    """Judged responses: columns prompt, response, correct (0 to 1, or to `labelled.scale`). They give the area under
    the curve, calibration, and, where a prompt has several, the best of n."""
    steps: StepData | None = None
    """Responses whose steps are judged: columns prompt, steps, labels; ProcessBench as it is. They give the share of
    solutions whose first error is found, of right ones that pass, and their harmonic mean. Solutions with a step before
    it that nobody judged count for their labelled steps alone."""
    separator: str | None = Field(default=None, min_length=1)
    """What parts the steps of pairs and of judged responses, and joins `steps` where steps.separator is null. null:
    what the model was trained with; one that judges outcomes takes a response for one step."""
    output: Path | None = None
    """JSON file to write with all numbers, the curves of calibration among them; any that exists is refused."""


@dataclass(frozen=True)
class EvalRewardInputs:
    """Everything that was read and checked before the model is built."""

    model: ModelDescription
    tokenizer: Tokenizer
    data: Mapping[str, DataConfig]
    """Of each set that there is."""
    pairs: PreferenceSet | None
    labelled: LabelledSet | None
    steps: StepSet | None
    separator: str | None
    """None where a response is one step."""


def prepare(cfg: EvalRewardConfig) -> EvalRewardInputs:
    """Read and check all input. Raises a MegarlhfError that names the setting, the values and the remedy."""
    if cfg.output is not None:
        check_new_file(cfg.output)
    asked = _given(cfg)
    if not asked:
        raise ConfigError(
            "nothing to measure on: pairs, labelled and steps are unset; set pairs.source, labelled.source or "
            "steps.source, arithmetic for the built-in task."
        )
    model = checked_model(cfg.model, cfg.layout, "model")
    reader = Model("model", cfg.model, model)
    if model.head == "language":
        raise ConfigError(
            f"{reader} is a language model, whose scores would be noise; train a reward model from it with megarlhf "
            "reward or megarlhf process_reward."
        )
    tokenizer = resolve_tokenizer(cfg.tokenizer, reader, cfg.date)
    check_tokenizer(tokenizer, model.spec, "model")
    data = {name: with_separator(chosen_heldout(rows, name, reader), reader) for name, rows in asked.items()}
    pairs, labelled, steps = data.get("pairs"), data.get("labelled"), data.get("steps")
    inputs = EvalRewardInputs(
        model,
        tokenizer,
        data,
        load_preferences(pairs, tokenizer) if pairs else None,
        load_labelled(labelled, tokenizer, scale=labelled.scale) if isinstance(labelled, LabelledData) else None,
        load_steps(steps, tokenizer) if isinstance(steps, StepData) else None,
        cfg.separator or model.step_separator,
    )
    for name, rows in _sets(inputs).items():
        check_longest(name, rows.longest, model.spec)
        check_budget(f"a row of {name}", rows.longest, cfg)
    return inputs


def _given(cfg: EvalRewardConfig) -> dict[str, DataConfig]:
    steps = cfg.steps
    if steps and steps.separator is None:
        steps = steps.model_copy(update={"separator": cfg.separator})
    every = {"pairs": cfg.pairs, "labelled": cfg.labelled, "steps": steps}
    return {name: rows for name, rows in every.items() if rows}


def _sets(inputs: EvalRewardInputs) -> dict[str, PreferenceSet | LabelledSet | StepSet]:
    every = {"pairs": inputs.pairs, "labelled": inputs.labelled, "steps": inputs.steps}
    return {name: rows for name, rows in every.items() if rows is not None}


def main(cfg: EvalRewardConfig, argv: Sequence[str]) -> int:
    """`megarlhf eval reward`."""
    return on_ranks(cfg, argv, prepare, run)


def run(cfg: EvalRewardConfig, inputs: EvalRewardInputs, mesh: Mesh) -> None:
    """Measure, print tables and write the output. Collective: every rank of the layout calls it."""
    check_one_day(inputs.tokenizer, mesh)
    with nullcontext() if cfg.output is None else sole_writer(lock_of_file(cfg.output), "output", cfg.output, mesh):
        reader = Model("model", cfg.model, inputs.model)
        role = frozen("model", reader, StepScores(), cfg, mesh)
        asked, loaded = _given(cfg), _sets(inputs)
        sets = [DataSet(name, asked[name], inputs.data[name], rows) for name, rows in loaded.items()]
        for each in sets:
            print_dropped(each.name, each.rows.dropped, len(each.rows), mesh)
        say_data(sets, inputs.tokenizer, mesh, epochs={})
        say(remarks(sets, inputs.tokenizer, reader), mesh)
        found = measured(role, inputs)
        if mesh.is_main:
            console = Terminal()
            for table in _tables(cfg.model, found, inputs):
                console.print(table)
            if cfg.output is not None:
                write_whole(cfg.output, json.dumps(_plain(found), indent=2) + "\n")


@dataclass(frozen=True)
class Found:
    """What was measured, by the way in which steps are taken together."""

    pairs: Mapping[str, OfPairs]
    labelled: Mapping[str, OfJudged]
    steps: OfSteps | None


def measured(role: Role, inputs: EvalRewardInputs) -> Found:
    """All that there are rows for. Collective; equal on every rank."""
    ways: Sequence[Aggregate] = get_args(Aggregate) if inputs.separator else ["last"]
    pairs: dict[str, OfPairs] = {}
    labelled: dict[str, OfJudged] = {}
    if (rows := inputs.pairs) is not None:
        sides = [
            read(role, side, _ends(side, rows.prompt_lengths, inputs), name)
            for side, name in ((rows.chosen, "chosen"), (rows.rejected, "rejected"))
        ]
        lengths = torch.tensor([list(map(len, pair)) for pair in zip(rows.chosen, rows.rejected, strict=True)])
        prompts = len({tuple(row[:length]) for row, length in zip(rows.chosen, rows.prompt_lengths, strict=True)})
        pairs = {way: of_pairs(sides[0].taken(way), sides[1].taken(way), lengths, prompts) for way in ways}
    if (rows := inputs.labelled) is not None:
        reading = read(role, rows.tokens, _ends(rows.tokens, rows.prompt_lengths, inputs), "labelled")
        cut = list(zip(rows.tokens, rows.prompt_lengths, strict=True))
        lengths, prompts = torch.tensor([len(row) - at for row, at in cut]), [tuple(row[:at]) for row, at in cut]
        right = torch.tensor(rows.correct, dtype=torch.float64)
        labelled = {way: of_judged(reading.taken(way), right, lengths, prompts) for way in ways}
    steps = None
    if (rows := inputs.steps) is not None:
        steps = of_steps(read(role, rows.tokens, rows.ends, "steps"), rows.labels)
    return Found(pairs, labelled, steps)


def _ends(tokens: Ids, prompt_lengths: Sequence[int], inputs: EvalRewardInputs) -> list[list[int]]:
    """The last token of each step, in the whole text."""
    if inputs.separator is None:
        return [[len(row) - 1] for row in tokens]
    separator, tokenizer = inputs.separator, inputs.tokenizer
    return [
        [start + end for end in step_ends(row[start:], separator, tokenizer)]
        for row, start in zip(tokens, prompt_lengths, strict=True)
    ]


def _tables(model: str, found: Found, inputs: EvalRewardInputs) -> list[Table]:
    tables: list[Table] = []
    by_way = "of steps" if inputs.separator else ""
    if inputs.pairs is not None:
        table = _table(f"{model}, {len(inputs.pairs):,} pairs, 95 % intervals", by_way, "in order")
        first = next(iter(found.pairs.values()))
        lengths = [f"{part.said} ({part.count:,})" for part in first.by_length]
        by_length = _table("in order, by which response is longer", by_way, *lengths)
        for way, of in found.pairs.items():
            table.add_row(way, _said(of.accuracy))
            by_length.add_row(way, *(_number(part.found) for part in of.by_length))
        tables += [table, by_length]
    if inputs.labelled is not None:
        title = f"{model}, {len(inputs.labelled):,} judged responses, 95 % intervals"
        table = _table(title, by_way, "AUC", "right at 1/2", "calibration error")
        first = next(iter(found.labelled.values()))
        lengths = [f"{part.said} ({part.count:,})" for part in first.by_length]
        by_length = _table("AUC among responses of like length", by_way, *lengths)
        best = _table("how right the best of n is", by_way, *(f"n = {size}" for size in first.best_of))
        for way, of in found.labelled.items():
            table.add_row(way, _said(of.auc), _said(of.accuracy), _number(of.calibration.error))
            by_length.add_row(way, *(_number(part.found) for part in of.by_length))
            best.add_row(way, *map(_said, of.best_of.values()))
        tables += [table, by_length, *([best] if len(first.best_of) > 1 else [])]
    if inputs.steps is not None and found.steps is not None:
        of = found.steps
        known = f"of {of.wrong + of.right:,} the first error is known, {of.right:,} without one"
        title = f"{model}, {len(inputs.steps):,} solutions, {known}, 95 % intervals"
        table = _table(title, "", "first error found", "right ones pass", "F1")
        table.add_row("solutions", _said(of.wrong_found), _said(of.right_passed), _said(of.f1))
        each = _table(f"{of.steps:,} labelled steps", "", "called what they are", "calibration error", "loss")
        each.add_row("steps", _said(of.accuracy), _number(of.calibration.error), _number(of.loss))
        tables += [table, each]
    return tables


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _said(of: Interval) -> str:
    return "-" if math.isnan(of.mean) else f"{of.mean:.3f} [{of.low:.3f}, {of.high:.3f}]"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _plain(value: Any) -> Any:
    """As JSON has it: what is named by its names, and null for what is no number."""
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Interval | Calibration | OfLength):
        return _plain(value._asdict())
    if isinstance(value, Found | OfPairs | OfJudged | OfSteps):
        return _plain({each.name: vars(value)[each.name] for each in fields(value)})
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value
