"""Padding, however much and whatever is in it, changes nothing (invariant 5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.batch.supervised import TokenBatch
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs, PositionValues, SequenceScores
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers.sft import next_token_loss
from tests.helpers.models import frozen, language_model, learner, name_of, ragged_rollout, score_model, settings
from tests.helpers.ranks import run_ranks

ROWS = ragged_rollout()
LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2, sequence_parallel=True),
    ParallelLayout(pipeline=2, virtual_pipeline=2),
    ParallelLayout(context=2),
]


def refilled(rows: Rollout, positions: int, seed: int) -> Rollout:
    """The same texts in wider rows, with random tokens for padding."""
    wide = rows.padded_to(positions)
    noise = torch.randint(1, 131, wide.tokens.shape, generator=torch.Generator().manual_seed(seed))
    padding = torch.arange(positions + 1) >= wide.lengths[:, None]
    return Rollout(**{**vars(wide), "tokens": torch.where(padding, noise, wide.tokens)})


def look(layout: ParallelLayout, language: str, scalar: str) -> dict[str, list[Tensor]]:
    """All that can be read and learnt from the rows as they are, refilled, and refilled and widened by 9."""
    mesh = start(layout, seed=1)
    variants = [ROWS, refilled(ROWS, 21, 1), refilled(ROWS, 30, 2)]
    seen: dict[str, list[Tensor]] = {}
    readings: list[tuple[str, Any]] = [
        (language, LabelLogprobs(1.0)),
        (scalar, PositionValues()),
        (scalar, SequenceScores()),
    ]
    for directory, reading in readings:
        role = frozen(directory, reading, mesh)
        scores = [role.score(rows) for rows in variants]
        for rows, score in zip(variants, scores, strict=True):
            assert score.shape == (rows.labels.shape if not isinstance(reading, SequenceScores) else rows.lengths.shape)
            assert score.ndim == 1 or not score[~rows.response_mask].any()
        seen[type(reading).__name__] = [score[:, :21] if score.ndim == 2 else score for score in scores]
    # A step from the same weights each time, without a role in between that could carry something over.
    seen |= {"loss": [], "norm": [], "gradient": []}
    for rows in variants:
        role = learner(language, LabelLogprobs(1.0), settings(mesh, 4), mesh, OptimConfig())
        batch = TokenBatch(rows.tokens, rows.lengths, rows.response_mask)
        update = role.update(batch, next_token_loss(role))
        seen["loss"].append(torch.tensor(update.means.loss))
        seen["norm"].append(torch.tensor(update.grad_norm))
        seen["gradient"].append(torch.cat([tensor.flatten().clone() for tensor in role.tensors("gradients")]))
    # The longest row beside the shortest: in one micro-batch the short one is mostly padding, alone it has none.
    role = frozen(language, LabelLogprobs(1.0), mesh, 4)
    seen["together"] = [role.score(ROWS)]
    role = frozen(language, LabelLogprobs(1.0), mesh, 1)
    seen["together"].append(role.score(ROWS))
    return seen


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp("padding")
    language_model(folder / "language", seed=7)
    score_model(folder / "scalar", seed=8)
    return str(folder / "language"), str(folder / "scalar")


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_padding_changes_nothing(layout: ParallelLayout, models: tuple[str, str]) -> None:
    """Bitwise: rows are trimmed to the longest text before they are read, and no real position attends to padding."""
    for rank in run_ranks(look, layout.world_size, layout, *models):
        together, alone = rank.pop("together")
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)  # other shapes, so another order of sums
        for name, (plain, *padded) in rank.items():
            assert plain.abs().sum() > 0, name
            assert all(torch.equal(other, plain) for other in padded), name
