"""Hugging Face directory -> Megatron model directory and back, one tensor at a time.

A conversion checks everything it can before it writes, writes under a temporary name beside the target, and renames
at the end: what has the target's name is whole. Besides the weights a model directory keeps, in `huggingface/`, the
files that training does not need and the way back does.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.checkpoint.checksums import check_checksums, check_hugging_face, write_checksums
from megarlhf.checkpoint.dist_files import ITEM_OVERHEAD, CheckpointReader, write_pieces
from megarlhf.checkpoint.hf_config import hf_config
from megarlhf.checkpoint.hf_extras import CONFIG, EXTRAS, GENERATION
from megarlhf.checkpoint.hf_files import SafetensorsDirectory, SafetensorsWriter
from megarlhf.checkpoint.hf_names import shape_of, tensor_names
from megarlhf.checkpoint.hf_pieces import Ledger, Piece, pieces_of
from megarlhf.checkpoint.model_directory import MODEL, TOKENIZER, WEIGHTS, describe_model, say_left_out
from megarlhf.checkpoint.nearby import check_place, model_of
from megarlhf.checkpoint.peft_files import MergedDirectory, base_of, is_peft
from megarlhf.errors import FAILED, CheckpointError
from megarlhf.models.spec import ModelSpec
from megarlhf.models.transformer import HeadKind
from megarlhf.observe.memory import PeakMemory
from megarlhf.observe.progress import Progress

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)

CUTS = 8
"""Pieces of each matrix in a checkpoint: up to 8 tensor ranks then read no more than their own part of it."""
READ_CUTS = 4
"""Pieces in which a vocabulary matrix is read back. One stored by a single rank is read whole for each of them: more
would take longer, and fewer more memory."""
MEMORY_FACTOR = 1.5
"""Peak memory, in multiples of the largest group of one layer (gate and up) and one vocabulary matrix."""
SPARE_BYTES = 16 << 20
"""What a conversion leaves free on the disk: tokenizer, headers, the file system's own needs."""

Verify = Callable[[Path, Path], None]
"""Compares (Hugging Face directory, model directory); raises when they differ."""


class ConversionError(CheckpointError):
    """The input was good, but the result could not be written, or is not equal to it."""

    exit_code = FAILED


