"""The reward that ships as an example gives what it says, as the judge that its own command makes of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megarlhf.config import load_config
from megarlhf.judges.function import FunctionConfig
from megarlhf.judges.texts import Response
from megarlhf.trainers.ppo import PPOConfig
from tests.judges.test_panel import prompt_set

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "examples" / "own_reward.py"


def own_judge() -> FunctionConfig:
    """As the command in the file has it."""
    (command,) = re.findall(r"megarlhf ppo (.*?)\n\n", FILE.read_text(encoding="utf-8"), re.DOTALL)
    cfg = load_config(PPOConfig, None, command.replace("\\\n", "").split())
    cfg.check_sizes()
    (judge,) = cfg.panel.values()
    assert isinstance(judge, FunctionConfig)
    return judge


def test_a_right_answer_and_a_part_for_brevity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    nobody: Any = None
    judge = own_judge()
    judge.check("judges.own", prompt_set()[0], "rows.jsonl")
    responses = {
        "5 + 3 = 8. The answer is 8.": (1, 0),
        "It is 1,008.": (0, 0),
        "None of them": (0, 0),
        "8" + "!" * 199: (1, 0),  # 200 characters are free,
        "8" + "!" * 299: (1, -0.1),  # 100 more cost half of 0.2,
        "8" + "!" * 399: (1, -0.2),
        "!" * 5000: (0, -0.2),  # and no number of them more than all of it.
    }
    given = [Response("How many?", text, "8", {"prompt": "How many?", "answer": "8"}, 1) for text in responses]
    for opinion, (right, brief) in zip(judge.scorer("judges.own", nobody)(given), responses.values(), strict=True):
        assert opinion.score == pytest.approx(right + brief)
        assert dict(opinion.parts) == pytest.approx({"right": right, "brief": brief})
        assert opinion.correct is None
