"""Settings of a role of a policy's run: where its model starts, and how it learns."""

from __future__ import annotations

from megarlhf.config import Config
from megarlhf.models.lora import LoraConfig
from megarlhf.models.optim import OptimConfig


class LearnerConfig(Config):
    """A role that learns."""

    init: str = ""
    """Where its weights start: a Hugging Face or megarlhf directory, or a preset drawn from `seed`. The actor needs
    one; empty for a critic means that of the reward model."""
    optim: OptimConfig = OptimConfig()
    """Its optimiser."""
    lora: LoraConfig | None = None
    """Low-rank adapters that learn in place of its own weights, which stay as they are; null: all its weights learn."""


class FrozenConfig(Config):
    """A role that is only read."""

    init: str = ""
    """Its weights: a Hugging Face or megarlhf directory, or a preset drawn from `seed`. Empty for the reference means
    the actor's start, for the reward model that there is none."""
