"""Megatron's resharding checkpoints read and written piece by piece, in one process and without a process group.

`megatron.core.dist_checkpointing` stores its tensors through `torch.distributed.checkpoint`, whose reader and writer
are driven here directly: the writer asks for each piece when its turn comes, so no more than one is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import maybe_load_config, save_config
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megarlhf.checkpoint.adapters import adapter_sizes, beside, merged
from megarlhf.checkpoint.buckets import COMMON, FORMAT
from megarlhf.checkpoint.hf_files import CODES, check_finite
from megarlhf.checkpoint.hf_pieces import Piece, sizes_of
from megarlhf.checkpoint.plain_metadata import PlainReader
from megarlhf.errors import CheckpointError
from megarlhf.models.lora import LoraConfig
from megarlhf.models.spec import ModelSpec
from megarlhf.models.transformer import HeadKind

ITEM_OVERHEAD = 1 << 12
"""Bytes that storing one piece may take beyond its numbers: names, types, alignment. Seen: 1.6 kB."""
OPTIMIZER = "optimizer."
"""How Megatron's names of what is the optimiser's begin."""
AGAIN = "the directory is damaged, save the model again."


def write_pieces(
    directory: Path,
    groups: Sequence[Sequence[Piece]],
    dtypes: dict[str, torch.dtype],
    data: Callable[[Piece], Tensor],
) -> None:
    """Write a checkpoint whose tensors are `data(piece)`, one file a group.

    Raises:   whatever `data` raises; OSError where the disk fails.
    """
    pieces = {MetadataIndex(piece.key, torch.Size(piece.offset)): piece for group in groups for piece in group}
    writer, planner = FileSystemWriter(directory, per_thread_copy_ahead=0), _OnDemand(pieces, data)
    plans = [SavePlan([_write_item(piece, dtypes[piece.key]) for piece in group]) for group in groups]
    plans, metadata = create_default_global_save_plan(plans)
    try:
        results = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
        writer.finish(metadata, results)
        torch.save({"content_metadata": {}}, directory / COMMON)
    except RuntimeError as error:
        raise _cause(error) from None
    save_config(FORMAT, str(directory))


def saved_tensors(
    reader: PlainReader, spec: ModelSpec, head: HeadKind, lora: LoraConfig | None
) -> dict[str, TensorStorageMetadata]:
    """What a checkpoint's metadata say of its tensors, once they are those of the model.

    Raises:   CheckpointError naming the tensor that is missing, surplus or of another shape or type.
    """
    directory = Path(reader.path)
    try:
        found = maybe_load_config(str(directory))
    except (OSError, ValueError, TypeError, RecursionError):
        found = None
    if found != FORMAT:
        raise CheckpointError(f"{directory / 'metadata.json'}: expected {FORMAT}; {AGAIN}")
    everything: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    # A training state keeps the optimiser's beside the weights.
    tensors = {key: tensor for key, tensor in everything.items() if not key.startswith(OPTIMIZER)}
    sizes = sizes_of(spec, head) | adapter_sizes(spec, lora)
    missing, extra = sorted(sizes.keys() - tensors.keys()), sorted(tensors.keys() - sizes.keys())
    if missing or extra:
        what = f"{missing[0]} is missing" if missing else f"{extra[0]!r} is not of the model that model.json describes"
        raise CheckpointError(f"{directory}: {what}; {AGAIN}")
    for key, size in sizes.items():
        found, allowed = tuple(tensors[key].size), {size}
        if key in ("embedding.word_embeddings.weight", "output_layer.weight") and size[0] > 1:
            # Tensor ranks pad the vocabulary until it divides, and save a box each.
            ranks = max(len(tensors[key].chunks), 1)
            allowed.add((-(-size[0] // ranks) * ranks, *size[1:]))
        if found not in allowed:
            raise CheckpointError(f"{directory}: {key} is {list(found)}, model.json says {list(size)}; {AGAIN}")
        if tensors[key].properties.dtype not in CODES:
            raise CheckpointError(f"{directory}: {key} is of type {tensors[key].properties.dtype}; {AGAIN}")
    return tensors


class CheckpointReader:
    """A checkpoint that `save_model` or `write_pieces` wrote; everything but the numbers is checked when it is opened.

    Raises:   CheckpointError naming the tensor or file that is missing, surplus, truncated or of another shape or type.
    """

    def __init__(
        self,
        directory: Path,
        spec: ModelSpec,
        head: HeadKind,
        pieces: Sequence[Piece],
        lora: LoraConfig | None = None,
    ) -> None:
        self._directory = directory
        self._reader = PlainReader(directory, AGAIN.rstrip("."))
        self._tensors = saved_tensors(self._reader, spec, head, lora)
        self._reader.set_up_storage_reader(self._reader.read_metadata(), is_coordinator=True)
        self._check_files()
        self._scale = lora.scale if lora else 0.0
        self._beside = beside(spec, lora)
        every = [*pieces, *(piece for both in self._beside.values() for piece in both)]
        self._plans = {piece: self._plan(piece) for piece in every}

    def dtypes(self) -> dict[str, torch.dtype]:
        """The type of every tensor."""
        return {key: tensor.properties.dtype for key, tensor in self._tensors.items()}

    def read(self, piece: Piece) -> Tensor:
        """The numbers of a piece, whatever boxes they were saved in; of a weight with an adapter, merged with it."""
        box = self.stored(piece)
        found = self._beside.get((piece.key, piece.offset[0]))
        if found is None:
            return box
        return merged(box, piece, self.stored(found.a), self.stored(found.b), self._scale)

    def stored(self, piece: Piece) -> Tensor:
        """The numbers of a piece, or of an adapter's, as they are."""
        target = torch.empty(piece.shape, dtype=self._tensors[piece.key].properties.dtype)
        try:
            self._reader.read_data(LoadPlan(self._plans[piece]), _Into(target)).wait()
        except Exception as error:  # what torch makes of damaged bytes is any type
            where = f"{self._directory}: {piece.key} at {list(piece.offset)}"
            raise CheckpointError(f"{where} cannot be read ({_first_line(error)}); {AGAIN}") from error
        check_finite(target, f"{self._directory}: {piece.key} at {list(piece.offset)}")
        return target

    def _check_files(self) -> None:
        """Every stored box has its bytes, and every file is there for some box."""
        ends: dict[str, int] = {}
        for stored in self._reader.storage_data.values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
        for key, tensor in self._tensors.items():
            for chunk in tensor.chunks:
                stored = self._reader.storage_data.get(MetadataIndex(key, chunk.offsets))
                size = chunk.sizes.numel() * tensor.properties.dtype.itemsize
                if stored is None or not size <= stored.length <= size + ITEM_OVERHEAD:
                    where = f"{self._directory}: {key} at {list(chunk.offsets)}"
                    raise CheckpointError(f"{where} does not fit the bytes stored for it; {AGAIN}")
        for name, end in ends.items():
            path = self._directory / name
            if not path.is_file() or path.stat().st_size != end:
                found = f"has {path.stat().st_size} bytes" if path.is_file() else "is missing"
                raise CheckpointError(f"{path} {found}, {end} were saved; {AGAIN}")
        for path in sorted(self._directory.glob("*.distcp")):
            # Ranks with nothing of their own to save write empty files.
            if path.name not in ends and path.stat().st_size:
                raise CheckpointError(f"{path} is not part of the checkpoint; remove it or save the model again.")

    def _plan(self, piece: Piece) -> list[ReadItem]:
        """What to read for a piece; stored boxes must cover it, and no number of it twice."""
        wanted = ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape))
        items = create_read_items_for_chunk_list(piece.key, self._tensors[piece.key], [wanted])
        covered = sum(torch.Size(item.lengths).numel() for item in items)
        if covered != torch.Size(piece.shape).numel() or any(_overlap(a, b) for a, b in combinations(items, 2)):
            where = f"{self._directory}: {piece.key} at {list(piece.offset)}"
            raise CheckpointError(f"{where} was saved with gaps or overlaps; {AGAIN}")
        return items


