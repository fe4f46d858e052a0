"""What reward models and process reward models have in common: settings of outcomes, and the rows, read and checked.

A set of rows is named by its setting: pairs and labelled are learnt from, heldout and heldout_pairs measured. A trainer
that has more names them in `learnt` and `held`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from megarlhf.batch.base import cat
from megarlhf.batch.supervised import LabelledResponses
from megarlhf.checkpoint.model_directory import ModelDescription
from megarlhf.config.base import FreeToChange
from megarlhf.data.judged_steps import StepData, StepSet, load_steps
from megarlhf.data.preferences import LabelledData, LabelledSet, PreferenceSet, load_labelled, load_preferences
from megarlhf.data.rows import DataConfig
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.models.lora import LoraConfig
from megarlhf.models.optim import OptimConfig
from megarlhf.models.workload import RoleWork, Workload
from megarlhf.observe.about import About
from megarlhf.parallel.mesh import Mesh
from megarlhf.runs.settings import RunConfig
from megarlhf.runtime.about import about
from megarlhf.runtime.checks import (
    Model,
    check_adapters,
    check_batch,
    check_budget,
    check_longest,
    check_rows,
    check_tokenizer,
    checked_model,
    resolve_tokenizer,
)
from megarlhf.runtime.learning import check_learner
from megarlhf.runtime.roles import print_dropped
from megarlhf.runtime.said import DataSet, remarks, say, say_data
from megarlhf.runtime.texts import check_apart, chosen_data, chosen_heldout, with_separator

MEASURED = 1024
"""Training responses of a kind that stand in for held-out ones."""
JudgedSet = PreferenceSet | LabelledSet | StepSet


class JudgedConfig(RunConfig):
    """Where a model with a scalar head starts, and what it learns of outcomes."""

    model: str = ""
    """Where the body starts: a model directory (usually the SFT model), or a preset drawn from `seed`."""
    tokenizer: str = ""
    """Tokenizer directory, `arithmetic` or `programs` for a built-in one, or empty for the model's own."""
    pairs: DataConfig | None = None
    """Preference pairs: columns prompt, chosen, rejected, and optionally margin."""
    labelled: LabelledData | None = None
    """Judged responses: columns prompt, response, correct (0 to 1, or to `labelled.scale`)."""
    heldout: LabelledData | None = None
    """Judged responses to measure AUC on, and to normalise the scores by; without them it is done by training rows."""
    heldout_pairs: Annotated[DataConfig | None, FreeToChange(said=True)] = None
    """Pairs to measure order, margin and calibration on, as eval_every says, by the scores before `normalise`."""
    pointwise_weight: float = Field(default=1.0, gt=0)
    """Weight of the pointwise term. Source: the paper gives none; 1 weighs the terms equally."""
    pairs_batch: int = Field(default=64, ge=1)
    """Pairs per optimiser step, over all data ranks; used where `pairs` is set."""
    labelled_batch: int = Field(default=128, ge=2)
    """Judged responses per optimiser step, an even number; used where `labelled` is set."""
    normalise: Literal["none", "centre", "standardise"] = "centre"
    """What is done to scores: shift their mean to 0, and divide by their spread too. Both are measured on `heldout`,
    and where that is unset on up to 1024 responses of the training data (a pair has two).
    Source: centre is Huang et al. 2024; standardise is Ziegler et al. 2019."""
    optim: OptimConfig = OptimConfig(lr=1e-5)
    """Optimiser."""
    lora: LoraConfig | None = None
    """Low-rank adapters that learn, with the scalar head, in place of the model's other weights; null: all of them."""
    epochs: Annotated[float, FreeToChange(said=True, ends=True)] = Field(default=1.0, gt=0)
    """Passes over the largest of the data sets; more tend to over-fit. Source: Huang et al. 2024 use 1.
    A run that is done goes on with more."""

    @property
    def learnt(self) -> dict[str, tuple[DataConfig | None, int]]:
        """Rows that are learnt from, by their setting, and how many of them a step takes."""
        return {"pairs": (self.pairs, self.pairs_batch), "labelled": (self.labelled, self.labelled_batch)}

    @property
    def held(self) -> dict[str, DataConfig | None]:
        """Rows that are measured, by their setting."""
        return {"heldout": self.heldout, "heldout_pairs": self.heldout_pairs}

    @property
    def given(self) -> dict[str, DataConfig]:
        """Of each set that there is, in the order in which they are said."""
        every = {**{name: rows for name, (rows, _) in self.learnt.items()}, **self.held}
        return {name: rows for name, rows in every.items() if rows}

    @property
    def batches(self) -> dict[str, int]:
        """Rows of each set that a step takes."""
        return {name: batch for name, (rows, batch) in self.learnt.items() if rows}

    @property
    def couples(self) -> tuple[str, int]:
        """Couples of sequences that a step takes, and the settings that say so."""
        said = " + ".join(f"{name}_batch" if name == "pairs" else f"{name}_batch / 2" for name in self.learnt)
        return said, sum(batch if name == "pairs" else batch // 2 for name, batch in self.batches.items())


def judged_workload(cfg: JudgedConfig) -> Workload:
    """What a step does, in numbers: the model learns from couples of sequences, each read at a token or a few."""
    learns = cfg.optim.distributed
    role = RoleWork("reward", "model", cfg.model, "scalar", learns=True, distributed=learns, lora=cfg.lora)
    said, couples = cfg.couples
    longest = max(rows.max_tokens for rows, _ in cfg.learnt.values() if rows)
    return Workload((role,), longest - 1, 1, rows=couples, step_rows=couples, step_setting=said, sequences=2)


@dataclass(frozen=True)
class JudgedInputs:
    """Everything that was read and checked before a model is built."""

    model: ModelDescription
    tokenizer: Tokenizer
    data: Mapping[str, DataConfig]
    """Of each set that there is."""
    sets: Mapping[str, JudgedSet]
    """Likewise."""
    shared: Sequence[str]
    """What is to be said of rows that are held out, and learnt from."""
    steps: int

    @property
    def pairs(self) -> PreferenceSet | None:
        """Of `pairs`."""
        return cast(PreferenceSet | None, self.sets.get("pairs"))

    @property
    def labelled(self) -> LabelledSet | None:
        """Of `labelled`."""
        return cast(LabelledSet | None, self.sets.get("labelled"))

    @property
    def heldout(self) -> LabelledSet | None:
        """Of `heldout`."""
        return cast(LabelledSet | None, self.sets.get("heldout"))

    @property
    def heldout_pairs(self) -> PreferenceSet | None:
        """Of `heldout_pairs`."""
        return cast(PreferenceSet | None, self.sets.get("heldout_pairs"))

    @property
    def heldout_steps(self) -> StepSet | None:
        """Of `heldout_steps`."""
        return cast(StepSet | None, self.sets.get("heldout_steps"))


def read_inputs(cfg: JudgedConfig) -> JudgedInputs:
    """Read and check all rows, the model and the tokenizer.

    Raises:   a MegarlhfError that names the setting, the values and the remedy.
    """
    for name, (_, batch) in cfg.learnt.items():
        if name != "pairs" and batch % 2:
            raise ConfigError(f"{name}_batch={batch} is odd; responses travel two by two, use an even number.")
    model = checked_model(cfg.model, cfg.layout, "model")
    check_adapters(cfg.lora, model.spec, "lora")
    start_from = Model("model", cfg.model, model)
    check_learner(start_from, cfg.optim, "optim", cfg)
    tokenizer = resolve_tokenizer(cfg.tokenizer, start_from, cfg.pinned_date)
    check_tokenizer(tokenizer, model.spec, "model")
    data = {name: _chosen(name, rows, start_from) for name, rows in cfg.given.items()}
    sets = {name: _load(name, rows, tokenizer) for name, rows in data.items()}
    said, couples = cfg.couples
    check_batch(said, couples, cfg.layout, cfg.cut)
    for name, rows in sets.items():
        check_longest(name, rows.longest, model.spec)
        check_budget(*_together(name, rows, learnt=name in cfg.batches), cfg)
    steps = 1
    for name, batch in cfg.batches.items():
        check_rows(f"{name}_batch", batch, name, len(sets[name]))
        steps = max(steps, round(cfg.epochs * len(sets[name]) / batch))
    held = sets.get("heldout")
    if isinstance(held, LabelledSet) and cfg.keep_best.removeprefix("-") == "reward/auc":
        right = sum(correct > 0.5 for correct in held.correct)
        if right in (0, len(held)):
            raise ConfigError(
                f"keep_best={cfg.keep_best} is not measured: of the {len(held)} responses of heldout {right} are "
                "right; hold out both kinds, or choose another metric."
            )
    cfg.optim.check(steps, "optim")
    cfg.check_more(steps, f"epochs={cfg.epochs:g}")
    return JudgedInputs(model, tokenizer, data, sets, _shared(sets), steps)


def _together(name: str, rows: JudgedSet, *, learnt: bool) -> tuple[str, int]:
    """What is never cut in two of the set of that name, and how many tokens it has at most."""
    if isinstance(rows, PreferenceSet):
        return f"a pair of {name}", rows.longest_pair
    return (f"a couple of rows of {name}", 2 * rows.longest) if learnt else (f"a row of {name}", rows.longest)


def _chosen(name: str, rows: DataConfig, start_from: Model) -> DataConfig:
    data = chosen_heldout(rows, name, start_from) if "heldout" in name else chosen_data(rows, name, start_from)
    return with_separator(data, start_from)


def _load(name: str, rows: DataConfig, tokenizer: Tokenizer) -> JudgedSet:
    if isinstance(rows, StepData):
        return load_steps(rows, tokenizer, name)
    if isinstance(rows, LabelledData):
        return load_labelled(rows, tokenizer, name, rows.scale)
    return load_preferences(rows, tokenizer, name)


def _shared(sets: Mapping[str, JudgedSet]) -> list[str]:
    """What is to be said of each held-out set that has rows of the set of its kind that is learnt from."""
    kinds = {"heldout": "labelled", "heldout_pairs": "pairs", "heldout_steps": "steps"}
    both = [(name, learnt) for name, learnt in kinds.items() if name in sets and learnt in sets]
    return [check_apart(name, _ids(sets[name]), {learnt: _ids(sets[learnt])}) for name, learnt in both]


def _ids(rows: JudgedSet) -> Iterable[Sequence[int]]:
    return rows.sides if isinstance(rows, PreferenceSet) else rows.tokens


def say_start(cfg: JudgedConfig, inputs: JudgedInputs, mesh: Mesh) -> About:
    """Say what is learnt from and what is measured, on rank 0. Returns it, for the run's page."""
    for name, rows in inputs.sets.items():
        print_dropped(name, rows.dropped, rows.origin.distinct(len(rows)), mesh)
    sets = [DataSet(name, cfg.given[name], inputs.data[name], rows) for name, rows in inputs.sets.items()]
    epochs = {name: inputs.steps * batch / len(inputs.sets[name]) for name, batch in cfg.batches.items()}
    say_data(sets, inputs.tokenizer, mesh, epochs=epochs)
    start_from = Model("model", cfg.model, inputs.model)
    found = remarks(sets, inputs.tokenizer, start_from)
    say([*found, *filter(None, inputs.shared)], mesh)
    templates = {each.name: each.data.rendering for each in sets}
    if len(set(templates.values())) > 1:
        used = ", ".join(f"{name}.template={template}" for name, template in templates.items())
        say([f"prompts are rendered differently ({used}); the model is said to be of the first"], mesh)
    batches = " and ".join(f"{batch:,} rows of {name}" for name, batch in cfg.batches.items())
    say([f"steps: {inputs.steps:,}, each of {batches}"], mesh)
    return about(cfg, {"model": start_from}, sets, mesh, epochs=epochs, steps=inputs.steps)


def responses_to_measure(inputs: JudgedInputs) -> LabelledResponses | None:
    """All held-out responses; without any, training responses evenly from the data, a chosen one right, its twin wrong.

    Without held-out ones the mean is still that of the responses the scores are for, while the spread is flattered.
    None where there are neither.
    """
    if inputs.heldout is not None:
        return inputs.heldout.batch(torch.arange(len(inputs.heldout)))
    parts = []
    if inputs.pairs is not None:
        pairs = inputs.pairs.batch(_evenly(len(inputs.pairs), MEASURED // 2))
        right = torch.tensor([1.0, 0.0]).repeat(len(pairs))
        parts.append(LabelledResponses(pairs.tokens, pairs.lengths, right, torch.ones_like(right)))
    if inputs.labelled is not None:
        parts.append(inputs.labelled.batch(_evenly(len(inputs.labelled), MEASURED)))
    return cat(parts) if parts else None


def _evenly(rows: int, most: int) -> Tensor:
    return torch.arange(rows)[:: -(-rows // most)]
