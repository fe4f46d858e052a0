"""Problems of reasoning-gym, real text, as demonstrations and as prompts: in bytes, and in Llama 3's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megarlhf.data.prompts import load_prompts
from megarlhf.data.reasoning_gym import ReasoningGymConfig, task_rows
from megarlhf.data.rows import DataConfig
from megarlhf.data.sft import load_sft
from megarlhf.data.tokenizer import Tokenizer
from tests.helpers.bytes_tokenizer import of_bytes
from tests.helpers.llama3 import llama3, needed, of_meta

pytest.importorskip("reasoning_gym", reason="needs reasoning-gym: pip install 'megarlhf[tasks]'")
TASKS = ("leg_counting", "chain_sum", "caesar_cipher")
ROWS = 20


def check(tokenizer: Tokenizer, tmp_path: Path) -> list[tuple[str, list[int]]]:
    """SFT on questions and answers as a file has them, RL on the task itself; returns the prompts of both."""
    found = []
    for task in TASKS:
        config = ReasoningGymConfig(rows=ROWS, instruction="")
        rows = task_rows(f"reasoning_gym:{task}", config, "train")
        source = tmp_path / f"{task}.json"
        source.write_text(json.dumps([{"question": row["question"], "answer": row["answer"]} for row in rows]))
        shown = load_sft(DataConfig(source=str(source), max_tokens=4096), tokenizer)
        asked = load_prompts(
            DataConfig(source=f"reasoning_gym:{task}", max_tokens=4096, reasoning_gym=config), tokenizer
        )
        assert len(shown) == len(asked) == ROWS
        assert shown.origin.shape == "question, answer"
        for row, demonstration, prompt, answer in zip(rows, shown.rows, asked.tokens, asked.answers, strict=True):
            ((start, end),) = demonstration.spans
            assert demonstration.ids[:start] == prompt
            assert tokenizer.decode(demonstration.ids[start:end]) == row["answer"] == answer
            assert demonstration.ids[end - 1] == tokenizer.eos_id
            found.append((row["question"], list(prompt)))
    return found


def test_problems_are_demonstrations_and_prompts(tmp_path: Path) -> None:
    check(of_bytes(), tmp_path)


@needed
def test_they_are_in_llama_3_s_tokens_what_meta_s_code_makes_of_them(tmp_path: Path) -> None:
    for question, prompt in check(llama3(), tmp_path):
        assert prompt == of_meta([{"role": "user", "content": question.strip()}])
