"""Offload and back is bit-equal, frees the storages, and leaves learning as it was (invariant 6)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megarlhf.batch.supervised import TokenBatch
from megarlhf.checkpoint.training_state import role_state
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import TrainableRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers.sft import next_token_loss
from tests.helpers.models import language_model, learner, name_of, ragged_rollout, settings, whole_weights, worst
from tests.helpers.ranks import run_ranks

CASES = [
    (ParallelLayout(), False, "float32"),
    (ParallelLayout(), True, "bfloat16"),
    (ParallelLayout(data=2), True, "float32"),
    (ParallelLayout(data=2), True, "bfloat16"),
    (ParallelLayout(tensor=2), False, "bfloat16"),
]
ROWS = ragged_rollout(4)
BATCH = TokenBatch(ROWS.tokens, ROWS.lengths, ROWS.response_mask)
SHARDED = (ShardedTensor, ShardedTensorFactory)
PARTS = ("weights", "gradients", "optimizer")


def bytes_of(role: TrainableRole) -> dict[str, int]:
    """What the storages behind each part hold, read off the tensors themselves."""
    sizes = {}
    for part in PARTS:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in role.tensors(part)}
        sizes[part] = sum(storages.values())
    return sizes


def travel(layout: ParallelLayout, distributed: bool, dtype: str, directory: str) -> dict[str, Any]:
    """Two learners on the same data: one leaves after every step and comes back piece by piece, one stays."""
    mesh = start(layout, seed=1)
    optim = OptimConfig(lr=1e-2, distributed=distributed)
    shared = settings(mesh, 2, dtype=dtype)
    traveller, homebody = (learner(directory, LabelLogprobs(1.0), shared, mesh, optim) for _ in range(2))
    traveller.leave()
    report: dict[str, Any] = {"away": [], "home": []}
    for _ in range(3):
        updates = [role.update(BATCH, next_token_loss(role)) for role in (traveller, homebody)]
        assert updates[0] == updates[1]
        with traveller.resident(*PARTS):
            report["home"].append(bytes_of(traveller))
            before = {part: [tensor.clone() for tensor in traveller.tensors(part)] for part in PARTS}
        report["away"].append((bytes_of(traveller), traveller.resident_bytes()))
        with traveller.resident("weights"):
            report["weights only"] = bytes_of(traveller)
            with traveller.resident("weights"):  # a nested block moves nothing, in or out
                pass
            assert bytes_of(traveller) == report["weights only"]
        with traveller.resident(*PARTS):
            for part in ("weights", "optimizer"):
                pairs = zip(before[part], traveller.tensors(part), strict=True)
                assert all(torch.equal(old, new) for old, new in pairs), part
            # Gradients are dropped, since every step starts by zeroing them.
            assert not any(tensor.any() for tensor in traveller.tensors("gradients"))
    report["gap"] = worst(whole_weights(traveller), whole_weights(homebody))
    report["moved"] = float((before["weights"][0] - learner_start(directory, shared, mesh)).abs().max())
    of = traveller.planned
    report["planned"] = of.weights, of.gradients, of.optimiser
    report["staged"] = (of.staged, gathered_bytes(traveller) if distributed else 0)
    with pytest.raises(KeyError), traveller.resident("weights"):
        raise KeyError  # a failure inside the block must not leave the role on the device
    report["after failure"] = traveller.resident_bytes()
    return report


def gathered_bytes(role: Any) -> int:
    """What Megatron's distributed optimiser makes to save a state."""
    with role.resident(*PARTS):
        state = role_state(role, loading=False)["optimizer"]
        tensors = [value.data for value in nested_values(state) if isinstance(value, SHARDED)]
        return sum(4 * tensor.numel() for tensor in tensors if tensor is not None)


def learner_start(directory: str, shared: Any, mesh: Any) -> torch.Tensor:
    return learner(directory, LabelLogprobs(1.0), shared, mesh, OptimConfig()).tensors("weights")[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("residency")
    language_model(folder / "actor", seed=6)
    return str(folder / "actor")


@pytest.mark.parametrize(
    ("layout", "distributed", "dtype"),
    CASES,
    ids=[f"{name_of(layout)}-{'sharded' if distributed else 'whole'}-{dtype}" for layout, distributed, dtype in CASES],
)
def test_a_role_leaves_and_returns(layout: ParallelLayout, distributed: bool, dtype: str, directory: str) -> None:
    for rank in run_ranks(travel, layout.world_size, layout, distributed, dtype, directory):
        assert rank["gap"] == 0.0
        assert rank["moved"] > 1e-3
        for sizes, resident in rank["away"]:
            assert sizes == dict.fromkeys(PARTS, 0)
            assert resident == 0
        assert rank["after failure"] == 0
        assert rank["weights only"]["weights"] == rank["home"][-1]["weights"]
        assert rank["weights only"]["gradients"] == 0
        # In fp32 the optimiser's master weights are the weights, and come with them.
        shared = rank["home"][-1]["weights"] if dtype == "float32" else 0
        assert rank["weights only"]["optimizer"] == shared
        weights, gradients, state = rank["planned"]
        home = rank["home"][-1]
        # DDP pads flat buffers to 64 numbers a shard and 256 bytes a parameter.
        assert home["weights"] == pytest.approx(weights, rel=0.03)
        assert home["gradients"] == pytest.approx(gradients, rel=0.03)
        assert home["optimizer"] - shared == pytest.approx(state, rel=0.05)
        staged, gathered = rank["staged"]
        assert staged == gathered
