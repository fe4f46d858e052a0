"""Metadata of a checkpoint are data: a pickle that would run code is refused before it does, and says what it named."""

from __future__ import annotations

import io
import pickle
import re
import struct
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megarlhf.checkpoint.plain_metadata import PlainReader
from megarlhf.errors import CheckpointError
from tests.helpers.hostile import Hostile


def metadata() -> Metadata:
    """Of a 4 x 3 tensor in two pieces."""
    pieces = [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((2, 3))) for row in (0, 2)]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.bfloat16), torch.Size((4, 3)), pieces)
    places = {MetadataIndex("w", (2 * i, 0)): _StorageInfo("__0_0.distcp", 100 * i, 100) for i in range(2)}
    return Metadata({"w": tensor}, storage_data=places, storage_meta=StorageMeta(checkpoint_id=Path("/somewhere")))


def read(directory: Path, pickled: bytes) -> Metadata:
    (directory / ".metadata").write_bytes(pickled)
    return PlainReader(directory, "save the model again").read_metadata()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_metadata_are_what_torch_reads(tmp_path: Path, protocol: int) -> None:
    found, written = read(tmp_path, pickle.dumps(metadata(), protocol)), metadata()
    assert found.state_dict_metadata == written.state_dict_metadata
    assert found.storage_data == written.storage_data


class ByName(pickle.Pickler):
    """Writes members of enumerations as Python 3.11.2 does."""

    def reducer_override(self, thing: Any) -> Any:
        return (getattr, (type(thing), thing.name)) if isinstance(thing, Enum) else NotImplemented


def test_metadata_of_an_early_python_3_11_are_read(tmp_path: Path) -> None:
    with io.BytesIO() as file:
        ByName(file).dump(metadata())
        pickled = file.getvalue()
    assert b"getattr" in pickled
    assert read(tmp_path, pickled).state_dict_metadata == metadata().state_dict_metadata


def changed(change: Callable[[Any], Any]) -> bytes:
    whole = metadata()
    change(whole)
    return pickle.dumps(whole)


def stored(**fields: Any) -> bytes:
    place = _StorageInfo(**{"relative_path": "__0_0.distcp", "offset": 0, "length": 100, **fields})
    return changed(lambda m: m.storage_data.update({MetadataIndex("w", (0, 0)): place}))


def sized(*size: Any) -> bytes:
    """Other sizes of the tensor than torch.Size would let be made."""
    return pickle.dumps(metadata(), 2).replace(b"K\x04K\x03\x86", pickle.dumps(size, 2)[2:-1])


def repeated() -> bytes:
    """500 tensors of 500 pieces each, all of which are one: a few bytes a name, a second a million."""
    whole = metadata()
    tensor: Any = whole.state_dict_metadata["w"]
    tensor.chunks = tensor.chunks[:1] * 500
    whole.state_dict_metadata = {str(number): tensor for number in range(500)}
    return pickle.dumps(whole)


def test_a_piece_that_is_named_often_is_not_taken_often(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has more than \d+ pieces of tensors, .* than it has room"):
        read(tmp_path, repeated())


# Room for so many objects that the machine has not the memory for the table alone, and then nothing in them.
GREEDY = b"\x80\x04Nr" + struct.pack("<I", 1 << 31) + b"."
GREEDY_BYTES = b"\x80\x05\x96" + struct.pack("<Q", 1 << 45) + b"."
SETTER = b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}U\x01aK\x01s\x86b."
"""Writes an attribute into the class itself."""


@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (changed(lambda m: m.state_dict_metadata.update(w=BytesStorageMetadata())), "'BytesStorageMetadata' where"),
        (changed(lambda m: m.state_dict_metadata.update(w=5)), "'int' where TensorStorageMetadata belongs"),
        (changed(lambda m: m.state_dict_metadata.update({5: 5})), "a name that is no text"),
        (changed(lambda m: m.state_dict_metadata["w"].chunks.append(5)), "'int' where ChunkStorageMetadata belongs"),
        (changed(lambda m: setattr(m, "state_dict_metadata", [])), "has no tables"),
        (changed(lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", "x")), "without a type"),
        (changed(lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size((3, 3)))), "a piece [2, 3]"),
        (sized(4, -3), "a size that is no number"),
        (sized(4, "x"), "a size that is no number"),
        (sized(1 << 70, 3), "a size that is no number"),
        (stored(relative_path="../__0_0.distcp"), "names '../__0_0.distcp', which is no file of weights beside it"),
        (stored(relative_path="/etc/passwd"), "names '/etc/passwd'"),
        (stored(relative_path="\x1b[31m"), r"names '\x1b[31m'"),
        (stored(length=-1), "a size that is no number"),
        (stored(transform_descriptors=["zstd"]), "files are transformed"),
        (pickle.dumps(5), "'int' where Metadata belongs"),
        (pickle.dumps(metadata())[:-40], "cannot be read ("),
        (b"", "cannot be read (EOFError)"),
        (GREEDY, "'NoneType' where Metadata belongs"),
        (GREEDY_BYTES, "cannot be read (KeyError)"),
        (SETTER, "cannot be read (TypeError)"),
        (b"cos\nsystem\n(S'true'\ntR.", "names 'os.system', which no metadata of tensors does"),
        (b"\x80\x02ctorch\nload\n.", "names 'torch.load'"),
        (b"\x80\x04\x8c\x05torch\x8c\x0dnn.functional\x93.", "names 'torch.nn.functional'"),
    ],
)  # fmt: skip
def test_other_metadata_are_refused_and_named(tmp_path: Path, pickled: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=rf"\.metadata .*{re.escape(says)}.*; save the model again\.$"):
        read(tmp_path, pickled)
    assert "a" not in vars(Metadata)


def test_a_hostile_pickle_runs_nothing(tmp_path: Path) -> None:
    hostile = pickle.dumps(Hostile(tmp_path / "ran", pickle.dumps(metadata())))
    with pytest.raises(CheckpointError, match=r"\.metadata names 'builtins.eval', which .* may run code; "):
        read(tmp_path, hostile)
    assert not (tmp_path / "ran").exists()
    # As torch itself would have read it: the test's pickle does run.
    assert pickle.loads(hostile).state_dict_metadata == metadata().state_dict_metadata  # noqa: S301
    assert (tmp_path / "ran").exists()
