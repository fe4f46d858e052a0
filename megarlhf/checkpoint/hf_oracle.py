"""What transformers makes of a directory: `python hf_oracle.py DIR TOKENS OUT`, both safetensors files.

A program of its own, which imports nothing of ours: on a CPU Megatron-Core needs parts of torch replaced, after which
`from_pretrained` leaves the rotary frequencies of a model uninitialised.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def logits(directory: Path, tokens: Tensor) -> Tensor:
    """Tokens [B, T] -> [B, T, V] fp32, or [B, T, 1] of a model with a scalar head.

    Raises:   ValueError when transformers finds tensors missing, or some it has no use for.
    """
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    config = json.loads((directory / "config.json").read_text())
    scalar = config["architectures"] == [LlamaForSequenceClassification.__name__]
    kind: Any = LlamaForSequenceClassification if scalar else LlamaForCausalLM
    # Never `trust_remote_code`; these classes would not look for code either.
    model, loading = kind.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise ValueError(f"transformers reports {loading}")
    model.eval()
    with torch.no_grad():
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        return (model.score if scalar else model.lm_head)(hidden)


if __name__ == "__main__":
    found = logits(Path(sys.argv[1]), load_file(sys.argv[2])["tokens"])
    save_file({"logits": found.contiguous()}, sys.argv[3])
