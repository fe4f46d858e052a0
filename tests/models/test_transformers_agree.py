"""Random-weight Hugging Face Llamas, loaded into every layout, say what transformers says."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.models.readings import LabelLogprobs, PositionValues, SequenceScores
from megarlhf.models.transformer import LlamaModel
from megarlhf.parallel.collectives import gather
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import Mesh, start
from megarlhf.parallel.micro_batches import States
from tests.helpers.models import LAYOUTS, STRETCHED, frozen, language_model, name_of, ragged_rollout, score_model
from tests.helpers.ranks import run_ranks

LOGITS = 1e-4
"""fp32 through four layers of weights whose logits reach 5; seen: 4e-6."""
LOGPROBS = 2e-5
ROLLOUT = ragged_rollout()
TEMPERATURE = 0.7
SHARED = [ParallelLayout(context=3), ParallelLayout(context=2, tensor=2, sequence_parallel=True)]
"""A sequence is shared too; of 22 tokens three ranks make six chunks of four."""
MICRO_BATCH = 3
"""Does not divide the 8 rows: the last micro-batch is short, or filled up between interleaved stages."""


@dataclass
class VocabLogits:
    """A reading that keeps the whole logits of every row, put together from the tensor ranks' columns."""

    mesh: Mesh
    seen: dict[int, Tensor] = field(default_factory=dict)

    def at(self, rows: Rollout) -> Tensor:
        return torch.arange(rows.tokens.shape[1]) < (rows.lengths - 1)[:, None]

    def __call__(self, model: LlamaModel, states: States, rows: Rollout) -> Tensor:
        local = states.hidden @ model.vocab_weight.t()
        columns = gather(local.t().contiguous(), self.mesh, "tensor").t()[:, : model.spec.vocab_size]
        for row, prompt in enumerate(rows.prompt_ids.tolist()):
            self.seen[prompt] = columns[states.row == row]
        return columns[:, 0]

    def scores(self, numbers: Tensor, rows: Rollout) -> Tensor:
        return numbers


def read(layout: ParallelLayout, language: list[str], scored: str) -> dict[str, Any]:
    """Everything a role can read off each model, in this layout."""
    mesh = start(layout, seed=1)
    logits, logprobs = [], []
    for directory in language:
        role = frozen(directory, LabelLogprobs(TEMPERATURE), mesh, MICRO_BATCH)
        logprobs.append(role.score(ROLLOUT))
        role.reading = VocabLogits(mesh)
        role.score(ROLLOUT)
        logits.append(role.reading.seen)
    scores = frozen(scored, SequenceScores(), mesh, MICRO_BATCH)
    result = {"logits": logits, "logprobs": logprobs, "scores": scores.score(ROLLOUT)}
    scores.reading = SequenceScores(offset=0.5, scale=2.0)
    result["standardised"] = scores.score(ROLLOUT)
    scores.reading = PositionValues()
    return {**result, "values": scores.score(ROLLOUT)}


@dataclass(frozen=True)
class Oracle:
    """The directories, and what transformers reads off them."""

    language: list[str]
    scored: str
    logits: list[Tensor]
    """[B, T, V] per model"""
    scores: Tensor
    """[B]"""
    values: Tensor
    """[B, T]"""


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder: Path = tmp_path_factory.mktemp("llamas")
    variants: dict[str, dict] = {
        "stretched": {"rope_parameters": STRETCHED},
        "tied": {"tie_word_embeddings": True, "vocab_size": 131, "num_key_value_heads": 4},
        "wide_heads": {"head_dim": 16, "rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 5e5}},
    }
    models = [language_model(folder / name, seed=i, **changes) for i, (name, changes) in enumerate(variants.items())]
    judge = score_model(folder / "judge", rope_parameters=STRETCHED)
    with torch.no_grad():
        logits = [model(input_ids=ROLLOUT.inputs, use_cache=False).logits for model in models]
        scores = judge(input_ids=ROLLOUT.tokens, use_cache=False).logits[:, 0]
        values = judge.score(judge.model(input_ids=ROLLOUT.inputs, use_cache=False).last_hidden_state)[..., 0]
    return Oracle([str(folder / name) for name in variants], str(folder / "judge"), logits, scores, values)


@pytest.mark.parametrize("layout", [*LAYOUTS, *SHARED], ids=name_of)
def test_every_layout_reads_what_transformers_reads(layout: ParallelLayout, oracle: Oracle) -> None:
    ranks = run_ranks(read, layout.world_size, layout, oracle.language, oracle.scored)
    mask = ROLLOUT.response_mask
    assert max(float(logits.abs().max()) for logits in oracle.logits) > 2  # far from uniform
    for rank in ranks:
        for index, logits in enumerate(oracle.logits):
            for row, seen in rank["logits"][index].items():
                torch.testing.assert_close(seen, logits[row, : len(seen)], atol=LOGITS, rtol=0)
            labels = (logits / TEMPERATURE).log_softmax(-1).gather(-1, ROLLOUT.labels[..., None])[..., 0]
            torch.testing.assert_close(rank["logprobs"][index], labels * mask, atol=LOGPROBS, rtol=0)
        torch.testing.assert_close(rank["scores"], oracle.scores, atol=LOGPROBS, rtol=0)
        torch.testing.assert_close(rank["standardised"], (oracle.scores - 0.5) / 2, atol=LOGPROBS, rtol=0)
        torch.testing.assert_close(rank["values"], oracle.values * mask, atol=LOGPROBS, rtol=0)
    # The last stage, and nobody else, has seen every row.
    readers = [rank for rank in ranks if rank["logits"][0]]
    assert len(readers) == layout.tensor * layout.context
    assert all(len(seen) == len(ROLLOUT) for rank in readers for seen in rank["logits"])
