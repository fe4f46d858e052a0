"""Rows of random words, as each kind of trainer reads them, with one word a token."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tools.step_bench.workload import PAD
from tools.throughput_bench.lengths import Lengths

STEPS = 8
"""Of a response that is judged step by step, where it has as many words."""
SEPARATOR = " "
"""That joins them: the tokenizer gives no other back."""
Words = list[str]


class Form(NamedTuple):
    """What a row of one kind is."""

    responses: int
    """Of its prompt."""
    columns: Callable[[str, list[Words], int], dict[str, Any]]
    """Of the prompt, the responses and the row's number."""


PROMPT = Form(0, lambda prompt, _, number: {"prompt": prompt, "answer": "18"})
DEMONSTRATION = Form(1, lambda prompt, said, _: {"prompt": prompt, "response": " ".join(said[0])})
PAIR = Form(
    2, lambda prompt, said, _: {"prompt": prompt, "chosen": " ".join(said[0]), "rejected": " ".join(_other(*said))}
)
LABELLED = Form(
    1, lambda prompt, said, number: {"prompt": prompt, "response": " ".join(said[0]), "correct": number % 2}
)
STEPPED = Form(1, lambda prompt, said, number: {"prompt": prompt, **_steps(said[0], number % 2)})


def _other(chosen: Words, rejected: Words) -> Words:
    """`rejected`, and another where both are alike, of which a pair learns nothing."""
    return [*rejected[:-1], "w2" if rejected[-1] != "w2" else "w3"] if chosen == rejected else rejected


def _steps(words: Words, right: int) -> dict[str, Any]:
    """Of about equal lengths, all right but the last, which is as told."""
    count = min(STEPS, len(words))
    places = [number * len(words) // count for number in range(count + 1)]
    steps = [SEPARATOR.join(words[start:end]) for start, end in pairwise(places)]
    return {"steps": steps, "labels": [*[1] * (count - 1), right]}


@dataclass(frozen=True)
class MadeUp:
    """The rows of a set that a run works on."""

    form: Form
    of_iteration: int
    """Rows that an iteration takes."""
    max_tokens: int
    """Of a row: of its prompt where it has no response, of both and EOS where it has."""

    @property
    def longest_prompt(self) -> int:
        """Tokens: beside it a response has a word and EOS."""
        return self.max_tokens - 2 * bool(self.form.responses)

    @property
    def longest_response(self) -> int:
        """Tokens, of the shortest prompt, EOS among them."""
        return self.max_tokens - 1

    def write(self, path: Path, words: Words, rows: int, prompts: str, responses: str) -> None:
        """`rows` of them; `prompts` and `responses` are distributions of lengths in tokens, a response's with EOS.

        A response ends at the latest where its row is full.

        Raises:   ConfigError where a distribution is none, or goes beyond a row.
        """
        draw = torch.Generator().manual_seed(2)

        def text(length: int) -> Words:
            return [words[token] for token in torch.randint(PAD + 1, len(words), (length,), generator=draw).tolist()]

        of_prompts = Lengths(prompts, self.longest_prompt).of(_quantiles(rows, seed=1)).tolist()
        drawn = _quantiles(rows * self.form.responses, seed=3)
        of_responses = Lengths(responses, self.longest_response).of(drawn).tolist() if len(drawn) else []
        with path.open("w", encoding="utf-8") as file:
            for number, length in enumerate(of_prompts):
                prompt, room = " ".join(text(length)), self.max_tokens - length
                own = of_responses[number * self.form.responses : (number + 1) * self.form.responses]
                said = [text(max(1, min(each, room) - 1)) for each in own]
                file.write(json.dumps(self.form.columns(prompt, said, number)) + "\n")


def _quantiles(count: int, *, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
