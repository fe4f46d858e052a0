"""tools/bench_packing.py: its three ways score and learn alike, and what is written can be read."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import run_ranks
from tools import bench_packing

SMALL = {"rows": 12, "shortest": 9, "longest": 24, "micro_batch": 3, "micro_batch_tokens": 48}


def ways() -> dict[str, torch.Tensor]:
    args = argparse.Namespace(model="tiny-xs", **SMALL)
    _, runs = bench_packing.sides(args, bench_packing.ragged(args))
    return {way: runs[f"score, {way}"]() for way in bench_packing.WAYS}


def test_every_way_does_the_same_work() -> None:
    packed, by_length, shuffled = run_ranks(ways, 1)[0].values()
    assert packed.abs().max() > 1
    for other in (by_length, shuffled):
        torch.testing.assert_close(packed, other, atol=2e-5, rtol=0)


def written(output: Path) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench_packing.py", "--model=tiny-xs", "--repeats=2", *words, f"--json={output}"])
        bench_packing.main()


def test_what_is_written(tmp_path: Path) -> None:
    run_ranks(written, 1, tmp_path / "packing.json")
    report = json.loads((tmp_path / "packing.json").read_text())
    assert report["settings"].items() >= SMALL.items()
    for name, seconds in report["seconds"].items():
        assert len(seconds) == len(report["clock_seconds"][name]) == 2
        assert report["medians_s"][name] == pytest.approx(sum(seconds) / 2)
    packed, by_length = (report["medians_s"][f"update, {way}"] for way in ("packed", "sorted"))
    assert report["ratios"]["update, packed / sorted"] == packed / by_length
