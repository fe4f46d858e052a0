"""What an iteration of a run does, in numbers: a trainer says it of its settings, `megarlhf plan` counts with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from megarlhf.models.activations import Arithmetic, Reads, Tokens
from megarlhf.models.lora import LoraConfig
from megarlhf.models.memory_plan import Head
from megarlhf.models.recompute import Recompute
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.micro_batches import Cut, InRows, sequence_multiple


@dataclass(frozen=True)
class RoleWork:
    """A model of a run, and what it does in an iteration."""

    name: str
    setting: str
    """That says where it starts."""
    init: str
    head: Head
    learns: bool = False
    distributed: bool = True
    """Its optimiser state is shared by the data ranks."""
    scores: int = 0
    """Forward passes over an iteration's rows, before anything is learnt."""
    loss: Reads = "composed"
    lora: LoraConfig | None = None
    """Adapters that learn in place of its weights."""
    beside: str = ""
    """The role whose weights it reads, its adapters off: it has none of its own."""

    @property
    def passes(self) -> int:
        """Forward passes' worth of products that learning from rows once takes: frozen weights get no gradient."""
        return 3 if self.lora is None else 2


class Overlap(NamedTuple):
    """What travels beside products, as `compute.overlap_*` say."""

    gradients: bool = False
    """A step's gradients are summed while its last micro-batch's backward makes the others."""
    weights: bool = False
    """A step's new weights are gathered while the next step's first forward uses the others."""


APART = Overlap()
"""Nothing does."""


class Drawing(NamedTuple):
    """What is drawn in an iteration, by the first role."""

    prompts: int
    """That are prefilled, over all data ranks."""
    rows: int
    """Decoded at once on one data rank, at most."""
    memory_share: float
    """Of a GPU's free memory, for the cache."""
    prefill_tokens: int
    """In one step, at most."""
    graphs: bool
    """Decode steps are captured."""
    keep: bool
    """Cache and copy stay from rollout to rollout."""
    elsewhere: ParallelLayout | None = None
    """The layout that the run draws in, from a copy of the weights; None: that of training."""


@dataclass(frozen=True)
class Workload:
    """An iteration of a run: of a trainer that draws nothing, an optimiser step. Every row has its greatest length."""

    roles: tuple[RoleWork, ...]
    prompt_tokens: int
    response_tokens: int
    """That are learnt from."""
    rows: int
    """Of an iteration, over all data ranks: what micro-batches count."""
    step_rows: int
    """Of an optimiser step."""
    step_setting: str
    """That says so."""
    passes: int = 1
    """Over an iteration's rows."""
    sequences: int = 1
    """In a row: a pair has two."""
    drawing: Drawing | None = None

    @property
    def width(self) -> int:
        """Tokens of a sequence."""
        return self.prompt_tokens + self.response_tokens

    @property
    def elsewhere(self) -> ParallelLayout | None:
        """As `Drawing` has it."""
        return None if self.drawing is None else self.drawing.elsewhere

    def tokens(self, role: RoleWork, rows: int) -> Tokens:
        """Of so many rows. Their last token predicts nothing; a scalar head is read as often as a language model."""
        sequences = rows * self.sequences
        return Tokens(sequences * (self.width - (role.head == "language")), sequences * self.response_tokens)


@dataclass(frozen=True)
class Split:
    """How a run is cut and what it does about memory: what a planner may choose."""

    layout: ParallelLayout
    cut: Cut
    """What one forward takes on one data rank."""
    recompute: Recompute
    offload: bool
    """A model's bytes wait on the host while another works."""
    elsewhere: ParallelLayout | None = None
    """In which a copy of the weights is drawn from, tensor x data alone; None: drawn from are those that learn."""

    @property
    def drawing(self) -> ParallelLayout:
        """In which rollouts are drawn."""
        return self.layout.drawing if self.elsewhere is None else self.elsewhere

    @property
    def counted(self) -> str:
        """The setting that says `cut`."""
        return "micro_batch" if isinstance(self.cut, InRows) else "micro_batch_tokens"

    @property
    def count(self) -> int:
        """Its value: rows, or tokens."""
        return self.cut[0]


@dataclass(frozen=True)
class Job:
    """A workload of models whose sizes are known, split, in some arithmetic."""

    work: Workload
    specs: Mapping[str, ModelSpec]
    """Of each role."""
    split: Split
    arithmetic: Arithmetic
    fp8_multiple: int = 1
    """Of sides of products in FP8; 1 without."""
    overlap: Overlap = APART

    @property
    def fp8(self) -> bool:
        """Whether layers multiply in FP8."""
        return self.fp8_multiple > 1

    def together(self, role: RoleWork) -> int:
        """Rows of the greatest length in a micro-batch: of a budget of tokens, as many as it holds."""
        cut = self.split.cut
        return cut.rows if isinstance(cut, InRows) else max(1, cut.tokens // self.work.tokens(role, 1).computed)

    def micro_batches(self, role: RoleWork, rows: int) -> float:
        """Of so many rows over all data ranks, on each; what is left of a whole one is a part of one.

        Packs that interleaved stages take are as many for each stage, and all of one length.
        """
        layout = self.split.layout
        parts = rows / layout.data / self.together(role)
        if isinstance(self.split.cut, InRows) or layout.virtual_pipeline == 1:
            return parts
        return math.ceil(parts / layout.pipeline) * layout.pipeline

    def fullest(self, role: RoleWork, rows: int) -> Tokens:
        """Of so many rows over all data ranks, the micro-batch that takes most.

        A budget of tokens is taken whole by rows of the right lengths, of which as great a part is read as of the
        longest. It is padded as the layout and FP8 want it, and context ranks fill up each text in it.
        """
        cut, layout, one = self.split.cut, self.split.layout, self.work.tokens(role, 1)
        if isinstance(cut, InRows):
            return self.work.tokens(role, cut.rows)
        here, text = math.ceil(rows / layout.data), one.computed // self.work.sequences
        chunks = 2 * layout.context if layout.context > 1 else 1
        filled = min(here, self.together(role)) * self.work.sequences * (text + -text % chunks)
        most = max(min(cut.tokens, here * one.computed), filled)
        computed = most + -most % sequence_multiple(1, layout, self.fp8_multiple)
        return Tokens(computed, round(computed * one.read / one.computed))

    def splitting(self, split: Split) -> Job:
        """The same, split otherwise."""
        arithmetic = replace(self.arithmetic, recompute=split.recompute)
        return replace(self, split=split, arithmetic=arithmetic)