class _OnDemand(DefaultSavePlanner):
    """Makes each piece when the writer gets to it."""

    def __init__(self, pieces: dict[MetadataIndex, Piece], data: Callable[[Piece], Tensor]) -> None:
        super().__init__()
        self._pieces, self._data = pieces, data

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._data(self._pieces[write_item.index])


class _Into(DefaultLoadPlanner):
    """Has what is read put into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        spans = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(begin, begin + length) for begin, length in spans)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


def _write_item(piece: Piece, dtype: torch.dtype) -> WriteItem:
    offset = torch.Size(piece.offset)
    box = ChunkStorageMetadata(offset, torch.Size(piece.shape))
    properties = TensorProperties.create_from_tensor(torch.empty(0, dtype=dtype))
    tensor = TensorWriteData(chunk=box, properties=properties, size=torch.Size(piece.size))
    return WriteItem(index=MetadataIndex(piece.key, offset), type=WriteItemType.SHARD, tensor_data=tensor)


def _overlap(a: ReadItem, b: ReadItem) -> bool:
    axes: Any = zip(a.dest_offsets, a.lengths, b.dest_offsets, b.lengths, strict=True)
    return all(x < y + height and y < x + width for x, width, y, height in axes)


def _cause(error: BaseException) -> BaseException:
    """What really happened: torch's zip writer, interrupted, complains about itself."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError | KeyboardInterrupt | CheckpointError):
        found = found.__context__
    return error if found is None else found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
