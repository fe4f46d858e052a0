"""tools/bench_labels.py: both sides draw the same completions, and what is written can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from megarlhf.batch.rollouts import Rollout
from megarlhf.rollout.engine import RolloutEngine
from tests.helpers.ranks import run_ranks
from tools import bench_labels


def run(output: Path) -> list[tuple[int, int, str]]:
    """What was drawn, call by call: prompts, tokens, and the responses in any order."""
    drawn: list[tuple[int, int, str]] = []
    draw = RolloutEngine.generate

    def seen(self: RolloutEngine, *args: object, **options: object) -> Rollout:
        found = draw(self, *args, **options)  # pyright: ignore[reportArgumentType]
        order = sorted(zip(found.prompt_ids.tolist(), found.tokens.tolist(), strict=True))
        drawn.append((len(set(found.prompt_ids.tolist())), int(found.response_lengths.sum()), str(order)))
        return found

    words = ["bench_labels.py", "--solutions", "3", "--completions", "2", "--tokens", "3", "--repeats", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutEngine, "generate", seen)
        patch.setattr(sys, "argv", [*words, "--json", str(output)])
        torch.manual_seed(0)
        bench_labels.main()
    return drawn


def test_both_sides_draw_the_same(tmp_path: Path) -> None:
    drawn = run_ranks(run, 1, tmp_path / "labels.json")[0]
    assert len(drawn) == 8  # two cases, a warm-up and a round, two sides
    for together, apart in zip(drawn[::2], drawn[1::2], strict=True):
        assert together == apart
    found = json.loads((tmp_path / "labels.json").read_text())
    assert [case["case"] for case in found["cases"]] == [case.name for case in bench_labels.CASES]
    for case in found["cases"]:
        assert case["ratio"] == pytest.approx(case["all_seconds"]["apart"][0] / case["all_seconds"]["together"][0])
        assert case["prefix_tokens_mean"] > 20
