"""Labels of steps follow the probability that a completion is right: exactly known, since one token decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from megarlhf.batch.supervised import TokenBatch
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.commands.label_steps import LabelStepsConfig, prepare
from megarlhf.data.row import Row
from megarlhf.data.rows import pad_right
from megarlhf.data.solutions import Solution, SolutionSet
from megarlhf.eval.step_labels import Beginning, Beginnings, complete, shares
from megarlhf.judges.texts import Opinion, Reader, Response
from megarlhf.models.readings import LabelLogprobs
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.runtime.checks import Model
from megarlhf.runtime.roles import frozen
from tests.helpers.ranks import run_ranks

RIGHT = tuple(str(number) for number in range(40, 56))
"""Words after which a completion of one token is right: 16 of 160, so that p is about 0.1."""
COMPLETIONS, SEEDS = 4, 6


def judged(responses: Sequence[Response]) -> list[Opinion]:
    return [Opinion(0.0, correct=each.response.split()[-1] in RIGHT) for each in responses]


def drawn(output: Path) -> tuple[list[float], list[list[float]]]:
    """Of every beginning the probability of a right completion, and its soft labels by several seeds."""
    given = {
        "model": "tiny-xs",
        "tokenizer": "arithmetic",
        "output": output,
        "solutions": {"source": "arithmetic", "template": "plain", "arithmetic": {"rows": 100}},
        "sampling": {"temperature": 1.0, "max_new_tokens": 1},
    }
    cfg = LabelStepsConfig.model_validate(given)
    inputs = prepare(cfg)
    mesh = start(ParallelLayout(), seed=1)
    policy = frozen("model", Model("model", cfg.model, describe_model(cfg.model)), LabelLogprobs(1.0), cfg, mesh)
    engine = RolloutEngine.of(policy, inputs.tokenizer, 128, cfg.rollout)
    of = Beginnings.among(inputs.solutions, range(len(inputs.solutions)))
    reader = Reader(inputs.solutions.prompts, inputs.tokenizer, mesh, 60.0)
    places = {beginning: number for number, beginning in enumerate(of.of)}
    labels: list[list[float]] = [[] for _ in places]
    for seed in range(SEEDS):
        completed = complete(engine, of, cfg.sampling, completions=COMPLETIONS, seed=seed)
        found = shares(of, [completed], reader, judged, completions=COMPLETIONS)
        seen: dict[int, float] = {}
        for place, row in zip(of.chosen, found, strict=True):
            solution = inputs.solutions.solutions[place]
            for tokens, label in zip(solution.beginnings(), row, strict=False):
                number = places[Beginning(tokens, solution.answer)]
                assert seen.setdefault(number, label) == label
        for number, label in seen.items():
            labels[number].append(label)
    ids = [inputs.tokenizer.encode(word)[0] for word in RIGHT]
    rows = [[*beginning.tokens, word] for beginning in of.of for word in ids]
    tokens, lengths = pad_right(rows, inputs.tokenizer.pad_id)
    last = torch.arange(1, tokens.shape[1]) == (lengths - 1)[:, None]
    logprobs = policy.score(TokenBatch(tokens, lengths, last)).sum(1)
    return logprobs.view(-1, len(ids)).exp().sum(1).tolist(), labels


def test_what_is_drawn_depends_on_no_other_solution() -> None:
    """Two problems that read alike and have two answers: each has random numbers of its own, in any company."""
    rows = [Row("rows.jsonl", number, {}) for number in (1, 2)]
    both = [Solution([1, 2], [3, 4, 5], [0, 2], ["3", "4 5"], answer) for answer in ("8", "9")]
    ids = Beginnings.among(SolutionSet(both, rows, 0, dropped=0), [0, 1]).prompts.ids.tolist()
    assert len(set(ids)) == 2
    assert Beginnings.among(SolutionSet(both[1:], rows[1:], 0, dropped=0), [0]).prompts.ids.tolist() == [ids[1]]


def test_labels_follow_the_probability_of_being_right(tmp_path: Path) -> None:
    """The soft label is p on average; the hard one is 1 in 1 - (1 - p)^N: within 3.5 standard errors of either."""
    probabilities, labels = run_ranks(drawn, 1, tmp_path / "none.jsonl")[0]
    p, soft = torch.tensor(probabilities, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64)
    assert soft.shape == (len(p), SEEDS)
    assert 0.05 < float(p.mean()) < 0.2
    trials = COMPLETIONS * SEEDS
    assert abs(float(soft.mean() - p.mean())) < 3.5 * math.sqrt(float((p * (1 - p)).sum()) / trials) / len(p)
    expected = 1 - (1 - p) ** COMPLETIONS
    error = math.sqrt(float((expected * (1 - expected)).sum()) / SEEDS) / len(p)
    hard = float((soft > 0).double().mean())
    assert abs(hard - float(expected.mean())) < 3.5 * error
    # One completion more or fewer would be seen.
    assert abs(float((1 - (1 - p) ** (COMPLETIONS - 1)).mean()) - float(expected.mean())) > 3.5 * error
