"""Settings of every command that builds models: how it is split, and what it may do to the machine."""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from pydantic import Field

from megarlhf.config import Config
from megarlhf.config.base import FreeToChange
from megarlhf.models.compute import ComputeConfig
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.micro_batches import Cut, InRows, InTokens


class RanksConfig(Config):
    """Settings shared by every command that builds models."""

    seed: int = Field(default=1, ge=0)
    """Seed of all that is random: initial weights, data order, rollouts, mini-batches. The same seed, the same run."""
    layout: Annotated[ParallelLayout, FreeToChange()] = ParallelLayout()
    """Ranks along each parallel axis."""
    compute: Annotated[ComputeConfig, FreeToChange()] = ComputeConfig()
    """Number formats and implementations."""
    micro_batch: Annotated[int, FreeToChange()] = Field(default=8, ge=1)
    """Rows of one forward pass on one data rank. Bounds the memory of activations; changes no result."""
    micro_batch_tokens: Annotated[int | None, FreeToChange()] = Field(default=None, ge=1)
    """Tokens of one forward pass on one data rank, in place of micro_batch, which then says nothing: rows lie end to
    end in it without padding, and data ranks get equal work. Must hold the longest row, of pairs the longest pair.
    Changes no result. With layout.context each text is filled up to a multiple of 2 x context, which is not counted.
    null: micro_batch rows."""
    offload: Annotated[Literal["host", "none"], FreeToChange()] = "host"
    """Where a model's bytes wait while another works: host memory (pinned where there is a GPU), or where they are."""
    date: datetime.date | None = None
    """The day that a chat template is told, where it renders one (Llama 3.2's does), as YYYY-MM-DD. null: the model's
    own, of its training, or else the day of the first start."""
    timeout_s: Annotated[float, FreeToChange()] = Field(default=600.0, ge=1, le=1e7)
    """Longest wait in a collective, in seconds, before the run stops. Source: torch's default for NCCL."""

    @property
    def cut(self) -> Cut:
        """What one forward pass takes on one data rank."""
        return InRows(self.micro_batch) if self.micro_batch_tokens is None else InTokens(self.micro_batch_tokens)
