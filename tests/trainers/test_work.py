"""What a run says that it has computed is what one counts by hand, text by text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.models import language_model, score_model
from tests.helpers.ranks import run_ranks
from tests.trainers.worlds import iterate, ppo_cast, ppo_config

GROUP, EPOCHS = 2, 3


def prompts() -> Prompts:
    """Four prompts of 2 to 7 tokens, padded."""
    lengths = torch.tensor([2, 7, 4, 5])
    tokens = torch.randint(4, 131, (4, 9), generator=torch.Generator().manual_seed(1))
    tokens[torch.arange(9) >= lengths[:, None]] = 0
    return Prompts(tokens, lengths, torch.arange(4), ("",) * 4)


def texts(spec: ModelSpec, lengths: list[int], projected: int) -> int:
    """One forward over texts of these lengths, token by token: all products of matrices, all keys that are seen."""
    h, d = spec.hidden_size, spec.head_dim
    matrices = h * d * spec.heads + 2 * h * d * spec.kv_heads + d * spec.heads * h + 3 * h * spec.ffn_size
    adds = 0
    for length in lengths:
        for token in range(length):
            adds += spec.layers * (matrices + 2 * spec.heads * d * (token + 1))
    return 2 * (adds + projected * spec.vocab_size * h)


def by_hand(actor: ModelSpec, scalar: ModelSpec, rollout: Rollout, *, actor_learns: bool) -> dict[str, int]:
    whole, starts = rollout.lengths.tolist(), rollout.prompt_lengths.tolist()
    drawn = sum(whole) - sum(starts)
    read = [length - 1 for length in whole]  # the last token of a text predicts nothing
    generate = texts(actor, starts[::GROUP], 0)  # a prompt passes once for all of its samples
    for start_, length in zip(starts, read, strict=True):
        generate += texts(actor, [length], 0) - texts(actor, [start_], 0)
    language, values = texts(actor, read, drawn), texts(scalar, read, 0)
    learnt = values + (language if actor_learns else 0)
    return {
        "compute/rollout_flops": generate + texts(actor, [], drawn),
        "compute/score_flops": 2 * language + values + texts(scalar, whole, 0),  # which reads the last token too
        "compute/optimise_flops": 3 * EPOCHS * learnt,
    }


def count(layout: ParallelLayout, budget: int | None, folder: str) -> list[dict[str, Any]]:
    """Two iterations, in the first of which only the critic learns."""
    mesh = start(layout, seed=1)
    cfg = ppo_config(
        Path(folder) / "run",
        layout,
        f"{folder}/actor",
        f"{folder}/judge",
        sampling={"temperature": 0.7, "max_new_tokens": 12},
        rollout_batch=8,
        group_size=GROUP,
        global_batch=4,
        micro_batch=2,
        micro_batch_tokens=budget,
        ppo_epochs=EPOCHS,
        value_warmup_iterations=1,
        iterations=2,
    )
    cast = ppo_cast(cfg, mesh, 20)
    seen = []
    for index in range(2):
        done = iterate(cast, prompts(), cfg, index)
        cast.actor.score(done.rollout)  # in no phase: a check of the run, and not its work
        expected = by_hand(cast.actor.spec, cast.panel.roles[0].spec, done.rollout.to("cpu"), actor_learns=index == 1)
        seen.append({"metrics": done.metrics, "expected": expected})
    return seen


@pytest.mark.parametrize(
    ("layout", "budget"),
    [
        (ParallelLayout(), None),
        (ParallelLayout(data=2), None),
        (ParallelLayout(tensor=2), None),
        (ParallelLayout(data=2), 48),
    ],
    ids=["one", "dp2", "tp2", "dp2-packed"],
)
def test_flops_of_ppo_are_those_of_a_count_by_hand(layout: ParallelLayout, budget: int | None, tmp_path: Path) -> None:
    language_model(tmp_path / "actor", seed=4)
    score_model(tmp_path / "judge", seed=5)
    for rank in run_ranks(count, layout.world_size, layout, budget, str(tmp_path)):
        total = dict.fromkeys(rank[0]["expected"], 0)
        for number, iteration in enumerate(rank):
            metrics, expected = iteration["metrics"], iteration["expected"]
            for name, flops in expected.items():
                assert flops > 0
                total[name] += flops
                phase = name.removeprefix("compute/").removesuffix("_flops")
                assert metrics[name] == total[name], f"{name}, iteration {number}"
                seconds = metrics[f"time/{phase}_s"]
                rate = flops / seconds / layout.world_size
                assert metrics[f"throughput/{phase}_flops_per_s"] == pytest.approx(rate)
            assert metrics["compute/flops"] == sum(total.values())
        first, second = (iteration["expected"]["compute/optimise_flops"] for iteration in rank)
        assert second > 1.5 * first  # the actor learns too
