"""Answers to problems of reasoning-gym, scored by the verifier of their task."""

from __future__ import annotations

import copy
import json
import re
import signal
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from megarlhf.data.prompts import PromptSet
from megarlhf.data.reasoning_gym import PREFIX, is_task, task
from megarlhf.errors import ConfigError
from megarlhf.judges.verifiers import final_answer

SECONDS = 2.0
"""For one answer; then it scores 0."""
_LOOKED_AT = 512
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def gym_score(response: str, columns: Mapping[str, Any]) -> float | None:
    """What the task's verifier gives the answer of a response, 0 to 1; None where it fails or takes too long.

    Ranks:    main thread only: overlong work is stopped by SIGALRM.
    """
    verifier = _verifier(columns["task"], json.dumps(columns["parameters"]))
    # A copy, because some verifiers write into what they are given.
    entry = copy.deepcopy({name: columns[name] for name in ("question", "answer", "metadata")})
    try:
        with _alarm(SECONDS) as rang:
            score = float(verifier(given_answer(response), entry))
    except (Exception, _OverlongError):  # noqa: BLE001 (odd answers make verifiers raise of every kind)
        return None
    return score if not rang and 0 <= score <= 1 else None


def given_answer(response: str) -> str:
    """What the last <answer>...</answer> holds, else the final answer as other rules find it, else all of it."""
    tagged = _TAGGED.findall(response)
    found = tagged[-1] if tagged else final_answer(response)
    return (response if found is None else found).strip()


def check_gym(prompts: PromptSet, source: str, setting: str) -> str:
    """What is to be said of the first answers, up to 512, that their own verifier does not take.

    Raises:   ConfigError where the prompts are of no task.
    """
    if not is_task(source) or any("task" not in columns for columns in prompts.columns):
        raise ConfigError(
            f"{setting}=reasoning_gym scores answers to that package's problems, and {source} has others; set "
            f"prompts.source={PREFIX}TASK, or choose another rule."
        )
    answered = [columns for columns in prompts.columns if columns["answer"]][:_LOOKED_AT]
    scores = [gym_score(f"<answer>{columns['answer']}</answer>", columns) for columns in answered]
    missed = sum(score != 1 for score in scores)
    return f"{missed:,} of {len(scores):,} answers of {source} are not right for its own verifier" if missed else ""


@cache
def _verifier(name: str, parameters: str) -> Callable[[str, Mapping[str, Any]], float]:
    return task(name, json.loads(parameters)).score_answer


class _OverlongError(BaseException):
    """Of no kind that verifiers catch, but for those that catch everything."""


@contextmanager
def _alarm(seconds: float) -> Generator[list[bool]]:
    """Stop what runs longer, again and again in case it goes on; then the list has members."""
    rang: list[bool] = []
    inside = True

    def ring(*_: object) -> None:
        if inside:
            rang.append(True)
            raise _OverlongError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.1)
    try:
        yield rang
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
