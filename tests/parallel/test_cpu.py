"""Megatron-Core without CUDA leaves the rest of torch as it was: what transformers builds is whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from megarlhf.parallel.cpu import has_flash_attention
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf_kernels import paged_attention
from tests.helpers.models import language_model
from tests.helpers.ranks import run_ranks

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's own packages would be asked")
@pytest.mark.parametrize(
    ("prefill", "version", "third", "expected"),
    [
        ("theirs", "2.8.3", False, True),
        ("theirs", "2.7.2", False, False),  # Megatron-Core asserts 2.7.3 in the middle of a rollout
        (None, None, False, False),  # flash-attn 4 alone, or a build for another torch
        (None, None, True, True),
        ("ours", "2.8.3", False, False),  # what `install` put there is not found again as theirs
    ],
)
def test_flash_attention_is_known_by_its_functions(
    prefill: str | None,
    version: str | None,
    third: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    import megatron.core.transformer.attention as attention

    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)  # found by name in every case
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(attention, "HAVE_FA3", third)
    functions = {"theirs": lambda: None, "ours": paged_attention.paged_prefill}
    monkeypatch.setattr(attention, "flash_attn_varlen_func", functions[prefill] if prefill else None)
    monkeypatch.setattr(attention, "is_fa_min_version", lambda least: Version(version or "0") >= Version(least))
    assert has_flash_attention() is expected


def listeners(layout: ParallelLayout) -> list[str]:
    """Names of the threads that wait for what peers send, after one sum in each of a mesh's groups."""
    mesh = start(layout, seed=1)
    for group in (mesh.groups.tp, mesh.groups.pp, mesh.groups.dp):
        torch.distributed.all_reduce(torch.ones(1), group=group)
    names = [task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if name == "gloo_tcp_loop"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing is replaced where there is CUDA")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads have names where there is /proc")
def test_a_rank_s_groups_share_one_listener() -> None:
    first, second = (run_ranks(listeners, 2, ParallelLayout(tensor=2)) for _ in range(2))
    assert first == second  # the second mesh's are the first's
    # A rank that was a world of its own before listens on loopback besides.
    assert all(1 <= len(found) <= 2 for found in first)
