"""Directories of safetensors, strictly: every header is checked before a tensor is read, and shards are streamed out.

A tensor that nobody would read is refused, in a conversion as where a run begins: a Llama with scales, adapters or more
layers beside it is another model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megarlhf.checkpoint.hf_names import shape_of, tensor_names
from megarlhf.errors import CheckpointError
from megarlhf.models.spec import ModelSpec
from megarlhf.models.transformer import HeadKind
from megarlhf.observe.files import MOST_BYTES, read_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
AGAIN = "download the model again."
FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Older files keep them, though config.json says what they are."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Part:
    """Rows and columns (begin, end) of a Hugging Face tensor; of a vector, which has none, `columns` is None."""

    name: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        spans = [self.rows] if self.columns is None else [self.rows, self.columns]
        return tuple(end - begin for begin, end in spans)


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what its file's header says of it."""

    path: Path
    shape: tuple[int, ...]
    code: str


class SafetensorsDirectory:
    """The tensors of a model directory, all accounted for; weights are mapped, not read, until they are used.

    Raises:   CheckpointError naming the file and tensor that is missing, surplus, doubled, of another shape or type.
    """

    def __init__(self, directory: Path, spec: ModelSpec, head: HeadKind) -> None:
        """Read the index and every header, and compare what is there with what the model needs."""
        self._directory = directory
        self.tensors: dict[str, Stored] = {}
        for path, names in _listed(directory).items():
            self._add_file(path, names)
        for name, stored in self.tensors.items():
            if stored.code not in DTYPES:
                raise CheckpointError(
                    f"{stored.path}: {name!r} is of type {stored.code}; weights must be one of {', '.join(DTYPES)}: "
                    "name the model that these were made from, or store them in one of these types."
                )
        self.left_out = self._take_known(spec, head)
        """Tensors that are there, and known not to be needed."""
        expected = tensor_names(spec, head)
        self._check_names(expected)
        for name in expected:
            stored, shape = self.tensors[name], shape_of(name, spec)
            if stored.shape != shape:
                raise CheckpointError(
                    f"{stored.path}: {name} is {list(stored.shape)}, config.json says {list(shape)}; "
                    "the files do not belong together."
                )

    def dtypes(self) -> dict[str, torch.dtype]:
        """The type of every tensor."""
        return {name: DTYPES[stored.code] for name, stored in self.tensors.items()}

    def tensor(self, name: str) -> Tensor:
        """The whole of a tensor."""
        rows, *columns = self.tensors[name].shape
        return self.read(Part(name, (0, rows), (0, columns[0]) if columns else None))

    def read(self, part: Part) -> Tensor:
        """A view of the mapped file: only what is touched becomes resident, and only while the view lives."""
        path = self.tensors[part.name].path
        tensor = mapped(part.name, self.tensors[part.name], part)
        check_finite(tensor, f"{path}: {part.name}")
        return tensor

    def _add_file(self, path: Path, listed: set[str] | None) -> None:
        for name, stored in headers(path).items():
            if name in self.tensors:
                raise CheckpointError(f"{path}: {name!r} is also in {self.tensors[name].path.name}; {AGAIN}")
            if listed is not None and name not in listed:
                raise CheckpointError(f"{path}: {name!r} is not listed there by {INDEX}; {AGAIN}")
            self.tensors[name] = stored
        absent = sorted((listed or set()) - self.tensors.keys())
        if absent:
            raise CheckpointError(f"{path}: {absent[0]!r} is not in the file, though {INDEX} says so; {AGAIN}")

    def _take_known(self, spec: ModelSpec, head: HeadKind) -> tuple[str, ...]:
        """Take out what older or careless files hold besides."""
        known = [name for name in self.tensors if FREQUENCIES.fullmatch(name)]
        if head == "language" and spec.tie_embeddings and {EMBEDDING, HEAD} <= self.tensors.keys():
            embedding, ours = (mapped(name, self.tensors[name]) for name in (EMBEDDING, HEAD))
            if ours.dtype != embedding.dtype or not torch.equal(ours, embedding):
                raise CheckpointError(
                    f"{self.tensors[HEAD].path}: {HEAD} is not equal to {EMBEDDING}, though config.json says "
                    "tie_word_embeddings=true; set it to false, or remove the one that is wrong."
                )
            known.append(HEAD)
        for name in known:
            del self.tensors[name]
        return tuple(known)

    def _check_names(self, expected: Sequence[str]) -> None:
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{self._directory}: {len(missing)} tensors that config.json asks for are missing, first {missing[0]}; "
                "the directory is partial or of another architecture, download it again."
            )
        extra = sorted(self.tensors.keys() - set(expected))
        if extra:
            raise CheckpointError(
                f"{self.tensors[extra[0]].path}: {len(extra)} tensors are not of the model that config.json describes, "
                f"first {extra[0]!r}; correct config.json, or take them out: merge adapters, multiply scales in, "
                "remove other heads."
            )


