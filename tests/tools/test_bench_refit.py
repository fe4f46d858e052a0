"""tools/bench_refit.py: every layout draws the same, with weights moved in each round, and what is written adds up."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tools import bench_refit


def run(output: Path) -> None:
    words = ["bench_refit.py", "--model", "tiny-xs", "--pipeline", "2", "--elsewhere", "1x2", "2x1", "--repeats", "3"]
    sizes = ["--prompts", "3", "--prompt-tokens", "5", "--group", "2", "--tokens", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words, *sizes, "--json", str(output)])
        bench_refit.main()


def test_rollouts_of_all_layouts_are_timed_in_turns(tmp_path: Path) -> None:
    run_ranks(run, 2, tmp_path / "refit.json")
    found = json.loads((tmp_path / "refit.json").read_text())
    home, *others = found["all_seconds"]
    assert (home, others) == (bench_refit.AT_HOME, ["tensor 1 x data 2", "tensor 2 x data 1"])
    for where in others:
        each = [a / b for a, b in zip(found["all_seconds"][where], found["all_seconds"][home], strict=True)]
        assert found["ratio_of_seconds"][where] == pytest.approx(statistics.median(each))
        busy = [a / b for a, b in zip(found["all_busy_seconds"][where], found["all_busy_seconds"][home], strict=True)]
        assert found["ratio_of_busy_seconds"][where] == pytest.approx(statistics.median(busy))
        assert 0 < found["refit_seconds"][where] < max(found["all_seconds"][where])
    # 3 prompts, 2 responses each, of 4 tokens.
    rate = 24 / statistics.median(found["all_seconds"][home])
    assert found["tokens_per_s"][home] == pytest.approx(rate)
