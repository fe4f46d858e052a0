"""A directory of adapters as PEFT writes it, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megarlhf.checkpoint.adapters import PEFT_CONFIG, PEFT_WEIGHTS

RANK, ALPHA = 2, 6.0
TARGETS = ["q_proj", "v_proj", "gate_proj", "o_proj", "down_proj"]


def weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def adapters(folder: Path, base: Path, **changes: Any) -> dict[str, Tensor]:
    """Random ones in `folder`, each module's A its own, as PEFT writes them; and what they are."""
    folder.mkdir()
    tensors, draw = {}, torch.Generator().manual_seed(5)
    for name, weight in weights(base).items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if module.rpartition(".")[2] in TARGETS:
            tensors[f"{module}.lora_A.weight"] = torch.randn(RANK, weight.shape[1], generator=draw)
            tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], RANK, generator=draw)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "target_modules": TARGETS,
        "bias": "none",
        "use_dora": False,
        "rank_pattern": {},
        "init_lora_weights": True,
        "modules_to_save": None,
        "peft_version": "0.21.2",
        **changes,
    }
    save_file(tensors, folder / PEFT_WEIGHTS)
    (folder / PEFT_CONFIG).write_text(json.dumps(config))
    return tensors