@dataclass(frozen=True)
class Options:
    """What both directions let the user choose."""

    dtype: torch.dtype | None = None
    """Type of the written weights; None keeps the source's."""
    max_shard_bytes: int = 5_000_000_000
    """Largest safetensors file, if no single tensor is larger."""
    verify: Verify | None = None
    """Runs on both directories before the new one gets its name."""
    base: str = ""
    """Model that adapters in PEFT's form belong to; empty for the one that they name."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class Conversion:
    """What was done."""

    tensors: int
    """Hugging Face tensors read or written."""
    bytes_written: int
    """Of weights."""
    seconds: float
    """Of moving weights; without verification."""
    peak_bytes: int
    """Largest resident memory above that at the start, verification not counted."""
    bound_bytes: int
    """What it should stay below, libraries aside that are loaded on first use."""


def to_megatron(source: Path, target: Path, options: Options | None = None) -> Conversion:
    """Convert the Hugging Face directory `source` into a model directory that loads in any layout.

    One of adapters in PEFT's form is added to its base, in fp32, and rounded once.

    Raises:   CheckpointError when the source is not whole or not a Llama 3, or the target exists; ConversionError when
              writing or verifying fails. Whatever is raised, KeyboardInterrupt too, nothing of the target stays.
    """
    options = options or Options()
    if (source / MODEL).is_file():
        raise CheckpointError(f"{source} is a megarlhf model directory already; to=hf converts those.")
    adapters, source = (source, base_of(source, options.base)) if is_peft(source) else (None, source)
    if adapters is None and options.base:
        raise CheckpointError(f"base={options.base} and {source} has no adapters in PEFT's form; leave base out.")
    if adapters is not None and options.verify:
        raise CheckpointError(
            f"{adapters} has adapters alone, and logits are compared of whole models; leave verify out, and then "
            "convert what was written with to=hf verify=true."
        )
    check_place(str(source), CONFIG)
    # A relative name could be a preset's; a path that begins with / is not.
    found = describe_model(str(source.absolute()))
    check_hugging_face(source)
    files = SafetensorsDirectory(source, found.spec, found.head)
    say_left_out(str(source), files.left_out)
    whole = files if adapters is None else MergedDirectory(adapters, files, found.spec)
    groups = pieces_of(found.spec, found.head, layer_cuts=CUTS, vocabulary_cuts=CUTS)
    run = _Run(found.spec, found.head, groups, files.dtypes(), options, str(source))

    def data(piece: Piece) -> Tensor:
        tensors = [whole.read(part) for part in piece.parts]
        box = run.rounded(piece.join(tensors), piece)
        run.moved(piece)
        return box

    with _staged(target, run.bytes + ITEM_OVERHEAD * len(run.pieces)) as partial:
        with run:
            keys = {piece.key: run.dtypes[piece.parts[0].name] for piece in run.pieces}
            (partial / WEIGHTS).mkdir()
            write_pieces(partial / WEIGHTS, groups, keys, data)
            write_checksums(partial / WEIGHTS)
        (partial / MODEL).write_text(json.dumps(found.model_dump(mode="json"), indent=2) + "\n")
        own = adapters is not None and (adapters / TOKENIZER_FILES[0]).is_file()
        _copy(adapters if adapters and own else source, partial / TOKENIZER, TOKENIZER_FILES)
        _copy(source, partial / EXTRAS, (CONFIG, GENERATION))
        write_checksums(partial)
        _verify(options, source, partial)
    return run.result()


def to_hf(source: Path, target: Path, options: Options | None = None) -> Conversion:
    """Convert the model directory `source`, saved in any layout, into one that transformers' `from_pretrained` loads.

    A run, or a saved state of one, is taken for its model. Adapters become part of the weights.

    Raises:   as `to_megatron`.
    """
    options, source = options or Options(), Path(model_of(str(source)))
    check_place(str(source), MODEL)
    if not (source / MODEL).is_file():
        raise CheckpointError(f"{source}: {MODEL} is missing; name a directory that training or to=megatron wrote.")
    described = describe_model(str(source.absolute()))
    spec, head = described.spec, described.head
    groups = pieces_of(spec, head, layer_cuts=1, vocabulary_cuts=READ_CUTS)
    check_checksums(source / WEIGHTS, "save the model again")
    pieces = [piece for group in groups for piece in group]
    reader = CheckpointReader(source / WEIGHTS, spec, head, pieces, described.lora)
    stored = reader.dtypes()
    run = _Run(
        spec,
        head,
        groups,
        {part.name: stored[piece.key] for group in groups for piece in group for part in piece.parts},
        options,
        str(source),
    )
    config = hf_config(described, run.config_dtype, source / EXTRAS / CONFIG, source / TOKENIZER)
    with _staged(target, run.bytes) as partial:
        with run:
            shapes = {name: shape_of(name, spec) for name in tensor_names(spec, head)}
            with SafetensorsWriter(partial, shapes, run.dtypes, options.max_shard_bytes) as writer:
                _write_parts(run, reader, writer)
            write_checksums(partial)  # of the weights alone: the rest is text that a user may edit
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        _copy(source / TOKENIZER, partial, TOKENIZER_FILES)
        _copy(source / EXTRAS, partial, (GENERATION,))
        _verify(options, partial, source)
    return run.result()


def _verify(options: Options, hugging_face: Path, model: Path) -> None:
    """Raises ConversionError whatever is wrong: what was given has been read, and was good."""
    if options.verify is None:
        return
    try:
        options.verify(hugging_face, model)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error


def _write_parts(run: _Run, reader: CheckpointReader, writer: SafetensorsWriter) -> None:
    for piece in run.pieces:
        for part, tensor in zip(piece.parts, piece.split(run.rounded(reader.read(piece), piece)), strict=True):
            writer.write(part.name, part.rows[0], tensor)
        run.moved(piece)


class _Run:
    """The books of one conversion: both ledgers, the clock, the memory, the progress bar."""

    def __init__(
        self,
        spec: ModelSpec,
        head: HeadKind,
        groups: list[list[Piece]],
        dtypes: dict[str, torch.dtype],
        options: Options,
        source: str,
    ) -> None:
        if options.dtype is None and len(set(dtypes.values())) > 1:
            usual = max(set(dtypes.values()), key=list(dtypes.values()).count)
            name, odd = next((name, dtype) for name, dtype in dtypes.items() if dtype != usual)
            raise CheckpointError(
                f"{source}: {name} is of type {_short(odd)}, others are {_short(usual)}; if that is meant, choose one "
                "type for all, with dtype=bfloat16 for example."
            )
        self.pieces = [piece for group in groups for piece in group]
        self.dtypes = dict.fromkeys(dtypes, options.dtype) if options.dtype else dtypes
        names = tensor_names(spec, head)
        numbers = {name: torch.Size(shape_of(name, spec)).numel() for name in names}
        self.bytes = sum(count * self.dtypes[name].itemsize for name, count in numbers.items())
        self._hugging_face = Ledger("Hugging Face tensors", numbers)
        self._megatron = Ledger("Megatron tensors", {p.key: torch.Size(p.size).numel() for p in self.pieces})
        width = max(dtype.itemsize for dtype in (*dtypes.values(), *self.dtypes.values()))
        largest = 2 * spec.ffn_size * spec.hidden_size + spec.vocab_size * spec.hidden_size
        self._bound = round(MEMORY_FACTOR * largest * width)
        self._memory = PeakMemory()
        self._bar = Progress(self.bytes // 1_000_000, "MB", enabled=options.progress)
        self._done, self._shown, self._seconds, self._peak = 0, 0, 0.0, 0

    @property
    def config_dtype(self) -> str:
        """The type as config.json names it."""
        return _short(next(iter(self.dtypes.values())))

    def __enter__(self) -> None:
        self._memory.start()
        self._start = time.monotonic()
        self._bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)
        self._seconds = time.monotonic() - self._start
        self._peak = self._memory.peak()
        if error[0] is None:
            self._hugging_face.close()
            self._megatron.close()

    def rounded(self, box: Tensor, piece: Piece) -> Tensor:
        """`box` of a piece in the type that is written, if it can hold the numbers."""
        name = piece.parts[0].name
        rounded = box.to(self.dtypes[name])
        if not bool(rounded.isfinite().all()):
            raise CheckpointError(
                f"{name}: its largest number, {float(box.abs().max()):.3g}, is too large for "
                f"{_short(self.dtypes[name])}; choose another type, with dtype=bfloat16 for example."
            )
        return rounded

    def moved(self, piece: Piece) -> None:
        """Book a piece that has been read and is being written."""
        self._megatron.add(piece.key, torch.Size(piece.shape).numel())
        for part in piece.parts:
            count = torch.Size(part.shape).numel()
            self._hugging_face.add(part.name, count)
            self._done += count * self.dtypes[part.name].itemsize
        megabytes = self._done // 1_000_000
        seconds = max(time.monotonic() - self._start, 1e-3)
        self._bar.advance(megabytes - self._shown, note=f"{self._done / 1e6 / seconds:.0f} MB/s")
        self._shown = megabytes

    def result(self) -> Conversion:
        """What to print."""
        return Conversion(len(self.dtypes), self.bytes, self._seconds, self._peak, self._bound)


@contextmanager
def _staged(target: Path, needed: int) -> Iterator[Path]:
    """A directory beside `target` that gets its name once the block has ended well and the disk has it all.

    needed: bytes that must be free.
    """
    partial = target.with_name(target.name + ".partial")
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists; choose another, or remove it.")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} is not a directory; create it first.")
    free = shutil.disk_usage(target.parent).free
    if free < needed + SPARE_BYTES:
        raise ConversionError(
            f"{target.parent}: {(needed + SPARE_BYTES) / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; "
            "free some, or write to another disk."
        )
    try:
        partial.mkdir()
    except FileExistsError:
        raise CheckpointError(
            f"{partial} exists: another conversion is writing it, or was killed; in that case remove it."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{partial} cannot be created ({error.strerror}); name another place.") from None
    try:
        yield partial
        _sync(partial)
        partial.rename(target)
        _sync(target.parent, deep=False)
    except OSError as error:
        raise ConversionError(
            f"{partial} could not be written ({error.strerror}: {error.filename or target}), and was removed; "
            "free some space, or write to another disk."
        ) from error
    finally:
        # After the rename there is nothing left to remove.
        shutil.rmtree(partial, ignore_errors=True)


def _sync(directory: Path, *, deep: bool = True) -> None:
    """Have the disk hold a directory, by default with all that is below it."""
    for path in [*(directory.rglob("*") if deep else []), directory]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            target.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
