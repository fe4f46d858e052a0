"""Model directories: weights as a resharding `megatron.core.dist_checkpointing` checkpoint, the spec and the tokenizer.

    DIR/model.json       architecture and head
    DIR/tokenizer/       Hugging Face tokenizer
    DIR/weights/         sharded weights and adapters, loadable in any layout, and their checksums
    DIR/huggingface/     of a model that comes from there: what training does not need and the way back does
    DIR/adapter/         of a model with adapters: these once more, in PEFT's form
    DIR/checksums.json   of all but the weights, by way of theirs of these too

A directory is written under a temporary name and renamed when it is whole, so a partial one never looks complete.
"""

from __future__ import annotations

import datetime
import json
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pydantic
import torch
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megarlhf.checkpoint.adapters import ADAPTER, sharded_adapters, write_peft
from megarlhf.checkpoint.buckets import planned, write_now
from megarlhf.checkpoint.checksums import (
    CHECKSUMS,
    check_checksums,
    check_hugging_face,
    leave_checksums,
    write_checksums,
)
from megarlhf.checkpoint.disk import check_room, saving
from megarlhf.checkpoint.dist_files import CheckpointReader, saved_tensors
from megarlhf.checkpoint.hf_extras import EXTRAS, end_ids, kept
from megarlhf.checkpoint.hf_files import SafetensorsDirectory
from megarlhf.checkpoint.hf_load import load_tensors
from megarlhf.checkpoint.hf_names import OURS, normalisation
from megarlhf.checkpoint.hf_pieces import pieces_of
from megarlhf.checkpoint.nearby import MODEL, check_place
from megarlhf.checkpoint.peft_files import refuse_peft
from megarlhf.checkpoint.plain_metadata import PlainLoad, PlainReader
from megarlhf.checkpoint.random_weights import RandomTensors
from megarlhf.config import Config
from megarlhf.data.rows import BUILT_IN, DataConfig
from megarlhf.data.tokenizer import Template, Tokenizer
from megarlhf.errors import CheckpointError, TrainingError, printable
from megarlhf.models.finite import not_finite
from megarlhf.models.lora import LoraConfig
from megarlhf.models.readings import PositionValues, SequenceScores, StepScores
from megarlhf.models.role import Role
from megarlhf.models.spec import CONFIG, PRESETS, ModelSpec, RopeScaling, preset, read_config
from megarlhf.models.transformer import HeadKind
from megarlhf.observe.files import link_out, read_object
from megarlhf.parallel.collectives import all_reduce, barrier, on_main

WEIGHTS = "weights"
TOKENIZER = "tokenizer"
AGAIN = "save the model again"
HEADS: dict[str, HeadKind] = {"LlamaForCausalLM": "language", "LlamaForSequenceClassification": "scalar"}
TOLD = ("template", "date", "task", "step_separator")
"""Entries of MODEL that are kept in a Hugging Face config.json too, under OURS."""


class ModelDescription(Config):
    """What `model.json` says."""

    spec: ModelSpec
    """Architecture."""
    head: HeadKind
    """Vocabulary projection or scalar head."""
    score_offset: float = 0.0
    """Subtracted from a reward model's scores, so that reference responses score 0 on average."""
    score_scale: float = pydantic.Field(default=1.0, gt=0)
    """What the centred scores are divided by."""
    score_wrong: float | None = None
    """Mean score, so normalised, of wrong or rejected responses; null where nobody measured it."""
    step_separator: str | None = pydantic.Field(default=None, min_length=1)
    """What parts steps in the responses whose steps it judges, of a process reward model; null for any other."""
    template: Template | None = None
    """How the prompts were rendered that it was trained on; null where nobody knows."""
    date: datetime.date | None = None
    """The date in them, where the chat template renders one."""
    eos_ids: tuple[int, ...] = ()
    """Ids that end a response, whatever the tokenizer says; those of Hugging Face's configurations."""
    task: Literal["", "arithmetic"] = ""
    """The built-in task, where the model was last trained on that."""
    lora: LoraConfig | None = None
    """The adapters that lie beside its weights, and are part of what the model is; null where there are none."""

    def scores(self) -> SequenceScores:
        """How a reward model's scores are read."""
        return SequenceScores(self.score_offset, self.score_scale)

    def step_scores(self) -> StepScores:
        """How a process reward model's scores are read, one at the end of each step."""
        return StepScores(self.score_offset, self.score_scale)

    def values(self) -> PositionValues:
        """How a critic that starts from it is read: in the same units."""
        return PositionValues(self.score_offset, self.score_scale)


