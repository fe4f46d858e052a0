"""tools/gpu_evidence.sh, as far as a machine without a GPU goes: a part that fails does not lose the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "gpu_evidence.sh"


def run(folder: Path, *parts: str, **variables: str) -> subprocess.CompletedProcess[str]:
    small = {"MODEL": "tiny-xs", "ROLLOUTS": "16", "TOKENS": "16", "PYTHON": sys.executable}
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [SCRIPT, folder / "out", *parts],
        env={**own, **small, **variables},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def test_a_part_that_fails_is_named_and_the_others_leave_their_numbers(tmp_path: Path) -> None:
    done = run(tmp_path, "decode_eager", "ppo_fp8", "graphs_or_not")
    assert done.returncode == 1, done.stdout + done.stderr
    parts = [json.loads(line) for line in (tmp_path / "out" / "parts.jsonl").read_text().splitlines()]
    assert [(part["part"], part["exit_code"]) for part in parts] == [("decode_eager", 0), ("ppo_fp8", 2)]
    assert done.stdout.splitlines()[-1].startswith("failed: ppo_fp8; logs are in ")
    assert "compute.fp8=hybrid needs Transformer Engine layers" in (tmp_path / "out" / "ppo_fp8.log").read_text()
    report = json.loads((tmp_path / "out" / "decode_eager.json").read_text())
    assert report["settings"]["offload"] == "none"
    assert report["settings"]["compute"]["cuda_graphs"] is False
    (rollout,) = [row for row in report["phases"] if row["phase"] == "rollout"]
    assert len(rollout["all_seconds"]) == 3
    assert rollout["tokens"] == [16 * 16] * 3


def test_all_parts_fit_into_half_an_hour_of_the_longest() -> None:
    """With the time limits that are not reached in practice the sum is less than 30 minutes."""
    text = SCRIPT.read_text(encoding="utf-8")
    calls = [line.split() for line in text.splitlines() if line.strip().startswith(("part ", "iterations "))]
    limits = [int(words[2]) for words in calls if words[2].isdecimal()]
    assert len(limits) >= 10
    assert sum(limits) <= 30 * 60


def test_without_a_folder_it_says_how_it_is_used() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: tools/gpu_evidence.sh OUT [PART ...]\n")
