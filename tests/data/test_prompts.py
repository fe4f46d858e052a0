"""Prompts keep what the data said, so that a reader sees no chat headers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from megarlhf.batch.rollouts import Rollout
from megarlhf.data.arithmetic import words
from megarlhf.data.prompts import PromptSet, load_prompts
from megarlhf.data.rows import DataConfig, pad_right
from megarlhf.data.tokenizer import Tokenizer, build_tiny_tokenizer
from megarlhf.judges.judge import Verdict, outcome
from megarlhf.judges.panel import Judgement
from megarlhf.trainers.policy_metrics import sample_rows

TALK = [{"role": "user", "content": "Tom has 5 apples."}, {"role": "assistant", "content": "5"}]
PROMPTS = ["Tom has 5 apples.", "Tom has 5 apples. " * 40, TALK, "Eva has 7 shells."]


def loaded(tmp_path: Path) -> tuple[PromptSet, Tokenizer]:
    """Rendered with the chat template; the second is over the limit and dropped."""
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt, "answer": "5"}) + "\n" for prompt in PROMPTS))
    tokenizer = build_tiny_tokenizer(words())
    config = DataConfig(source=str(source), template="chat", max_tokens=64, overlong="drop")
    return load_prompts(config, tokenizer), tokenizer


def test_said_is_by_row_of_what_was_kept_and_by_id_of_what_was_rolled_out(tmp_path: Path) -> None:
    prompts, tokenizer = loaded(tmp_path)
    kept = [PROMPTS[0], TALK, PROMPTS[3]]
    assert [columns["prompt"] for columns in prompts.columns] == kept
    assert tokenizer.decode(prompts.tokens[0]) != PROMPTS[0], "the header's words are among the tokens"
    batch = prompts.batch(torch.tensor([2, 0, 1, 2]))
    assert [columns["prompt"] for columns in prompts.columns_in(batch.ids)] == [kept[2], kept[0], kept[1], kept[2]]


def test_samples_of_a_run_show_the_prompt_of_the_data(tmp_path: Path) -> None:
    prompts, tokenizer = loaded(tmp_path)
    batch = prompts.batch(torch.tensor([1, 0]))
    response = tokenizer.encode_response("The answer is 5.")
    tokens, lengths = pad_right([[*prompts.tokens[1], *response], [*prompts.tokens[0], *response]], tokenizer.pad_id)
    quiet, ended = torch.zeros(2, tokens.shape[1] - 1), torch.tensor([True, True])
    rollout = Rollout(tokens, batch.lengths, lengths, ended, quiet, batch.ids, batch.answers)
    scores = outcome(torch.tensor([1.5, -1.0]), rollout)
    steps = [[1.0, 0.5], [-1.0]]
    verdicts = {"own": Verdict(scores), "prm": Verdict(scores, steps=steps)}
    judgement = Judgement(scores, verdicts, correct=(True, True), metrics={})
    rows = sample_rows(rollout, judgement, 8, tokenizer, prompts)
    assert [row["prompt"] for row in rows] == [TALK, PROMPTS[0]]
    assert [(row["response"], row["score"], row["correct"]) for row in rows] == [
        ("The answer is 5.", 1.5, True),
        ("The answer is 5.", -1.0, True),
    ]
    assert [row["steps"] for row in rows] == [{"prm": of} for of in steps]
    alone = sample_rows(rollout, Judgement(scores, {"own": Verdict(scores)}, (True, True), {}), 8, tokenizer, prompts)
    assert not any("steps" in row or "scores" in row for row in alone)
