"""Megatron-Core without CUDA leaves the rest of torch as it was: what transformers builds is whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models.worlds import language_model

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import megarlhf.parallel  # first: torch must still learn which functions obey `with torch.device(...)`
import torch
from transformers import LlamaForCausalLM
with torch.device("meta"):
    assert all(x.is_meta for x in (torch.empty(1), torch.zeros(1), torch.arange(1), torch.tensor([1.0])))
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
print(model.model.rotary_emb.inv_freq.tolist())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where there is CUDA")
def test_models_of_transformers_are_built_on_the_meta_device_and_filled(tmp_path: Path) -> None:
    model = language_model(tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = model.model.rotary_emb.inv_freq.tolist()
    assert done.stdout.splitlines()[-1] == str(expected)