class SafetensorsWriter:
    """Writes shards in place, block of rows by block of rows; their headers follow from names, shapes and types alone.

    Raises:   OSError where the disk fails.
    """

    def __init__(
        self, directory: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], shard: int
    ) -> None:
        """Plan shards of at most `shard` bytes, one tensor at least."""
        self._shapes, self._dtypes = shapes, dtypes
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._files: list[BinaryIO] = []
        groups = _shards({name: _bytes(shape, dtypes[name]) for name, shape in shapes.items()}, shard)
        names = (
            [SINGLE]
            if len(groups) == 1
            else [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        )
        for file, group in zip(names, groups, strict=True):
            self._start(directory / file, group)
        if len(groups) > 1:
            total = sum(_bytes(shape, dtypes[name]) for name, shape in shapes.items())
            files = {name: file for file, group in zip(names, groups, strict=True) for name in group}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, first_row: int, rows: Tensor) -> None:
        """Put `rows` where they belong: whole rows of `name`, from `first_row` on."""
        file, start = self._places[name]
        row_bytes = _bytes(self._shapes[name][1:], self._dtypes[name])
        file.seek(start + first_row * row_bytes)
        file.write(rows.to(self._dtypes[name]).contiguous().view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        """The files are open already."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _start(self, path: Path, group: Sequence[str]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        offsets = {}
        for name in group:
            offsets[name] = end
            end += _bytes(self._shapes[name], self._dtypes[name])
            header[name] = {
                "dtype": CODES[self._dtypes[name]],
                "shape": list(self._shapes[name]),
                "data_offsets": [offsets[name], end],
            }
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format asks for weights that are aligned to 8 bytes
        file = path.open("xb")
        self._files.append(file)
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        self._places |= {name: (file, 8 + len(encoded) + offset) for name, offset in offsets.items()}


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise CheckpointError at a NaN or an infinity: files have no checksums, and damage often looks like this."""
    low, high = tensor.aminmax()
    if not bool(low.isfinite() & high.isfinite()):
        raise CheckpointError(f"{what} holds numbers that are not finite; the file is damaged, fetch it again.")


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Tensors in order, a new shard wherever the next one would not fit."""
    shards: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room or not shards:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def mapped(name: str, stored: Stored, part: Part | None = None) -> Tensor:
    """A tensor, or a part of it, as its file has it."""
    try:
        with safe_open(stored.path, framework="pt") as file:
            if part is None:
                return file.get_tensor(name)
            found, rows = file.get_slice(name), slice(*part.rows)
            return found[rows] if part.columns is None else found[rows, slice(*part.columns)]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{stored.path}: {name} cannot be read ({error}); {AGAIN}") from None


def headers(path: Path) -> dict[str, Stored]:
    """What the header of a file says of each tensor. Raises CheckpointError where it cannot be read."""
    try:
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > MOST_BYTES:
            raise SafetensorError(f"its header claims {length:,} bytes, at most {MOST_BYTES:,} are read")
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: Stored(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {AGAIN}") from None


def _listed(directory: Path) -> dict[Path, set[str] | None]:
    """The files of weights and the names that the index puts into each; None where there is no index."""
    if not directory.is_dir():
        raise CheckpointError(f"model directory {directory} does not exist; name an existing one.")
    single, index = directory / SINGLE, directory / INDEX
    if (directory / ADAPTER).is_file():
        raise CheckpointError(
            f"{directory / ADAPTER}: adapters are not read; merge them into the model, with peft's merge_and_unload, "
            "and save that."
        )
    if single.is_file() and index.is_file():
        raise CheckpointError(f"{directory}: both {SINGLE} and {INDEX} are there; remove the one that is stale.")
    if not single.is_file() and not index.is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        way_out = (
            f"{pickled[0]!r} may run code when it is read. Convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            if pickled
            else AGAIN.rstrip(".")
        )
        raise CheckpointError(
            f"{directory}: neither {SINGLE} nor {INDEX} is there, and only safetensors are read; {way_out}."
        )
    files: dict[Path, set[str] | None] = {single: None}
    if index.is_file():
        files = {directory / file: names for file, names in sorted(_indexed(index).items())}
    for path in sorted({*directory.glob("*.safetensors")} - files.keys()):
        raise CheckpointError(f"{str(path)!r} is no part of the model; move it elsewhere, or {AGAIN}")
    return files


def _indexed(index: Path) -> dict[str, set[str]]:
    listed: dict[str, set[str]] = {}
    for name, file in _weight_map(index).items():
        if not isinstance(file, str) or "/" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {file!r} is not the name of a safetensors file beside it; {AGAIN}")
        listed.setdefault(file, set()).add(name)
    for file in listed:
        if not (index.parent / file).is_file():
            raise CheckpointError(f"{index.parent}: {file!r} is missing; the directory is partial, {AGAIN}")
    return listed


def _weight_map(index: Path) -> dict[str, Any]:
    try:
        found = read_object(index).get("weight_map")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{index}: not an index of tensors ({error}); {AGAIN}") from None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index}: not an index of tensors (it has no weight_map of names); {AGAIN}")
    return found
