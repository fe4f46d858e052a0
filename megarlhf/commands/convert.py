"""`megarlhf convert`: Llama 3 models between Hugging Face directories and megarlhf's, which load in any layout.

Language models and reward models (LlamaForSequenceClassification), sharded or not, embeddings tied or not. Tensors are
moved one at a time: memory stays near the largest one. The output appears once it is whole.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from megarlhf.checkpoint.hf_convert import Conversion, ConversionError, Options, to_hf, to_megatron
from megarlhf.config import Config
from megarlhf.errors import DONE, ConfigError, complain, printable

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ConvertConfig(Config):
    """`megarlhf convert`: a model from Hugging Face, or to it."""

    model: str
    """Directory to convert: Hugging Face's, or one of adapters in PEFT's form, with to=megatron; with to=hf one that
    training or this command wrote, or a run, or one of its saved states, for the model in it."""
    output: Path
    """Directory to write, which appears once it is whole; one that exists is refused."""
    to: Literal["hf", "megatron"]
    """`hf`: loads with transformers' `from_pretrained`; `megatron`: loads here, in any parallel layout."""
    base: str = ""
    """Hugging Face directory of the model that the adapters of a PEFT directory are added to; empty for the one that
    they name (base_model_name_or_path)."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights that are written; null keeps theirs."""
    verify: bool = False
    """Load both and compare their logits, in fp32: the whole model is in memory then. What differs is not kept."""
    max_shard_size: str = "5GB"
    """Largest safetensors file, with its unit, of to=hf."""


class StoppedError(KeyboardInterrupt):
    """A signal came that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def main(cfg: ConvertConfig, _: Sequence[str]) -> int:
    """`megarlhf convert`: 0 once the output is there; 130 and 143 where SIGINT or SIGTERM left none."""
    options = Options(
        dtype=TYPES[cfg.dtype] if cfg.dtype else None,
        max_shard_bytes=_bytes(cfg.max_shard_size),
        base=cfg.base,
        verify=partial(_verify, dtype=TYPES[cfg.dtype] if cfg.dtype else None) if cfg.verify else None,
    )
    convert = to_hf if cfg.to == "hf" else to_megatron
    try:
        with _heeding_signals():
            done = convert(Path(cfg.model), cfg.output, options)
    except StoppedError as stopped:
        complain(f"{stopped}; nothing was written.")
        return 128 + stopped.number
    _report(cfg.output, done)
    return DONE


@contextmanager
def _heeding_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise StoppedError, so that what is half written is removed."""
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _frame: FrameType | None) -> None:
    raise StoppedError(number)


def _report(target: Path, done: Conversion) -> None:
    rate = done.bytes_written / 1e6 / max(done.seconds, 1e-3)
    _say(f"{target}: {done.tensors} tensors, {done.bytes_written / 1e9:.3f} GB, {done.seconds:.1f} s ({rate:.0f} MB/s)")
    _say(
        f"peak memory: {done.peak_bytes / 1e6:.0f} MB above the start; 1.5 x (largest group of a layer + embedding) is "
        f"{done.bound_bytes / 1e6:.0f} MB"
    )


def _say(text: str) -> None:
    sys.stdout.write(printable(f"{text}\n"))


def _verify(hugging_face: Path, model: Path, dtype: torch.dtype | None) -> None:
    from megarlhf.checkpoint.hf_verify import compare_logits  # which loads transformers' models

    gap = compare_logits(hugging_face, model, dtype)
    note = f", the weights of both rounded to {str(dtype).removeprefix('torch.')}" if dtype else ""
    _say(f"verify: largest gap between transformers' logits and ours {gap.largest:.2e}, bound {gap.bound:.2e}{note}")
    if not gap.holds:
        raise ConversionError(
            f"logits differ by {gap.largest:.2e}, more than {gap.bound:.2e}, and nothing was kept; convert again, and "
            "report the model if it stays so."
        )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise ConfigError(f"max_shard_size={text}: not a size; write it like 5GB or 500MB.")
    return size
