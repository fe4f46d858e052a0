"""A small pool of the built-in task, written as `megarlhf generate` writes one, with responses of known worth."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch

from megarlhf.batch.rollouts import Rollout
from megarlhf.commands.generate import fields_of
from megarlhf.commands.pool_files import PoolFiles
from megarlhf.data.arithmetic import ArithmeticConfig, Mistake, demonstration, problems, words
from megarlhf.data.prompts import load_prompts
from megarlhf.data.rows import DataConfig, pad_right
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.eval.pool import Order

KINDS: tuple[Mistake, ...] = ("none", "drop_last_step", "wrong_operation", "guess")
DATA = DataConfig(source="arithmetic", template="plain", arithmetic=ArithmeticConfig(rows=6, level=1))


def said(samples: int) -> list[list[str]]:
    """Responses to each of the six problems, many of them alike."""
    found = []
    for problem in problems(DATA.arithmetic, "train"):
        rng = Random(problem.text)
        found.append([demonstration(problem, rng.choice(KINDS), rng) for _ in range(samples)])
    return found


def write_pool(directory: Path, *rounds: int, cut: tuple[int, ...] = ()) -> PoolFiles:
    """The pool of those responses, so many to a prompt after each round. What is there already stays.

    cut: samples that did not end.
    """
    tokenizer = build_tiny_tokenizer(words())
    prompts = load_prompts(DATA, tokenizer)
    pool = PoolFiles(directory, {"seed": 1}, "arithmetic", prompts, tokenizer, Order(len(prompts), rounds))
    there, every = pool.done(), said(rounds[-1])
    places = [pool.order.at(index) for index in range(there, pool.order.total)]
    texts = [every[place.prompt][place.sample] for place in places]
    ended = torch.tensor([place.sample not in cut for place in places])
    asked = prompts.batch(torch.tensor([place.prompt for place in places]))
    ids = [tokenizer.encode_response(text) for text in texts]
    ids = [row if end else row[:-1] for row, end in zip(ids, ended.tolist(), strict=True)]
    starts = asked.lengths.tolist()
    rows = [[*prompt[:start], *row] for prompt, start, row in zip(asked.tokens.tolist(), starts, ids, strict=True)]
    tokens, lengths = pad_right(rows, tokenizer.pad_id)
    logprobs = torch.zeros(len(rows), tokens.shape[1] - 1)
    rollout = Rollout(tokens, asked.lengths, lengths, ended, logprobs, asked.ids, asked.answers)
    pool.begin()
    pool.write(there, pool.lines(there, rollout, fields_of(rollout, tokenizer)))
    return pool
