r"""A reward of your own: the answer, and a part for saying it briefly. Copy it, change it, and name it as a judge:

    megarlhf ppo run_dir=runs/own actor.init=tiny-s critic.init=tiny-s prompts.template=plain tokenizer=arithmetic \
        rollout_batch=64 global_batch=64 micro_batch=32 sampling.max_new_tokens=32 iterations=5 \
        judges.own.kind=function judges.own.function=examples/own_reward.py:right_and_brief

runs at once, from a policy that is drawn at random; actor.init=runs/tiny/sft/model has one that can learn.

It is called for every response. What it returns by name is added to the score and logged as judge/own.right_mean and
judge/own.brief_mean. docs/judges.md says more.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

FREE = 200
"""Characters that cost nothing."""
MOST = 0.2
"""Taken off a response of twice as many or more: less than the answer is worth, or saying nothing would pay."""


def right_and_brief(
    prompt: Any,  # noqa: ARG001 (every function is handed all four)
    response: str,
    answer: str,
    columns: Mapping[str, Any],  # noqa: ARG001
) -> dict[str, float]:
    """1 where the last number of the response is the answer; less up to 0.2 for what is longer than 200 characters.

    prompt: text, or a conversation, as the data has it. columns: the prompt's whole row, for example columns["level"].
    """
    numbers = re.findall(r"-?\d+(?:\.\d+)?", response.replace(",", ""))
    right = bool(numbers) and numbers[-1] == answer
    over = min(max(len(response) - FREE, 0) / FREE, 1.0)
    return {"right": float(right), "brief": -MOST * over}
