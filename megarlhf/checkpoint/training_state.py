"""What a run needs to go on as if it had never stopped: weights, optimisers, schedules, and where it was.

    DIR/step_00000120/ROLE/       of each role that learns a model directory, loadable in any layout, whose weights/ has
                                  its optimiser and schedule besides
    DIR/step_00000120/state.json  the rest
    DIR/step_00000120/random_0_of_2.safetensors    each rank's random numbers
    DIR/step_00000120/checksums.json
    DIR/latest                    name of the newest
    DIR/best                      name of the best by the run's metric, where it keeps one

`state_writer` writes them. Rollouts, mini-batches and data order need no random state: they are functions of the seed
and the step. What a rank would draw besides goes on where it was, unless there are more ranks now, or fewer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

import pydantic
import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from safetensors import SafetensorError
from safetensors.torch import load_file

from megarlhf.checkpoint.checksums import check_checksums
from megarlhf.checkpoint.model_directory import WEIGHTS, describe_model, load_sharded, sharded_weights
from megarlhf.checkpoint.nearby import MODEL
from megarlhf.config import Config
from megarlhf.errors import CheckpointError
from megarlhf.models.optim import restore_schedule, torch_optimizers
from megarlhf.models.role import TrainableRole
from megarlhf.observe.run_files import LATEST, step_name, step_of, steps_in
from megarlhf.parallel.mesh import Mesh
from megarlhf.parallel.rng import restore_random_states

STATE = "state.json"

Count = Annotated[int, pydantic.Field(ge=0, lt=2**62)]


Number = Annotated[int, pydantic.Field(ge=0, lt=2**100)]
"""FLOPs count to more than 64 bits hold."""


class Resumable(Protocol):
    """A part of a run, besides its roles, that goes on where it was: a loader, a count, a coefficient that adapts."""

    def state(self) -> Mapping[str, int]:
        """Everything needed to go on from here."""
        ...

    def load_state(self, state: Mapping[str, Any], /) -> None:
        """Go on from `state`. Raises CheckpointError where it is of something else."""
        ...


class Best(Config):
    """The best state so far."""

    step: Count
    """Steps done then."""
    value: float = pydantic.Field(allow_inf_nan=False)
    """Of its metric."""
    metric: str
    """keep_best, as it was then."""


class Position(Config):
    """Where a run was when it saved."""

    step: Count
    """Steps done."""
    parts: dict[str, dict[str, Number]]
    """State of every part of the run that is `Resumable`, by name."""
    skipped_steps: Count
    """Optimiser steps skipped so far."""
    skipped_in_a_row: dict[str, Count] = pydantic.Field(default_factory=dict)
    """Of each role whose last optimiser steps were skipped, how many."""
    bytes_written: dict[str, Count]
    """Length of each log then; what a stopped run wrote after it is cut off."""
    sums: dict[str, str] = pydantic.Field(default_factory=dict)
    """SHA-256 of each log then."""
    best: Best | None = None
    """The best of the states so far, this one among them, where the run keeps it."""


def random_file(mesh: Mesh) -> str:
    """The file of this rank's random numbers."""
    return f"random_{mesh.rank}_of_{mesh.size('world')}.safetensors"


def latest_state(directory: Path) -> Path | None:
    """The state to go on from: the one that `latest` names, or without that file the newest; None where there is none.

    A run that was killed after its first state and before the pointer to it has no `latest`, nor has one that lost it.

    Raises:   CheckpointError where `latest` cannot be read, or names nothing that is there.
    """
    pointer = directory / LATEST
    states = _states(directory)
    if not os.path.lexists(pointer):
        return states[-1] if states else None
    there = ", ".join(path.name for path in states[-3:])
    remedy = f"write there which to go on from: {there}" if states else f"remove {directory} to start afresh"
    try:
        name = pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{pointer} cannot be read ({type(error).__name__}); {remedy}.") from None
    if step_of(name) is None:
        raise CheckpointError(f"{pointer} names {name[:80]!r}, which is no state; {remedy}.")
    if directory / name not in states:
        raise CheckpointError(f"{pointer} names {name}, which is missing; {remedy}.")
    return directory / name


def _states(directory: Path) -> list[Path]:
    """The whole states in `directory` itself, by step."""
    return [path for path in steps_in(directory).values() if (path / STATE).is_file()]


def read_position(state: Path) -> Position:
    """Where the run was, without its weights.

    Raises:   CheckpointError when the file cannot be read, or says what no run saves.
    """
    try:
        position = Position.model_validate_json((state / STATE).read_text(encoding="utf-8"), strict=True)
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else None
        cause = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else type(error).__name__
        raise CheckpointError(f"{state / STATE} cannot be read ({cause}); {_elsewhere(state)}.") from None
    if step_name(position.step) != state.name:
        raise CheckpointError(f"{state / STATE} says that it is of step {position.step}; {_elsewhere(state)}.")
    return position


