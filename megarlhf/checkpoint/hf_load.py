"""Weights into a Megatron model of any layout: from a Hugging Face directory, or drawn at random.

Each rank keeps only its slices. Random weights are drawn as Hugging Face tensors too, each from a seed of its own, so a
seed means the same model in every layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megarlhf.checkpoint.hf_names import cut_for_rank, shape_of, source_of, tensor_names
from megarlhf.errors import CheckpointError
from megarlhf.models.role import Role
from megarlhf.models.spec import ModelSpec
from megarlhf.models.transformer import HeadKind, LlamaModel
from megarlhf.parallel.rng import generator

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class TensorSource(Protocol):
    """Whole Hugging Face tensors by name."""

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, whole, on the CPU."""
        ...


class HuggingFaceDirectory:
    """The tensors of a directory of safetensors, opened one file at a time.

    Raises:   CheckpointError when a file or tensor is missing, unreadable or of the wrong shape.
    """

    def __init__(self, directory: Path, spec: ModelSpec, head: HeadKind) -> None:
        self._directory = directory
        self._spec = spec
        self._files = _files(directory)
        missing = [name for name in tensor_names(spec, head) if name not in self._files]
        if missing:
            raise CheckpointError(
                f"{directory}: {len(missing)} tensors are missing, first {missing[0]}; the directory is partial or of "
                "another architecture, download the model again."
            )

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, in the file's own type."""
        path = self._directory / self._files[name]
        try:
            with safe_open(path, framework="pt") as file:
                tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); download the model again.") from None
        expected = shape_of(name, self._spec)
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{path}: {name} is {list(tensor.shape)}, config.json says {list(expected)}; "
                "the files do not belong together."
            )
        return tensor


class RandomTensors:
    """Initial weights: normal with std 0.02, residual projections scaled by 1/sqrt(2 layers), norms 1.

    Source:   GPT-2's initialisation, as in Megatron; the scalar head's 1/sqrt(H + 1) is Huang et al. 2024's.
    """

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self._spec = spec
        self._seed = seed

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`, fp32."""
        shape = shape_of(name, self._spec)
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        std = 0.02
        if name == "score.weight":
            std = 1 / math.sqrt(self._spec.hidden_size + 1)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            std = 0.02 / math.sqrt(2 * self._spec.layers)
        return torch.randn(shape, generator=generator(self._seed, "weights", name)) * std


def load_tensors(role: Role, source: TensorSource, *, backbone_only: bool = False) -> None:
    """Fill this rank's parameters of `role` from `source`.

    backbone_only: leave the head as it is, for a scalar head on a language model's body.
    """
    tensor_group = role.mesh.group("tensor")
    with torch.no_grad():
        for name, parameter in named_parameters(role.chunks):
            if backbone_only and name == "output_layer.weight":
                continue
            origin = source_of(name, role.spec, role.head)
            whole = [source.tensor(part) for part in origin.names]
            mine = cut_for_rank(whole, origin.cut, role.spec, tensor_group.rank(), tensor_group.size())
            parameter.copy_(mine)


def named_parameters(chunks: Sequence[LlamaModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters of this rank with layers numbered over the whole model."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                # Megatron numbers layers from 1 over the whole model, and from 0 within a chunk.
                layer: Any = chunk.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
            yield ".".join(parts), parameter


def _files(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or from the single file."""
    if not directory.is_dir():
        raise CheckpointError(f"model directory {directory} does not exist; name an existing one.")
    index = directory / INDEX
    if index.is_file():
        try:
            files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise CheckpointError(f"{index}: not an index of tensors ({error}); download the model again.") from None
        absent = sorted({name for name in files.values() if not (directory / name).is_file()})
        if absent:
            raise CheckpointError(
                f"{directory}: {', '.join(absent)} missing; the directory is partial, download it again."
            )
        return files
    if not (directory / SINGLE).is_file():
        raise CheckpointError(
            f"{directory}: neither {SINGLE} nor {INDEX} is there; megarlhf reads safetensors only, convert .bin files."
        )
    try:
        with safe_open(directory / SINGLE, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / SINGLE}: cannot be read ({error}); download the model again.") from None