def describe_model(init: str) -> ModelDescription:
    """The architecture behind `init`: a preset's name, a Hugging Face directory, or one that `save_model` wrote.

    Raises:   CheckpointError when it is a directory that cannot be read, or neither directory nor preset.
    """
    if init in PRESETS:
        return ModelDescription(spec=preset(init), head="language")
    directory = Path(init)
    if (directory / MODEL).is_file():
        return _describe_saved(directory)
    if not (directory.parent / MODEL).is_file():  # or the adapters are once more in the model around them
        refuse_peft(init)
    check_place(init, MODEL, CONFIG)
    if not directory.is_dir():
        raise CheckpointError(
            f"model {init!r} is neither a directory nor a preset; name a Hugging Face or megarlhf model directory, or "
            f"one of {', '.join(PRESETS)}."
        )
    return _describe_hf(directory)


def load_model(role: Role, init: str, *, seed: int) -> None:
    """Fill `role` with the weights behind `init`. A preset draws them from `seed`; so does a head that `init` lacks.

    Ranks:    collective over the mesh. Raises CheckpointError when files are missing, corrupt or of another shape.
    """
    found = describe_model(init)
    if found.head == "scalar" and role.head == "language":
        raise CheckpointError(
            f"model {init} has a scalar head, but the {role.name} needs a language model; name another."
        )
    if role.head != found.head or init in PRESETS:
        # The body may be overwritten below; the head stays.
        load_tensors(role, RandomTensors(role.spec, seed))
    if init in PRESETS:
        return
    body_only = role.head != found.head
    if (Path(init) / MODEL).is_file():
        check_checksums(Path(init) / WEIGHTS, AGAIN, role.mesh)
        merged = found.lora if role.lora is None else None
        if merged is not None:
            role.adapt(merged)
        load_weights(role, Path(init) / WEIGHTS, body_only=body_only)
        if merged is not None:
            role.merge()
    else:
        check_hugging_face(Path(init), role.mesh)
        files = SafetensorsDirectory(Path(init), role.spec, found.head)
        if role.mesh.is_main:
            say_left_out(init, files.left_out)
        load_tensors(role, files, backbone_only=body_only)


@dataclass(frozen=True)
class Card:
    """What a model directory says beside its weights."""

    tokenizer: Tokenizer
    data: DataConfig | None = None
    """What it was trained on."""
    origin: str = ""
    """Where its weights started; what is not known of them here is copied from it."""
    score_offset: float = 0.0
    """This and the next two: what `ModelDescription` keeps of a reward model."""
    score_scale: float = 1.0
    score_wrong: float | None = None
    step_separator: str | None = None
    """Of a process reward model."""

    def write(self, role: Role, directory: Path) -> None:
        """Into the directory of the weights' one. Not collective. Raises OSError where the disk refuses."""
        data = self.data
        description = ModelDescription(
            spec=role.spec,
            head=role.head,
            score_offset=self.score_offset,
            score_scale=self.score_scale,
            score_wrong=self.score_wrong,
            step_separator=self.step_separator,
            template=data.template if data else None,
            date=self.tokenizer.date,
            eos_ids=self.tokenizer.eos_ids,
            task="arithmetic" if data and data.source == BUILT_IN else "",
            lora=role.lora,
        )
        (directory / MODEL).write_text(json.dumps(description.model_dump(mode="json"), indent=2) + "\n")
        self.tokenizer.save(directory / TOKENIZER)
        if self.origin and self.origin not in PRESETS:
            _write_extras(directory / EXTRAS, kept(Path(self.origin), self.tokenizer.eos_id))


