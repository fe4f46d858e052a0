"""Dynamic sampling: prompts are rolled out and judged until a batch is full of groups that say something."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megarlhf.batch.base import cat
from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.judges.panel import Judgement, joined
from megarlhf.observe.metrics import Metrics
from megarlhf.ops.group_advantages import equal_groups
from megarlhf.parallel.collectives import broadcast_object
from megarlhf.trainers.policy_config import PolicyConfig
from megarlhf.trainers.policy_loop import Cast, Turn

HEADROOM = 1.25
"""Drawn over what should just do: a missing group costs a whole round, however few prompts it has."""


@dataclass(frozen=True)
class Filled:
    """A full batch, and all that was drawn for it; equal on every rank."""

    rollout: Rollout
    judgement: Judgement
    all_drawn: Rollout
    all_judgement: Judgement
    metrics: Metrics


def fill(cast: Cast, prompts: Prompts, turn: Turn, cfg: PolicyConfig, *, max_draws: int) -> Filled:
    """Roll out and judge `prompts`, and then more of them, until the scores of enough groups differ. Collective.

    Scores are the judges', before shaping. Groups are kept in the order in which they were drawn. Where max_draws did
    not give enough, the first of those with equal scores fill the batch: the size of a step stays what it was, and
    nothing is learnt from them but what shaping adds, such as to be brief.
    """
    mesh = cast.actor.mesh
    rollouts: list[Rollout] = []
    judgements: list[Judgement] = []
    wanted, differ = cfg.prompts_per_iteration, torch.zeros(0, dtype=torch.bool)
    while True:
        with turn.clock("rollout"):
            seed = turn.seed("rollout", len(rollouts))
            rollouts.append(cast.sampler.generate(prompts, cfg.sampling, seed=seed, group_size=cfg.group_size))
        with turn.clock("score"):
            judgements.append(cast.panel.judge(rollouts[-1]))
        # One rank decides: where another had a score an ulp away, it would wait for responses that nobody draws.
        said = broadcast_object(equal_groups(judgements[-1].scores, cfg.group_size).tolist(), mesh, "world")
        differ = torch.cat([differ, ~torch.tensor(said)])
        kept = int(differ.sum())
        if kept >= wanted or len(rollouts) == max_draws:
            break
        prompts = turn.more(_next_draw(wanted - kept, kept / len(differ), wanted))
    groups = torch.cat([differ.nonzero()[:, 0], (~differ).nonzero()[:, 0]])[:wanted]
    rows = (groups[:, None] * cfg.group_size + torch.arange(cfg.group_size)).flatten()
    drawn, judgement = cat(rollouts), joined(judgements)
    rollout = drawn.rows(rows.to(drawn.tokens.device))
    metrics = {
        "draws/count": float(len(rollouts)),
        "draws/kept_fraction": kept / len(differ),
        "draws/filled_groups": float(max(0, wanted - kept)),
        "draws/discarded_tokens": float(drawn.response_lengths.sum() - rollout.response_lengths.sum()),
    }
    return Filled(rollout, judgement.rows(rows.tolist()), drawn, judgement, metrics)


def _next_draw(missing: int, share: float, most: int) -> int:
    """Prompts that should give `missing` groups more, where `share` of the groups so far were of use."""
    return min(most, math.ceil(HEADROOM * missing / share)) if share else most
