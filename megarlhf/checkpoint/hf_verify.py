"""Logits of transformers and of our own model, from the two directories of a conversion."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarlhf.batch.base import TokenRows
from megarlhf.batch.supervised import LabelledResponses
from megarlhf.checkpoint.model_directory import describe_model, load_model
from megarlhf.errors import CheckpointError
from megarlhf.models.compute import ComputeConfig, resolve
from megarlhf.models.role import FrozenRole, RoleSettings
from megarlhf.models.transformer import LlamaModel
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start, stop
from megarlhf.parallel.micro_batches import InRows, States

RELATIVE_GAP = 1e-3
"""Allowed gap, in multiples of the largest logit. Both sides compute in fp32, and rounding over 126 layers stays
below; tiny models show 1e-6, and one head in the wrong place 0.1 and more."""
ROWS, TOKENS = 2, 16


@dataclass(frozen=True)
class Gap:
    """The largest difference between two models' logits (a reward model's: scores), and how large it may be."""

    largest: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether it is in bounds; a NaN is not."""
        return self.largest <= self.bound


def compare_logits(hugging_face: Path, model: Path, dtype: torch.dtype | None = None) -> Gap:
    """Run both models on the same tokens, in fp32, one after the other.

    dtype: the type that a conversion rounded weights to. Those of both sides are, so that the bound need not allow for
    the rounding, and a weight in the wrong place shows as it does without.

    Memory:   the larger of the two, whole, in fp32. Ranks: this process alone, which must not have a mesh.
    Raises:   CheckpointError when either cannot be loaded.
    """
    spec = describe_model(str(model.absolute())).spec
    generator = torch.Generator().manual_seed(0)
    # Token 0 is left out: it often pads, and transformers looks for the end of a row by its padding.
    tokens = torch.randint(1, spec.vocab_size, (ROWS, min(TOKENS, spec.max_positions)), generator=generator)
    theirs = hf_logits(hugging_face, tokens, dtype)
    ours = _ours(model, tokens, dtype)
    return Gap(float((ours - theirs).abs().max()), RELATIVE_GAP * float(theirs.abs().max()))


@dataclass
class _Everything:
    """A reading that keeps what the head says at every position, and returns nothing of use."""

    seen: list[Tensor] = field(default_factory=list)

    def at(self, rows: TokenRows) -> Tensor:
        return torch.ones_like(rows.tokens, dtype=torch.bool)

    def __call__(self, model: LlamaModel, states: States, rows: TokenRows) -> Tensor:
        if model.head == "scalar":
            said = model.scalars(states.hidden)[:, None]
        else:
            said = (states.hidden @ model.vocab_weight.t())[:, : model.spec.vocab_size]
        self.seen.append(said.view(*rows.tokens.shape, -1))
        return said[:, 0].float()

    def scores(self, numbers: Tensor, rows: TokenRows) -> Tensor:
        return numbers


def _ours(directory: Path, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
    """[B, T, V], or [B, T, 1] of a reward model."""
    found = describe_model(str(directory.absolute()))
    mesh = start(ParallelLayout(), seed=0)
    try:
        compute = resolve(ComputeConfig(dtype="float32", layers="local"), mesh.device)
        settings = RoleSettings(compute=compute, cut=InRows(len(tokens)), offload="none")
        reading = _Everything()
        role = FrozenRole("converted model", found.spec, found.head, reading, settings, mesh)
        load_model(role, str(directory.absolute()), seed=0)
        _round((parameter for chunk in role.chunks for parameter in chunk.parameters()), dtype)
        rows, width = tokens.shape
        full = torch.full((rows,), width)
        batch = LabelledResponses(tokens, full, torch.zeros(rows), torch.zeros(rows))
        with torch.no_grad():
            role.score(batch)
        return torch.cat(reading.seen).cpu()
    finally:
        stop()


def _round(parameters: Iterable[Tensor], dtype: torch.dtype | None) -> None:
    with torch.no_grad():
        for parameter in parameters if dtype else ():
            parameter.copy_(parameter.to(dtype))


def hf_logits(directory: Path, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What transformers makes of tokens [B, T], in fp32: [B, T, V], or [B, T, 1] of a reward model.

    dtype: what its weights are rounded to before.

    Raises:   CheckpointError when it cannot load all of the directory.
    """
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    scalar = describe_model(str(directory.absolute())).head == "scalar"
    kind: Any = LlamaForSequenceClassification if scalar else LlamaForCausalLM
    try:
        # Never `trust_remote_code`; these classes would not look for code either.
        model, loading = kind.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: transformers cannot load it; {error}.") from error
    if loading["missing_keys"] or loading["unexpected_keys"]:
        raise CheckpointError(f"{directory}: transformers cannot load all of it; it reports {loading}.")
    _round(model.parameters(), dtype)
    model.eval()
    with torch.no_grad():
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        return (model.score if scalar else model.lm_head)(hidden)