def save_model(role: Role, directory: Path, card: Card) -> None:
    """Write `role` as a model directory, replacing an older one only once the new one is whole.

    Ranks:    collective over the mesh; rank 0 renames.
    Raises:   TrainingError where the model gives numbers that are not finite, OutputError where the disk refuses.
    """
    if fault := not_finite(role):
        raise TrainingError(
            f"the {role.name} is not saved to {directory}: {fault}; go on from a state before that, or train again, "
            "with a lower learning rate."
        )
    partial = directory.with_name(directory.name + ".partial")
    if role.mesh.is_main:
        shutil.rmtree(partial, ignore_errors=True)
    save_weights(role, partial / WEIGHTS)

    def complete() -> None:
        old = directory.with_name(directory.name + ".old")
        with saving(partial):
            card.write(role, partial)
            if role.lora is not None:
                _write_adapter(role, role.lora, partial, card.origin)
            write_checksums(partial)
            if directory.exists():
                directory.rename(old)
            partial.rename(directory)
        shutil.rmtree(old, ignore_errors=True)

    on_main(complete, role.mesh)


def save_weights(role: Role, directory: Path) -> None:
    """Write the weights alone, with checksums, to a new `directory`, whose parents are made; an old one is removed.

    Ranks:    collective over the mesh.
    Raises:   OutputError where there is no room, or the disk refuses.
    """

    def make() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        with saving(directory):
            directory.mkdir(parents=True)

    def sum_up() -> None:
        with saving(directory):
            write_checksums(directory)

    check_room(directory, weight_bytes(role), f"the weights of the {role.name}", role.mesh)
    on_main(make, role.mesh)
    with role.resident("weights"), saving(directory):
        write_now(planned(sharded_weights(role), directory, role.mesh), role.mesh)
    # Each rank its own: the largest model would take one of them longer than the others may wait.
    with saving(directory):
        leave_checksums(directory, role.mesh.rank)
    barrier(role.mesh)
    on_main(sum_up, role.mesh)


def _write_adapter(role: Role, lora: LoraConfig, directory: Path, base: str) -> None:
    """Put what was saved of adapters into a folder of their own, as PEFT has them."""
    last = pieces_of(role.spec, role.head, layer_cuts=1, vocabulary_cuts=1)[-1][-1:] if role.head == "scalar" else []
    reader = CheckpointReader(directory / WEIGHTS, role.spec, role.head, last, lora)
    head = reader.stored(last[0]) if last else None
    write_peft(directory / ADAPTER, reader.stored, role.spec, lora, base, head)


def weight_bytes(role: Role) -> int:
    """Bytes of one copy of the weights, over all ranks. Collective."""
    mine = torch.tensor(role.planned.weights, device=role.mesh.device)
    return int(all_reduce(mine, role.mesh, "world")) // role.mesh.size("loss")


