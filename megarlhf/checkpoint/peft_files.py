"""Directories of adapters in PEFT's form, added to the weights of the model that they were trained on.

    W + scale * B A        scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

A setting or a tensor that would make it another model is refused: nothing is left out that PEFT would have used.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.checkpoint.adapters import PEFT_CONFIG, PEFT_WEIGHTS
from megarlhf.checkpoint.hf_files import (
    DTYPES,
    INDEX,
    SINGLE,
    Part,
    SafetensorsDirectory,
    check_finite,
    headers,
    mapped,
)
from megarlhf.checkpoint.hf_names import LAYER, shape_of
from megarlhf.errors import CheckpointError
from megarlhf.models.spec import CONFIG, ModelSpec
from megarlhf.observe.files import read_object

BY_PEFT = "merge them with peft's merge_and_unload and save that"
READ = {"peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "base_model_name_or_path"}
"""Entries of an adapter's configuration that are heeded."""
HARMLESS = {
    *("task_type", "inference_mode", "auto_mapping", "revision", "peft_version", "lora_dropout", "exclude_modules"),
    *("modules_to_save", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size"),
}
"""Those that the tensors say too, or that do nothing once the adapters are trained."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of init_lora_weights under which the base stays as it was."""
NEUTRAL = (None, False, "none", "", 0)
"""What any other entry may be; an empty list or mapping too."""
TENSOR = re.compile(r"base_model\.model\.(?P<module>.+?)(\.lora_(?P<side>[AB]))?\.weight")


def is_peft(directory: Path) -> bool:
    """Whether `directory` has adapters in PEFT's form, and no model."""
    return (directory / PEFT_CONFIG).is_file() and not any((directory / name).is_file() for name in (SINGLE, INDEX))


def refuse_peft(init: str) -> None:
    """Raise CheckpointError where `init` is a directory of adapters alone, which nothing starts from."""
    if is_peft(Path(init)):
        raise CheckpointError(
            f"model {init!r} has adapters in PEFT's form and no weights; add them to their base with `megarlhf convert "
            f"model={init} output=NEW to=megatron`, and name NEW."
        )


def base_of(directory: Path, named: str) -> Path:
    """The Hugging Face directory of the model that the adapters in `directory` belong to: `named`, or what they name.

    Raises:   CheckpointError where it is no such directory.
    """
    base = named or _config(directory).get("base_model_name_or_path")
    if not isinstance(base, str) or not (Path(base) / CONFIG).is_file():
        source = f"base={named}" if named else f"{directory / PEFT_CONFIG}: base_model_name_or_path={base!r}"
        raise CheckpointError(
            f"{source} is no Hugging Face directory here; name the model that the adapters were trained on, with "
            "base=DIR (one of megarlhf's own: first convert it with to=hf)."
        )
    return Path(base)


class MergedDirectory:
    """What `files`, the base model's, hold with the adapters of `directory` added, in fp32 where there are some.

    Raises:   CheckpointError naming the entry or tensor that makes it another model, and the remedy.
    """

    def __init__(self, directory: Path, files: SafetensorsDirectory, spec: ModelSpec) -> None:
        """Read the configuration and the header of the adapters, and compare them with the base."""
        config = _config(directory)
        _check_config(config, directory / PEFT_CONFIG)
        self._files, self._path = files, directory / PEFT_WEIGHTS
        self._scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
        if not self._path.is_file():
            raise CheckpointError(
                f"{directory}: {PEFT_WEIGHTS} is missing, and only safetensors are read; save the adapters so, with "
                "save_pretrained of peft."
            )
        self._tensors = headers(self._path)
        self._adapted: set[str] = set()
        """Weights of the base that have an adapter."""
        self._replaced: dict[str, str] = {}
        """The tensor in place of a weight of the base, by its name there."""
        for name in self._tensors:
            self._take(name, config["r"], spec)
        self._check_targets(config, spec)

    def read(self, part: Part) -> Tensor:
        """A part of a tensor of the model that base and adapters are."""
        if part.name in self._replaced:
            return self._own(self._replaced[part.name], part.rows, part.columns)
        tensor = self._files.read(part)
        if part.name not in self._adapted:
            return tensor
        a, b = (_side(part.name, side) for side in "AB")
        rank = (0, self._tensors[a].shape[0])
        low, high = self._own(a, rank, part.columns), self._own(b, part.rows, rank)
        return torch.addmm(tensor.float(), high.float(), low.float(), alpha=self._scale)

    def _own(self, name: str, rows: tuple[int, int], columns: tuple[int, int] | None) -> Tensor:
        tensor = mapped(name, self._tensors[name], Part(name, rows, columns))
        check_finite(tensor, f"{self._path}: {name}")
        return tensor

    def _take(self, name: str, rank: int, spec: ModelSpec) -> None:
        found, stored = TENSOR.fullmatch(name), self._tensors[name]
        weight = f"{found['module']}.weight" if found else ""
        if found is None or weight not in self._files.tensors or stored.code not in DTYPES:
            raise CheckpointError(
                f"{self._path}: {name!r} of type {stored.code} is nothing that a weight of the base has; {BY_PEFT}."
            )
        shape = shape_of(weight, spec)
        wanted = {"A": (rank, shape[-1]), "B": (shape[0], rank), None: shape}[found["side"]]
        if stored.shape != wanted:
            raise CheckpointError(
                f"{self._path}: {name} is {list(stored.shape)}, base and r={rank} want {list(wanted)}; name the base "
                "that the adapters were trained on, with base=DIR."
            )
        if found["side"] is None:
            self._replaced[weight] = name
            return
        other = _side(weight, "B" if found["side"] == "A" else "A")
        if other not in self._tensors:
            raise CheckpointError(f"{self._path}: {name} is there and {other} is not; save the adapters again.")
        self._adapted.add(weight)

    def _check_targets(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """Raise where a layer lacks an adapter that the configuration asks for: the file is partial."""
        targets, layers = config.get("target_modules"), range(spec.layers)
        names = [name for _, parts in LAYER.values() for name in parts]
        if not isinstance(targets, list) or any(
            config.get(name) for name in ("layers_to_transform", "exclude_modules")
        ):
            names = []  # which of them is for PEFT to say
        asked = [name for name in names if name.split(".")[-2] in (targets or [])]
        every = [f"model.layers.{layer}.{name}" for layer in layers for name in asked]
        missing = [name for name in every if name not in self._adapted] or ["any"][: not self._adapted]
        if missing:
            raise CheckpointError(f"{self._path}: the adapter of {missing[0]} is missing; save the adapters again.")


def _side(weight: str, side: str) -> str:
    return f"base_model.model.{weight.removesuffix('.weight')}.lora_{side}.weight"


def _config(directory: Path) -> dict[str, Any]:
    try:
        return read_object(directory / PEFT_CONFIG)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory / PEFT_CONFIG}: not JSON ({error}); save the adapters again.") from None


def _check_config(config: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError where the adapters are of another kind, or are added otherwise, than this file does it."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        kind = f"peft_type={config.get('peft_type')!r}, r={rank!r}, lora_alpha={alpha!r}"
        raise CheckpointError(f"{path}: {kind} are no low-rank adapters; {BY_PEFT}.")
    start = config.get("init_lora_weights", True)
    others = {name: value for name, value in config.items() if name not in {*READ, *HARMLESS, "init_lora_weights"}}
    unread = {name: value for name, value in others.items() if value not in (*NEUTRAL, [], {})}
    unread |= {} if start in PLAIN_STARTS else {"init_lora_weights": start}
    if unread:
        name, value = next(iter(unread.items()))
        raise CheckpointError(f"{path}: {name}={value!r} is not known here; {BY_PEFT}.")
