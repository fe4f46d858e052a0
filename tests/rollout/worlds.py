"""What the rollout tests run on real ranks: a tiny actor, and prompts of unequal length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.checkpoint.hf_files import SafetensorsDirectory
from megarlhf.checkpoint.hf_load import TensorSource, load_tensors
from megarlhf.checkpoint.random_weights import RandomTensors
from megarlhf.models.compute import ComputeConfig, resolve
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole, Role, RoleSettings
from megarlhf.models.spec import ModelSpec
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import InRows
from megarlhf.rollout.engine import RolloutEngine
from megarlhf.rollout.sampling import RolloutConfig

SPEC = ModelSpec(
    vocab_size=61, hidden_size=64, layers=4, heads=4, kv_heads=2, ffn_size=96, head_dim=16, max_positions=64
)
"""61 is odd: two tensor ranks pad the vocabulary."""
EOS, PAD = 3, 0


class Sharp:
    """Random weights with a vocabulary projection large enough for distributions far from uniform."""

    def __init__(self, source: TensorSource, projection: str = "lm_head.weight") -> None:
        self.source = source
        self.projection = projection

    def tensor(self, name: str) -> torch.Tensor:
        return self.source.tensor(name) * (20.0 if name == self.projection else 1.0)


def random_weights(spec: ModelSpec, seed: int = 5) -> Sharp:
    """The same in every layout."""
    return Sharp(RandomTensors(spec, seed), "model.embed_tokens.weight" if spec.tie_embeddings else "lm_head.weight")


def actor(
    layout: ParallelLayout,
    *,
    temperature: float = 1.0,
    directory: Path | None = None,
    kind: type[Role] = FrozenRole,
    spec: ModelSpec = SPEC,
) -> Role:
    """A model on a fresh mesh: the one in `directory`, or the same random one in every layout."""
    mesh = start(layout, seed=1)
    settings = RoleSettings(compute=resolve(ComputeConfig(), mesh.device), cut=InRows(64), offload="none")
    role = kind("actor", spec, "language", LabelLogprobs(temperature), settings, mesh)
    load_tensors(role, SafetensorsDirectory(directory, spec, "language") if directory else random_weights(spec))
    return role


def engine(role: Role, *, eos_ids: Sequence[int] = (EOS,), max_requests: int = 512) -> RolloutEngine:
    return RolloutEngine(
        role, eos_ids=eos_ids, pad_id=PAD, max_sequence_length=40, settings=RolloutConfig(rows=max_requests)
    )


def prompts(count: int = 5) -> Prompts:
    """Prompts of 1, 4, 7, ... tokens, ids 100, 101, ..."""
    lengths = torch.arange(count) * 3 % 16 + 1
    tokens = torch.randint(4, SPEC.vocab_size, (count, int(lengths.max())), generator=torch.Generator().manual_seed(2))
    tokens[torch.arange(tokens.shape[1]) >= lengths[:, None]] = PAD
    return Prompts(tokens, lengths, 100 + torch.arange(count), tuple("abcdefghijklmnopqrstuvwxyz"[:count]))


def as_tensors(rollout: Rollout) -> tuple[torch.Tensor, ...]:
    return rollout.tokens, rollout.lengths, rollout.terminated, rollout.sampler_logprobs


def nested() -> Prompts:
    """Of three texts several beginnings each, in any order, one of them a token long and one there twice."""
    text = torch.randint(4, SPEC.vocab_size, (3, 13), generator=torch.Generator().manual_seed(3))
    of_text = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    lengths = torch.tensor([2, 5, 5, 13, 9, 4, 8, 12, 1, 6])
    tokens = torch.where(torch.arange(13) < lengths[:, None], text[of_text], PAD)
    return Prompts(tokens, lengths, 200 + torch.arange(10), ("",) * 10)
