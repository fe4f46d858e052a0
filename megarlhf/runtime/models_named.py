"""Runs and saved states as models: the settings that name one are given the directory of its model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch

from megarlhf.checkpoint.nearby import model_of
from megarlhf.config import Config
from megarlhf.errors import ConfigError
from megarlhf.models.spec import PRESETS
from megarlhf.parallel.collectives import all_reduce
from megarlhf.parallel.mesh import Mesh

Cfg = TypeVar("Cfg", bound=Config)

NAMES = ("model", "init", "reference", "reward")
"""Settings that name a model, where they are text."""


def with_models(cfg: Cfg) -> Cfg:
    """`cfg` with the model directory of every run, and of every state of one, that its settings name.

    Raises:   CheckpointError where a run or a state has none.
    """
    return cfg.model_copy(update={name: _found(name, value) for name, value in cfg})


def _found(name: str, value: Any) -> Any:
    if isinstance(value, Config):
        return with_models(value)
    if isinstance(value, dict):
        inner = {key: _found(key, item) for key, item in value.items() if isinstance(item, Config)}
        return {**value, **inner}
    named = name in NAMES and isinstance(value, str) and value not in PRESETS
    return model_of(value) if named else value


def taken(asked: Config, found: Config) -> list[str]:
    """What was taken for what, in words: of the settings that `with_models` changed."""
    pairs = zip(_places(asked), _places(found), strict=True)
    return [f"{name}={was}: {now} is taken" for (name, was), (_, now) in pairs if was != now]


def check_same_models(cfg: Config, mesh: Mesh) -> None:
    """Raise ConfigError where ranks found different models, since a run saved a state meanwhile. Collective."""
    names = "\n".join(value for _, value in _places(cfg))
    number = torch.tensor(int(hashlib.sha256(names.encode()).hexdigest()[:15], 16), device=mesh.device)
    if int(all_reduce(number, mesh, "world", "max")) != -int(all_reduce(-number, mesh, "world", "max")):
        raise ConfigError("a model that the settings name was saved anew while the ranks started; start again.")


def _places(settings: Config | Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting that may name a model, by its dotted name."""
    for name, value in dict(settings).items():
        if isinstance(value, Config | dict):
            yield from _places(value, f"{prefix}{name}.")
        elif name in NAMES and isinstance(value, str):
            yield prefix + name, value
