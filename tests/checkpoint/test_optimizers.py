"""AdamW of torch and FusedAdam of Transformer Engine count steps in different places; both come back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.checkpoint.state_writer import Retention, StateWriter
from megarlhf.checkpoint.training_state import Position, load_state
from megarlhf.models.optim import OptimConfig, torch_optimizers
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import TrainableRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh, start
from megarlhf.trainers.sft import next_token_loss
from tests.helpers.models import language_model, learner, ragged_rollout, settings
from tests.helpers.ranks import run_ranks, run_with_engine

FORMS = [(True, "bfloat16", 0), (True, "float32", 2), (False, "bfloat16", 2), (False, "float32", 0)]
"""Optimiser state sharded over data ranks or not, weights, and steps before the save: none as well, for an actor
whose critic warms up first is saved before it has stepped."""


def make(model: str, mesh: Mesh, distributed: bool, dtype: str) -> TrainableRole:
    optim = OptimConfig(lr=0.01, weight_decay=0.1, distributed=distributed)
    return learner(model, LabelLogprobs(1.0), settings(mesh, 2, dtype), mesh, optim)


def step(role: TrainableRole, index: int) -> float:
    return role.update(ragged_rollout(4, seed=index), next_token_loss(role)).grad_norm


def numbers(role: TrainableRole) -> list[Tensor]:
    with role.resident(*role.parts):
        return [x.clone() for part in ("weights", "optimizer") for x in role.tensors(part)]


def go_on_twice(model: str, where: str) -> dict[str, tuple[str, int, bool, float]]:
    """For every form: the optimiser, how many numbers were compared, whether all are equal, and the step it counted."""
    mesh = start(ParallelLayout(data=2), seed=1)
    found = {}
    for form in FORMS:
        distributed, dtype, before = form
        directory = Path(where, "-".join(map(str, form)))
        role = make(model, mesh, distributed, dtype)
        for index in range(before):
            step(role, index)
        writer = StateWriter(directory, {"actor": role}, {}, Retention(last=1, every=0), mesh)
        position = Position(step=before, parts={}, skipped_steps=0, bytes_written={})
        writer.start(position)
        writer.finish()
        norms = [step(role, index) for index in (7, 8)]
        again = make(model, mesh, distributed, dtype)
        assert load_state(directory / f"step_{before:08d}", {"actor": again}) == position
        norms_again = [step(again, index) for index in (7, 8)]
        pairs = list(zip(numbers(role), numbers(again), strict=True))
        same = norms == norms_again and all(torch.equal(a, b) for a, b in pairs)
        (inner,) = torch_optimizers(again.optimizer)
        holders = inner.state.values() if isinstance(inner, torch.optim.AdamW) else inner.param_groups
        (count,) = {float(values["step"]) for values in holders}
        found["-".join(map(str, form))] = type(inner).__name__, len(pairs), same, float(count)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    language_model(directory, seed=4, num_hidden_layers=1)
    return str(directory)


@pytest.mark.parametrize("run", [run_ranks, run_with_engine], ids=["AdamW", "FusedAdam"])
def test_a_saved_optimiser_goes_on_bit_for_bit(run: Any, model: str, tmp_path: Path) -> None:
    name = "FusedAdam" if run is run_with_engine else "AdamW"
    for found in run(go_on_twice, 2, model, str(tmp_path)):
        assert list(found) == ["-".join(map(str, form)) for form in FORMS]
        for form, (kind, count, same, steps) in found.items():
            assert kind == name
            assert count > 20
            assert same, form
            assert steps == int(form[-1]) + 2