def _elsewhere(state: Path) -> str:
    """What to do about a damaged state."""
    others = [path.name for path in _states(state.parent) if path != state]
    pointer = state.parent / LATEST
    to_another = f"write the name of another state to {pointer} ({', '.join(others)}), or " if others else ""
    return f"{to_another}remove {state.parent} to start afresh"


def load_state(state: Path, roles: Mapping[str, TrainableRole]) -> Position:
    """Fill the roles, which are prepared for training, and return where the run was.

    The same layout goes on bit for bit; another is equal up to the rounding of its sums.
    Ranks:    collective over the mesh.
    Raises:   CheckpointError when files are missing, corrupt or of other shapes.
    """
    remedy = _elsewhere(state)
    mesh = next(iter(roles.values())).mesh
    for part in (state, *(state / name for name in roles), *(state / name / WEIGHTS for name in roles)):
        check_checksums(part, remedy, mesh)
    position = read_position(state)
    for name, role in roles.items():
        _check_same_model(state / name, role)
        with role.resident(*role.parts):
            loaded = load_sharded(role_state(role, loading=True), state / name / WEIGHTS, remedy)
            try:
                _fill(role, loaded)
            except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
                cause = f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]
                raise CheckpointError(f"{state / name}: cannot be taken over ({cause}); {remedy}.") from error
    numbers = state / random_file(mesh)
    try:
        if numbers.is_file():
            restore_random_states(load_file(numbers), mesh.device)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{numbers}: no state of random numbers ({type(error).__name__}); {remedy}.") from None
    return position


def _check_same_model(directory: Path, role: TrainableRole) -> None:
    if not (directory / MODEL).is_file():
        return  # the writer had no card for it
    then, now = dict(describe_model(str(directory)).spec), dict(role.spec)
    other = ", ".join(f"{name} {then[name]} -> {now[name]}" for name in then if then[name] != now[name])
    if other:
        raise CheckpointError(
            f"{directory} is of a model of another architecture ({other}); name one like that which the run began "
            "with, or choose another run_dir."
        )


def _fill(role: TrainableRole, loaded: Any) -> None:
    role.version += 1
    with torch.no_grad():
        for index, chunk in enumerate(role.chunks):
            chunk.load_state_dict(loaded["weights"][f"chunk{index}"], strict=False)
    _restore_optimizer(role, loaded["optimizer"])
    restore_schedule(role.schedule, loaded["schedule"], role.optim)


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
    chained: Any = role.optimizer
    if role.optim.precision_aware:  # its FusedAdam has masters and formats of its own
        for sharded in chained.chained_optimizers:
            if not sharded.optimizer.state:
                sharded.init_state_fn(sharded.optimizer, sharded.config)
        return
    for optimizer in torch_optimizers(role.optimizer):
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            state = optimizer.state[parameter]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                if isinstance(optimizer, torch.optim.AdamW):
                    state["step"] = torch.zeros((), device=parameter.device)
    for sharded in chained.chained_optimizers:
        if isinstance(sharded.optimizer, HybridDeviceOptimizer):
            sharded.optimizer._sync_sub_optimizers_state_to_hdo()


def _restore_optimizer(role: TrainableRole, state: dict[str, Any]) -> None:
    """Megatron-Core 0.16.1 cannot load its sharded moments into torch's AdamW, whose state has a `step` among them."""
    moments = state.pop("param_state", None)
    state.pop("param_state_sharding_type", None)
    optimizer: Any = role.optimizer
    _take_own_rates(optimizer, state)
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


def _take_own_rates(optimizer: Any, state: dict[str, Any]) -> None:
    """From 0.19 on Megatron-Core finds a saved group by its rates, which are the settings', and may be others now."""
    for saved, own in zip(state.get("optimizer", state)["param_groups"], optimizer.param_groups, strict=True):
        saved.update({name: own[name] for name in ("max_lr", "min_lr") if name in own})


def _add_count_of_zero(role: TrainableRole, state: dict[str, Any]) -> None:
    """Of an optimiser that had not stepped Megatron-Core 0.16.1 saves no count, without which AdamW loads nothing."""
    if all(isinstance(inner, torch.optim.AdamW) for inner in torch_optimizers(role.optimizer)):
        of_torch = state.get("optimizer", state)  # beside the masters of bfloat16 weights, or alone
        of_torch["state"].setdefault("common_step", torch.zeros(()))
