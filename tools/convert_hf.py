"""Convert Llama 3 models between Hugging Face directories and megarlhf's, which load in any parallel layout.

    python tools/convert_hf.py to-megatron Llama-3.1-8B checkpoints/llama
    python tools/convert_hf.py to-hf runs/ppo/model Llama-3.1-8B-ppo

Language models and reward models (LlamaForSequenceClassification), sharded or not, embeddings tied or not. Tensors are
moved one at a time: memory stays near the largest one. The target appears once it is whole.

Exit codes: 0 done; 2 the input must be changed; 1 writing or verifying failed; 130 interrupted; 143 terminated.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megarlhf.errors import ConfigError, MegarlhfError, complain, printable

if TYPE_CHECKING:
    import torch

    from megarlhf.checkpoint.hf_convert import Conversion

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class StoppedError(KeyboardInterrupt):
    """A signal came that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert, print what was done, and return the exit code."""
    options = _parser().parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    # Megatron-Core says so while it is imported; a conversion needs neither.
    warnings.filterwarnings("ignore", message="(Transformer Engine|Apex).* not installed", category=UserWarning)
    try:
        return _convert(options)
    except MegarlhfError as error:
        complain(str(error))
        return error.exit_code
    except StoppedError as stopped:
        complain(f"{stopped}; nothing was written.")
        return 128 + stopped.number


def _convert(given: argparse.Namespace) -> int:
    import torch

    from megarlhf.checkpoint.hf_convert import Options, to_hf, to_megatron

    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    dtype = types.get(given.dtype)
    options = Options(
        dtype=dtype,
        max_shard_bytes=_bytes(given.max_shard_size),
        verify=partial(_verify, dtype=dtype) if given.verify else None,
        progress=not given.quiet,
    )
    source, target = given.source, given.out
    done = to_megatron(source, target, options) if given.direction == "to-megatron" else to_hf(source, target, options)
    _report(target, done)
    return 0


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
    from megarlhf.checkpoint.hf_convert import ConversionError
    from megarlhf.checkpoint.hf_verify import compare_logits

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
        raise ConfigError(f"--max-shard-size {text}: not a size; write it like 5GB or 500MB.")
    return size


def _stop(number: int, _frame: FrameType | None) -> None:
    raise StoppedError(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    directions = parser.add_subparsers(dest="direction", required=True)
    for name, source, text in (
        ("to-megatron", "HF_DIR", "from Hugging Face to a directory that loads in any parallel layout"),
        ("to-hf", "CHECKPOINT", "from a directory that training or to-megatron wrote to Hugging Face"),
    ):
        direction = directions.add_parser(name, help=text, description=text)
        direction.add_argument("source", metavar=source, type=Path)
        direction.add_argument("out", metavar="OUT", type=Path, help="directory to create; must not exist")
        direction.add_argument(
            "--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights; the source's by default"
        )
        direction.add_argument(
            "--verify",
            action="store_true",
            help="load both and compare logits in fp32; holds the whole model in memory",
        )
        direction.add_argument("--quiet", action="store_true", help="no progress bar")
        direction.add_argument("--max-shard-size", default="5GB", help="of safetensors files (to-hf); 5GB by default")
    return parser


if __name__ == "__main__":
    sys.exit(main())
