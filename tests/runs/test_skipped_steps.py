"""A loss or a gradient that is not finite never reaches the weights, whichever rank it is on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megarlhf.batch.rollouts import PolicyRows
from megarlhf.batch.supervised import TokenBatch
from megarlhf.errors import TrainingError
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import TrainableRole
from megarlhf.observe.clock import Clock
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import Loss, LossSums, States
from megarlhf.runs.capsule import RNG, read_notes
from megarlhf.runs.guard import StepGuard
from megarlhf.trainers.policy_loop import Turn, optimise
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.sft import next_token_loss
from tests.helpers.models import language_model, learner, name_of, ragged_rollout, settings
from tests.helpers.ranks import run_ranks
from tests.trainers.worlds import no_more, ppo_config

LAYOUTS = [
    (ParallelLayout(data=2), False),
    (ParallelLayout(data=2), True),
    (ParallelLayout(pipeline=2, data=2), True),
    (ParallelLayout(tensor=2, data=2), False),
]
ROWS = ragged_rollout(4)
OWN = TokenBatch(ROWS.tokens, ROWS.lengths, ROWS.response_mask)


class Faulty:
    """The next-token loss, spoilt on one data rank alone."""

    def __init__(self, role: TrainableRole, kind: str) -> None:
        self.loss = next_token_loss(role)
        self.kind = kind if role.mesh.data_rank == 1 else "none"

    def __call__(self, states: States, rows: Any) -> LossSums:
        sums = self.loss(states, rows)
        total = sums.total
        if self.kind == "loss":
            total = total * float("nan")
        elif self.kind == "infinite":
            total = total + float("inf")  # whose gradient is finite
        elif self.kind == "gradient":
            total = total + (states.hidden.sum() * 0).sqrt()  # 0, whose gradient is not
        return replace(sums, total=total)


def state_of(role: TrainableRole) -> list[Tensor]:
    """Every number that a step may change, but for the gradients: weights, moments, Adam's own count."""
    counts = [torch.tensor(float(group.get("step", 0))) for group in role.optimizer.param_groups]
    return [tensor.clone() for part in ("weights", "optimizer") for tensor in role.tensors(part)] + counts


def skip(layout: ParallelLayout, distributed: bool, directory: str) -> dict[str, Any]:
    """A good step, three spoilt ones, a good one; and beside it the two good ones alone."""
    mesh = start(layout, seed=1)
    optim = OptimConfig(lr=1e-2, schedule="linear", distributed=distributed)
    roles = [learner(directory, LabelLogprobs(1.0), settings(mesh, 2), mesh, optim) for _ in range(2)]
    guard = StepGuard(Path(directory), 5, mesh)
    seen = {}

    def step(role: TrainableRole, loss: Loss) -> Any:
        update = role.update(OWN, loss)
        guard.check(role, update, 0)
        return update

    step(roles[0], next_token_loss(roles[0]))
    before = state_of(roles[0])
    for kind in ("loss", "infinite", "gradient"):
        update = step(roles[0], Faulty(roles[0], kind))
        same = [torch.equal(x, y) for x, y in zip(before, state_of(roles[0]), strict=True)]
        seen[kind] = (update.stepped, repr(update.means.loss), repr(update.grad_norm), all(same))
    rate = step(roles[0], next_token_loss(roles[0])).learning_rate
    for _ in range(2):
        expected = step(roles[1], next_token_loss(roles[1])).learning_rate
    same = [torch.equal(x, y) for x, y in zip(state_of(roles[0]), state_of(roles[1]), strict=True)]
    moved = not torch.equal(before[0], state_of(roles[0])[0])
    return {"seen": seen, "skipped": guard.skipped, "goes on": all(same) and rate == expected, "moved": moved}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("skipped")
    language_model(folder / "actor", seed=6)
    return str(folder / "actor")


@pytest.mark.parametrize(("layout", "distributed"), LAYOUTS, ids=lambda x: name_of(x) if not isinstance(x, bool) else x)
def test_all_ranks_skip_together(layout: ParallelLayout, distributed: bool, directory: str) -> None:
    ranks = run_ranks(skip, layout.world_size, layout, distributed, directory)
    for rank in ranks:
        stepped, losses, norms, untouched = zip(*rank["seen"].values(), strict=True)
        assert not any(stepped)
        assert all(untouched)
        assert losses[:2] == ("nan", "inf")
        assert losses[2] not in ("nan", "inf")
        assert norms[2] in ("nan", "inf")
        assert rank["skipped"] == 3
        assert rank["goes on"]
        assert rank["moved"]
        assert rank == ranks[0]


def give_up(layout: ParallelLayout, directory: str, run_dir: str) -> dict[str, Any]:
    """PPO's own loop over rows with one NaN advantage, in data rank 1's rows."""
    mesh = start(layout, seed=1)
    cfg = ppo_config(Path(run_dir), layout, directory, directory, rollout_batch=4, global_batch=4, ppo_epochs=3)
    role = learner(directory, LabelLogprobs(0.7), settings(mesh, 2), mesh, OptimConfig())
    before = [tensor.clone() for tensor in role.tensors("weights")]
    advantages = torch.ones(ROWS.labels.shape)
    advantages[3, int(ROWS.lengths[3]) - 2] = float("nan")
    zeros = torch.zeros(ROWS.labels.shape)
    rows = PolicyRows(ROWS, zeros - 4.0, advantages)
    guard = StepGuard(cfg.run_dir, 2, mesh)
    torch.manual_seed(40 + mesh.rank)
    try:
        turn = Turn(7, cfg.seed, Clock(mesh.device), guard, no_more)
        optimise(role, policy_loss(role, cfg), rows, turn, cfg)
        message = "no error"
    except TrainingError as error:
        message = str(error)
    same = [torch.equal(x, y) for x, y in zip(before, role.tensors("weights"), strict=True)]
    return {"message": message, "skipped": guard.skipped, "same": all(same), "rng": torch.get_rng_state()}


def test_past_the_limit_the_run_stops_with_the_evidence(directory: str, tmp_path: Path) -> None:
    ranks = run_ranks(give_up, 2, ParallelLayout(data=2), directory, str(tmp_path))
    spoilt = 0
    for number, rank in enumerate(ranks):
        assert rank["skipped"] == 3
        assert rank["same"]
        capsule = tmp_path / "capsules" / "step_00000007"
        for part in ("3 optimiser steps", "learner, step 7", "loss nan", str(capsule), "raise max_skipped_steps"):
            assert part in rank["message"]
        note = read_notes(capsule)[number]
        assert (note.role, note.step, note.rank, note.part, note.kind) == (
            "learner",
            7,
            number,
            number,
            "PolicyRows",
        )
        assert note.reason.startswith("not finite: loss nan")
        with safe_open(capsule / f"rank_{number}.safetensors", framework="pt") as file:
            assert torch.equal(file.get_tensor(f"{RNG}, cpu"), rank["rng"])
            tokens, advantages = file.get_tensor("rollout.tokens"), file.get_tensor("advantages")
        # Each rank saved its own two rows, as they were when they did the damage.
        assert tokens.shape == (2, ROWS.tokens.shape[1])
        spoilt += int(advantages.isnan().sum())
    assert spoilt == 1
