"""Which rows a command reads and how they become text, where its settings leave that open."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch

from megarlhf.data.arithmetic import STEP_SEPARATOR
from megarlhf.data.judged_steps import StepData
from megarlhf.data.rows import BUILT_IN, DataConfig, is_generated
from megarlhf.data.tokenizer import Template, Tokenizer
from megarlhf.errors import ConfigError
from megarlhf.models.spec import PRESETS
from megarlhf.parallel.collectives import all_reduce
from megarlhf.parallel.mesh import Mesh
from megarlhf.runtime.checks import Model

Data = TypeVar("Data", bound=DataConfig)


def chosen_data(data: Data, name: str, model: Model) -> Data:
    """`data`, the setting `name`, with a source and a template: where it has none, those of the model that reads it.

    Raises:   ConfigError when no source is named, and the model is neither a preset nor one of the built-in task.
    """
    knows_task = model.init in PRESETS or model.description.task == BUILT_IN
    if data.mix:
        return data.model_copy(update={"template": chosen_template(data.template, model)})
    if not data.source and not knows_task:
        raise ConfigError(
            f"{name}.source is empty, and {model} is neither a preset nor was it trained on the "
            f"built-in task; name a file, directory or hub data set, or set {name}.source={BUILT_IN} for that task."
        )
    template = chosen_template(data.template, model)
    return data.model_copy(update={"source": data.source or BUILT_IN, "template": template})


def check_one_source(data: DataConfig, name: str) -> None:
    """Raise ConfigError where `data`, the setting `name`, is a mix, whose rows may be there more than once."""
    if data.mix:
        raise ConfigError(f"{name}.mix is for rows that are learnt from; set {name}.source, for each of them in turn.")


def chosen_heldout(data: Data, name: str, model: Model) -> Data:
    """As `chosen_data`; of what is generated the split `heldout`, unless another one is named."""
    check_one_source(data, name)
    chosen = chosen_data(data, name, model)
    generated = is_generated(chosen.source)
    return chosen.model_copy(update={"split": "heldout"}) if generated and not chosen.split else chosen


def check_apart(name: str, heldout: Iterable[Sequence[int]], trained: Mapping[str, Iterable[Sequence[int]]]) -> str:
    """What is to be said of held-out rows, of the setting `name`, that are also trained on; rows as their token ids.

    trained: rows by the setting that they are of. Raises ConfigError where all held-out rows are among them.
    """
    asked = [tuple(row) for row in heldout]
    distinct, settings = set(asked), " and ".join(trained)
    seen = {ids for rows in trained.values() for ids in map(tuple, rows) if ids in distinct}
    shared = sum(ids in seen for ids in asked)
    if shared == len(asked):
        raise ConfigError(
            f"{name}: all its {shared:,} rows are among those of {settings}, which are learnt from; name others, by "
            f"{name}.source or {name}.split."
        )
    return f"{name}: {shared:,} of {len(asked):,} rows are also among those of {settings}" if shared else ""


def chosen_template(template: Template | None, model: Model) -> Template:
    """`template`, or where it is None what the model was trained with, or chat where nobody knows."""
    return template or model.description.template or "chat"


def chosen_separator(separator: str | None, usual: str, model: Model) -> str:
    """What parts steps: as set, or else as the model was taught, or as the built-in task has it, or `usual`."""
    taught = model.description.step_separator or (STEP_SEPARATOR if model.description.task == BUILT_IN else None)
    return separator or taught or usual


def with_separator(data: Data, model: Model) -> Data:
    """`data`; judged steps with what `chosen_separator` finds to join them."""
    if not isinstance(data, StepData):
        return data
    return data.model_copy(update={"separator": chosen_separator(data.separator, data.joint, model)})


def check_one_day(tokenizer: Tokenizer, mesh: Mesh) -> None:
    """Raise ConfigError where the chat template was told different days on different ranks. Collective."""
    day = torch.tensor(tokenizer.date.toordinal() if tokenizer.date else 0, device=mesh.device)
    first, last = -int(all_reduce(-day, mesh, "world", "max")), int(all_reduce(day, mesh, "world", "max"))
    if first != last:
        days = " and ".join(str(datetime.date.fromordinal(number)) for number in (first, last))
        raise ConfigError(f"date: midnight came while the ranks started, and they saw {days}; start again.")