def _write_extras(directory: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        directory.mkdir(exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")


def tokenizer_directory(init: str) -> Path:
    """Where the tokenizer of the model directory `init` lies."""
    inside = Path(init) / TOKENIZER
    return inside if inside.is_dir() else Path(init)


def _describe_hf(directory: Path) -> ModelDescription:
    config, path = read_config(directory), directory / CONFIG
    _check_links(directory)
    spec = ModelSpec.from_hf_config(config, path)
    named = config.get("architectures") or ["LlamaForCausalLM"]
    if named not in ([name] for name in HEADS):
        raise CheckpointError(f"{path}: architectures={named!r} is unknown; use one of {', '.join(HEADS)}.")
    head = HEADS[named[0]]
    # Opening it finds missing files and tensors now, before a model is built.
    SafetensorsDirectory(directory, spec, head)
    scores = normalisation(config, path)
    known = {name: value for name, value in config.get(OURS, {}).items() if name in TOLD}
    try:
        return ModelDescription(spec=spec, head=head, eos_ids=end_ids(directory), **scores._asdict(), **known)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]
        raise CheckpointError(
            f"{path}: {OURS}.{reason['loc'][0]}={reason['input']!r}: {reason['msg']}; correct it."
        ) from None


def _describe_saved(directory: Path) -> ModelDescription:
    parts = ("metadata.json", ".metadata", "*.distcp", CHECKSUMS)
    if any(not list((directory / WEIGHTS).glob(part)) for part in parts):
        raise CheckpointError(f"model directory {directory}: {WEIGHTS}/ is missing or partial; {AGAIN}.")
    if not (directory / CHECKSUMS).is_file():
        raise CheckpointError(
            f"{directory / CHECKSUMS} is missing: the directory is partial, or older than these; if you trust it, run "
            'python -c "from pathlib import Path; from megarlhf.checkpoint.checksums import write_checksums; '
            f"write_checksums(Path('{directory}'))\"."
        )
    check_checksums(directory, AGAIN, within=(MODEL, TOKENIZER, EXTRAS, WEIGHTS))
    check_checksums(directory / WEIGHTS, AGAIN, but=".distcp")
    found = _read_description(directory / MODEL)
    reader = PlainReader(directory / WEIGHTS, f"the directory is damaged, {AGAIN}")
    saved_tensors(reader, found.spec, found.head, found.lora)
    return found


def _required() -> list[str]:
    """What every model.json says, since a default would stand for what was lost; null alone says that none is known."""
    return [name for name, field in ModelDescription.model_fields.items() if field.default is not None]


def _read_description(path: Path) -> ModelDescription:
    try:
        said = read_object(path)
        spec, scaling = said.get("spec"), None
        if isinstance(spec, dict):
            scaling = spec.get("rope_scaling")
        parts = ((ModelSpec, spec), (RopeScaling, scaling), (LoraConfig, said.get("lora")))
        for names, part in ((_required(), said), *((kind.model_fields, part) for kind, part in parts)):
            lost = [name for name in names if isinstance(part, dict) and name not in part]
            if lost:
                raise ValueError(f"{lost[0]} is missing")
        # Strict: a true or a "4" in place of a number is damage.
        return ModelDescription.model_validate_json(json.dumps(said), strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError) as error:
        what = str(error)
    raise CheckpointError(f"{path}: {what}; {AGAIN}.")


def _check_links(directory: Path) -> None:
    away = link_out(directory)
    if away is not None:
        raise CheckpointError(f"{away} is a link out of {directory}, which is not followed; put the file itself there.")


@cache
def say_left_out(source: str, names: tuple[str, ...]) -> None:
    """Say, once, which tensors of `source` are known not to be needed."""
    if names:
        sys.stderr.write(printable(f"{source}: {len(names)} tensors are not needed and left out, first {names[0]}\n"))


def sharded_weights(role: Role) -> dict[str, Any]:
    """Of each model chunk, what Megatron needs to save its weights or to load them in any layout."""
    metadata = {"dp_cp_group": role.mesh.groups.dp_cp}
    chunks = {f"chunk{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(role.chunks)}
    adapters = sharded_adapters(role)
    return {name: _tensors_only(state) | adapters[name] for name, state in chunks.items()}


def _tensors_only(state: dict[str, Any]) -> dict[str, Any]:
    """Without Transformer Engine's extra state, which differs between kinds of layers and is rebuilt in one step."""
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}


def load_weights(role: Role, directory: Path, *, body_only: bool = False) -> None:
    """Fill `role` with what `save_weights`, or a training state, has for it; `body_only` leaves the head alone.

    Ranks:    collective over the mesh. Raises CheckpointError when files are missing, corrupt or of another shape.
    """
    state = sharded_weights(role)
    if body_only:
        state = {chunk: {k: v for k, v in part.items() if "output_layer" not in k} for chunk, part in state.items()}
    loaded = load_sharded(state, directory, AGAIN)
    role.version += 1
    with torch.no_grad():
        for index, chunk in enumerate(role.chunks):
            chunk.load_state_dict(loaded[f"chunk{index}"], strict=False)


def load_sharded(state: dict[str, Any], directory: Path, remedy: str) -> Any:
    """`state` with what `directory` holds. Collective. Raises CheckpointError with the remedy when it is damaged."""
    try:
        return dist_checkpointing.load(state, str(directory), PlainLoad(f"the directory is damaged, {remedy}"))
    except (Exception, CheckpointException) as error:  # torch's own is no Exception, and holds those of the ranks
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        if isinstance(cause, CheckpointError):
            raise cause from None
        raise CheckpointError(
            f"{directory}: cannot be loaded ({type(cause).__name__}: {cause}); the directory is damaged, {remedy}."
        ) from error
