"""`.metadata` of a Megatron checkpoint, read as data: torch unpickles it, and so runs whatever function it names.

Here a pickle may name only what the metadata of tensors is made of, and gets inert records for it; torch's own are then
made from those whose every field is as it should be. Metadata of anything but tensors is refused too: what it says is
no tensor, torch would unpickle. The one file that reads pickles.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict
from megatron.core.dist_checkpointing.strategies import torch as megatron
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from megarlhf.errors import CheckpointError

_PARTS = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    # Megatron keeps the plans by which the ranks wrote.
    "torch.distributed.checkpoint.planner": ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    # How an early Python 3.11, Debian 12's 3.11.2 for one, writes a member of an enumeration. Inert like the others.
    "builtins": ("getattr",),
    "__builtin__": ("getattr",),
    # torch notes where it wrote.
    "pathlib": ("PosixPath",),
    "pathlib._local": ("PosixPath",),
}
"""All that the metadata of tensors names, by module."""
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_PIECE_BYTES = 16
"""Fewer than a pickle spends on a piece, of which it has two sizes to tell."""
_AXES = 8
"""More than any tensor has."""


class _Record:
    """What stands for an object of a pickle: arguments and state, with which nothing is done."""

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> _Record:
        record = super().__new__(cls)
        record.args = args
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


_RECORDS = {(module, name): type(name, (_Record,), {}) for module, names in _PARTS.items() for name in names}


class _Unpickler(pickle._Unpickler):  # in Python: the one in C makes room for whatever size a pickle claims
    def find_class(self, module: str, name: str) -> Any:
        found = _RECORDS.get((module, name)) or (_DTYPES.get(name) if module == "torch" else None)
        if found is None:
            raise _RefusedError(
                f"names {f'{module}.{name}'!r}, which no metadata of tensors does and which may run code"
            )
        return found

    dispatch = {  # noqa: RUF012 (pickle's own table)
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code not in (pickle.BYTEARRAY8[0], pickle.NEXT_BUFFER[0], pickle.READONLY_BUFFER[0], pickle.PERSID[0])
    }


class _RefusedError(Exception):
    """Why metadata are not taken."""


class PlainReader(FileSystemReader):
    """Reads a checkpoint of tensors; nothing that it reads can run code.

    Raises:   CheckpointError from `read_metadata`.
    """

    def __init__(self, directory: Path, remedy: str) -> None:
        super().__init__(directory)
        self._file, self._remedy = directory / ".metadata", remedy
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What `.metadata` says, read once."""
        if self._metadata is None:
            try:
                content = self._file.read_bytes()
                self._metadata = _metadata(_Unpickler(io.BytesIO(content)).load(), len(content) // _PIECE_BYTES)
            except Exception as error:  # a damaged pickle surfaces as almost any type
                what = str(error) if isinstance(error, _RefusedError) else f"cannot be read ({type(error).__name__})"
                raise CheckpointError(f"{self._file} {what}; {self._remedy}.") from error
        return self._metadata


class PlainLoad(megatron.TorchDistLoadShardedStrategy):
    """Megatron's way to load a checkpoint in any layout, through a `PlainReader`."""

    def __init__(self, remedy: str) -> None:
        super().__init__()
        self._remedy = remedy

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: str | Path, *_how: Any) -> StateDict:
        """As Megatron's own, but for the reader."""
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        planner = megatron.MCoreLoadPlanner(
            shapes_validation_sharded_tensors=[tensor for tensor in tensors if not tensor.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={
                tensor.key: tensor for tensor in tensors if tensor.allow_shape_mismatch
            },
        )
        flat, keys, renamed = megatron._replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        target: Any = megatron.mcore_to_pyt_state_dict(flat, True)
        _load_state_dict(target, PlainReader(Path(checkpoint_dir), self._remedy), planner=planner)
        loaded: Any = {key: megatron._unwrap_pyt_sharded_tensor(value) for key, value in target.items()}
        restored = megatron._replace_sharded_keys_with_state_dict_keys(loaded, keys, renamed)
        megatron._restore_dict_types(restored, sharded_state_dict)
        return restored


def _metadata(root: Any, most: int) -> Metadata:
    """most: pieces of tensors that there can be. A pickle may name one object often, and so stand for endless ones."""
    fields = _fields(root, "Metadata")
    tensors, stored = fields.get("state_dict_metadata"), fields.get("storage_data")
    if not isinstance(tensors, dict) or not isinstance(stored, dict):
        raise _RefusedError("has no tables of tensors and of where they lie")
    if sum(_pieces(entry) for entry in tensors.values()) > most:
        raise _RefusedError(f"has more than {most} pieces of tensors, which is more than it has room for")
    return Metadata(
        state_dict_metadata={_text(name): _tensor(entry) for name, entry in tensors.items()},
        storage_data={_index(key): _place(entry) for key, entry in stored.items()},
        storage_meta=StorageMeta(),
    )


def _pieces(record: Any) -> int:
    chunks = record.state.get("chunks") if isinstance(record, _Record) and isinstance(record.state, dict) else ()
    return len(chunks) if isinstance(chunks, list) else 0


def _tensor(record: Any) -> TensorStorageMetadata:
    fields = _fields(record, "TensorStorageMetadata")
    (dtype, *_), size, chunks = (
        _state(fields["properties"], "TensorProperties", tuple),
        _size(fields["size"]),
        fields["chunks"],
    )
    if not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
        raise _RefusedError("has a tensor without a type or pieces")
    boxes = []
    for chunk in chunks:
        box = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _size(box["offsets"]), _size(box["sizes"])
        spans = zip(offsets, sizes, size, strict=False)
        if not len(offsets) == len(sizes) == len(size) or any(begin + length > end for begin, length, end in spans):
            raise _RefusedError(f"has a piece {list(sizes)} at {list(offsets)} of a tensor {list(size)}")
        boxes.append(ChunkStorageMetadata(offsets, sizes))
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, boxes)


def _index(record: Any) -> MetadataIndex:
    fields = _fields(record, "MetadataIndex")
    return MetadataIndex(_text(fields["fqn"]), _size(fields["offset"]))


def _place(record: Any) -> _StorageInfo:
    fields = _fields(record, "_StorageInfo")
    name = _text(fields["relative_path"])
    if Path(name).name != name or not name.endswith(".distcp"):
        raise _RefusedError(f"names {name!r}, which is no file of weights beside it")
    if fields.get("transform_descriptors"):
        raise _RefusedError("says that files are transformed, which is not supported")
    return _StorageInfo(name, _count(fields["offset"]), _count(fields["length"]))


def _fields(record: Any, kind: str) -> dict[str, Any]:
    return _state(record, kind, dict)


def _state(record: Any, kind: str, type_: type) -> Any:
    if type(record).__name__ != kind or not isinstance(record, _Record) or not isinstance(record.state, type_):
        found = type(record).__name__
        raise _RefusedError(f"has {found!r} where {kind} belongs")
    return record.state


def _size(record: Any) -> torch.Size:
    numbers = (
        record.args[0] if isinstance(record, _Record) and type(record).__name__ == "Size" and record.args else None
    )
    if not isinstance(numbers, tuple | list) or len(numbers) > _AXES:
        raise _RefusedError("has a tensor without a shape")
    return torch.Size([_count(number) for number in numbers])


def _count(number: Any) -> int:
    if not isinstance(number, int) or not 0 <= number < 1 << 62:
        raise _RefusedError("has a size that is no number of bytes or rows")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise _RefusedError("has a name that is no text")
    return value
