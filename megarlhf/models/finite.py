"""Whether a model is one: every weight a number, and what it says of a text numbers too."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megarlhf.batch.base import TokensMask
from megarlhf.batch.supervised import TokenBatch
from megarlhf.models.role import Role
from megarlhf.parallel.collectives import all_reduce

TOKENS = 16
"""Of the row that is scored; FP8 wants a multiple of 16."""


@dataclass(frozen=True, eq=False)
class _Row(TokenBatch):
    """A row that has what any reading asks for."""

    step_ends: TokensMask


def not_finite(role: Role) -> str:
    """In words, what of `role` is not finite: a weight, or the reading of a made-up row; empty for a sound model.

    Weights may be numbers and yet so large that every forward pass overflows.
    Ranks:    collective over the mesh; equal on every rank.
    """
    with role.resident("weights"):
        bad = sum(int((~weight.isfinite()).sum()) for weight in role.tensors("weights"))
    mesh = role.mesh
    count = int(all_reduce(torch.tensor(bad, device=mesh.device), mesh, "world"))
    if count:
        return f"{count:,} of its numbers are not finite"
    working, at = mesh.trail.work, mesh.trail.role
    scores = role.score(_row(role).to(mesh.device))
    mesh.trail.work, mesh.trail.role = working, at  # a capsule is about the last step, not about this
    wrong = torch.tensor(int(not bool(scores.isfinite().all())), device=mesh.device)
    return "it gives numbers that are not finite" if int(all_reduce(wrong, mesh, "world", op="max")) else ""


def _row(role: Role) -> _Row:
    tokens = torch.arange(TOKENS).remainder(role.spec.vocab_size)[None]
    every = torch.ones(1, TOKENS, dtype=torch.bool)
    return _Row(tokens, torch.tensor([TOKENS]), every[:, 1:], every)
