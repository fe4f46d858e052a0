"""What a run needs to go on as if it had never stopped: weights, optimisers, schedules, and where it was.

    DIR/step_00000120/ROLE/       weights, optimiser and schedule of each role that learns, loadable in any layout
    DIR/step_00000120/state.json  the rest
    DIR/step_00000120/random_0_of_2.safetensors    each rank's random numbers
    DIR/step_00000120/checksums.json
    DIR/latest                    name of the newest
    DIR/best                      name of the best by the run's metric, where it keeps one

`state_writer` writes them. Rollouts, mini-batches and data order need no random state: they are functions of the seed
and the step. What a rank would draw besides goes on where it was, unless there are more ranks now, or fewer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors.torch import load_file

from megarlhf.checkpoint.checksums import check_checksums
from megarlhf.checkpoint.sharded import load_sharded, sharded_weights
from megarlhf.config import Config
from megarlhf.errors import CheckpointError
from megarlhf.models.optim import torch_optimizers
from megarlhf.models.role import TrainableRole
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.rng import restore_random_states

LATEST, BEST, STATE = "latest", "best", "state.json"


class Best(Config):
    """The best state so far."""

    step: int
    """Steps done then."""
    value: float
    """Its metric."""


class Position(Config):
    """Where a run was when it saved."""

    step: int
    """Steps done."""
    loaders: dict[str, dict[str, int]]
    """State of every loader, by name."""
    skipped_steps: int
    """Optimiser steps skipped so far."""
    bytes_written: dict[str, int]
    """Length of each log then; what a stopped run wrote after it is cut off."""
    best: Best | None = None
    """The best of the states so far, this one among them, where the run keeps it."""


def state_name(step: int) -> str:
    """The directory of the state after `step` steps."""
    return f"step_{step:08d}"


def random_file(mesh: Mesh) -> str:
    """The file of this rank's random numbers."""
    return f"random_{mesh.rank}_of_{mesh.size('world')}.safetensors"


def latest_state(directory: Path) -> Path | None:
    """The newest whole state in `directory`, None where there is none.

    Raises:   CheckpointError when the one that `latest` names is not there.
    """
    pointer = directory / LATEST
    if not pointer.exists():
        return None
    state = directory / pointer.read_text(encoding="utf-8").strip()
    if not (state / STATE).is_file():
        raise CheckpointError(f"{pointer} names {state.name}, which is missing; write the name of another state there.")
    return state


def load_state(state: Path, roles: Mapping[str, TrainableRole]) -> Position:
    """Fill the roles, which are prepared for training, and return where the run was.

    The same layout goes on bit for bit; another is equal up to the rounding of its sums.
    Ranks:    collective over the mesh.
    Raises:   CheckpointError when files are missing, corrupt or of other shapes.
    """
    remedy = f"write the name of another state to {state.parent / LATEST}, or remove that file to start afresh"
    mesh = next(iter(roles.values())).mesh
    check_checksums(state, remedy, mesh)
    for name, role in roles.items():
        with role.resident(*role.parts):
            loaded = load_sharded(role_state(role, loading=True), state / name, "remove it, or start afresh")
            with torch.no_grad():
                for index, chunk in enumerate(role.chunks):
                    chunk.load_state_dict(loaded["weights"][f"chunk{index}"], strict=False)
            _restore_optimizer(role, loaded["optimizer"])
            role.schedule.load_state_dict(loaded["schedule"])
    if (state / random_file(mesh)).is_file():
        restore_random_states(load_file(state / random_file(mesh)), mesh.device)
    try:
        return Position.model_validate_json((state / STATE).read_text(encoding="utf-8"))
    except (OSError, pydantic.ValidationError) as error:
        raise CheckpointError(f"{state / STATE} cannot be read ({error}); remove {state}, or start afresh.") from None


def role_state(role: TrainableRole, *, loading: bool) -> dict[str, Any]:
    """What Megatron needs to save weights, optimiser and schedule, or to load them in any layout."""
    _initialise(role)
    weights = sharded_weights(role)
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": role.mesh.groups.dp_cp,
    }
    optimizer: Any = role.optimizer
    return {
        "weights": weights,
        "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading, metadata=metadata),
        "schedule": role.schedule.state_dict(),
    }


def _initialise(role: TrainableRole) -> None:
    """The state that Adam makes at its first step: Megatron reads it, also of an optimiser that has not stepped.

    Torch's AdamW counts steps there; FusedAdam of Transformer Engine and Apex counts in its groups, and only there.
    """
    for optimizer in torch_optimizers(role.optimizer):
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            state = optimizer.state[parameter]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                if isinstance(optimizer, torch.optim.AdamW):
                    state["step"] = torch.zeros((), device=parameter.device)


def _restore_optimizer(role: TrainableRole, state: dict[str, Any]) -> None:
    """Megatron-Core 0.16.1 cannot load its sharded moments into torch's AdamW, whose state has a `step` among them."""
    moments = state.pop("param_state", None)
    state.pop("param_state_sharding_type", None)
    optimizer: Any = role.optimizer
    if moments is None:
        _add_count_of_zero(role, state)
    optimizer.load_state_dict(state)
    if moments is None:  # the optimiser is not sharded, and was loaded whole
        return
    (sharded,) = optimizer.chained_optimizers
    states = [values for inner in torch_optimizers(role.optimizer) for values in inner.state.values()]
    steps = [values.pop("step", None) for values in states]
    sharded.load_parameter_state_from_fully_reshardable(moments)
    for values, step in zip(states, steps, strict=True):
        if step is not None:
            values["step"] = step.clone()  # Megatron gives all of them one tensor, which each would then increment


def _add_count_of_zero(role: TrainableRole, state: dict[str, Any]) -> None:
    """Of an optimiser that had not stepped Megatron-Core 0.16.1 saves no count, without which AdamW loads nothing."""
    if all(isinstance(inner, torch.optim.AdamW) for inner in torch_optimizers(role.optimizer)):
        of_torch = state.get("optimizer", state)  # beside the masters of bfloat16 weights, or alone
        of_torch["state"].setdefault("common_step", torch.zeros(()))
