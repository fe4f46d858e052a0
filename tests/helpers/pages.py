"""Runs that never ran, as runs leave them, for tests of their pages."""

from __future__ import annotations

import math
from pathlib import Path

from megarlhf.observe.about import About, DataFacts, ModelFacts, Setting, write_about
from megarlhf.observe.writers import RunWriter

ABOUT = About(
    unit="iterations",
    steps=20,
    ranks=2,
    device="a CPU",
    models=(
        ModelFacts("actor", "runs/sft/model", "language", 217_728),
        ModelFacts("taste", "tiny-s", "scalar", 8_030_261_248),
    ),
    data=(DataFacts("prompts", "problems.jsonl", "train", 3000, 7, 2, 63_000, "chat", "question, answer", 1.7),),
    settings=(
        Setting("run_dir", "runs/grpo", "required", differs=True),
        Setting("seed", "1", "1", differs=False),
        Setting("actor.optim.lr", "0.0002", "3e-06", differs=True),
        Setting("kl_coef", "0.05", "0.05", differs=False),
    ),
)
CHAT = [
    {"role": "system", "content": "Answer with a number."},
    {"role": "user", "content": "What is 3 + 4?"},
]
WRITTEN_OUT = "<|start_header_id|>user<|end_header_id|>\n\nWhat is 5 + 6?<|eot_id|>"


def policy_run(run_dir: Path, *, iterations: int = 20, lr: float = 2e-4, about: About = ABOUT) -> None:
    """GRPO with two judges, which has never given two scores that were alike, on chats; not finished."""
    with RunWriter(run_dir) as writer:
        for step in range(1, iterations + 1):
            rise, wave = 1 - math.exp(-step / 8), math.sin(1.7 * step)
            writer.log(
                {
                    "rollout/score_mean": -0.6 + 2.3 * rise + 0.08 * wave,
                    "rollout/reward_mean": -0.6 + 2.2 * rise + 0.08 * wave,
                    "rollout/accuracy": 0.45 + 0.45 * rise + 0.01 * wave,
                    "rollout/response_length_mean": 24 + 9 * rise + 0.3 * wave,
                    "rollout/truncated_fraction": 0.0,
                    "group/equal_fraction": 0.0,
                    "judge/taste_mean": 2 * rise,
                    "judge/taste_weight": 0.5,
                    "judge/answer_mean": rise - 0.6,
                    "judge/answer_weight": 1.0,
                    "judge/answer_failures": 0.0,
                    "kl/reference_mean": 1.5 * rise**2,
                    "policy/loss": -0.02 + 0.004 * wave,
                    "policy/grad_norm": 0.8 + 0.1 * wave,
                    "policy/learning_rate": lr,
                    "memory/peak_bytes": 5.5e8 + 1e6 * step,
                    "time/iteration_s": 6.0,
                    "time/rollout_s": 2.0,
                    "time/optimise_s": 4.0,
                    "throughput/rollout_tokens_per_s": 3000.0 + step,
                },
                step=step,
            )
            if step % 5 == 0:
                writer.samples(map(_sample, range(4), [step] * 4), step)
    write_about(run_dir, about)


def _sample(index: int, step: int) -> dict[str, object]:
    prompt, answer = (CHAT, "7") if index < 2 else (WRITTEN_OUT, "11")
    verdict = {"score": 0.5 * index, "scores": {"taste": 1.0 * index, "answer": 0.0}, "correct": index == 0}
    return {"prompt": prompt, "response": f"said {index} at {step}", "answer": answer, **verdict}
