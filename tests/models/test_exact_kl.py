"""The KL over the whole vocabulary is that of transformers' distributions, on every layout; runs log it when due."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from megarlhf.batch.rollouts import Rollout
from megarlhf.models.exact_kl import exact_kl
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import Role
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers import policy_metrics
from tests.helpers.models import LAYOUTS, frozen, language_model, name_of, ragged_rollout, score_model
from tests.helpers.ranks import run_ranks
from tests.trainers.test_work import prompts
from tests.trainers.worlds import iterate, ppo_cast, ppo_config

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("exact")
    language_model(folder / "actor", seed=1)
    language_model(folder / "reference", seed=2, hidden_size=48, num_attention_heads=6, tie_word_embeddings=True)
    score_model(folder / "judge", seed=5)
    return str(folder)


def by_transformers(folder: str) -> Tensor:
    """[B, T] in fp64 of fp32 models, token by token of each row."""
    rollout = ragged_rollout()
    models = [LlamaForCausalLM.from_pretrained(f"{folder}/{name}") for name in ("actor", "reference")]
    kl = torch.zeros(rollout.labels.shape, dtype=torch.float64)
    for row, (first, last) in enumerate(zip(rollout.prompt_lengths.tolist(), rollout.lengths.tolist(), strict=True)):
        with torch.no_grad():
            p, q = (
                (model(rollout.tokens[row : row + 1, :last]).logits[0].double() / TEMPERATURE).log_softmax(-1)
                for model in models
            )
        kl[row, first - 1 : last - 1] = (p.exp() * (p - q)).sum(-1)[first - 1 : last - 1]
    return kl


def measured(layout: ParallelLayout, folder: str) -> dict[str, Any]:
    mesh = start(layout, seed=1)
    reading = LabelLogprobs(TEMPERATURE)
    actor, reference = (frozen(f"{folder}/{name}", reading, mesh) for name in ("actor", "reference"))
    for role in (actor, reference):
        role.leave()
    rollout = ragged_rollout().to(mesh.device)
    kl = exact_kl(actor, reference, rollout, temperature=TEMPERATURE)
    return {
        "kl": kl.cpu(),
        "itself": exact_kl(actor, actor, rollout, temperature=TEMPERATURE).abs().max().item(),
        "resident": actor.resident_bytes() + reference.resident_bytes(),
    }


@pytest.mark.parametrize("layout", [*LAYOUTS, ParallelLayout(data=2), ParallelLayout(context=2)], ids=name_of)
def test_it_is_that_of_transformers(layout: ParallelLayout, folder: str) -> None:
    expected = by_transformers(folder)
    for rank in run_ranks(measured, layout.world_size, layout, folder):
        torch.testing.assert_close(rank["kl"].double(), expected, rtol=1e-4, atol=1e-5)
        assert rank["itself"] == 0
        assert rank["resident"] == 0  # both went as they came
    assert expected.max() > 1


def iterations(folder: str) -> list[dict[str, float]]:
    """Three iterations, of which the first and the third measure it."""
    mesh = start(ParallelLayout(), seed=1)
    cfg = ppo_config(
        Path(folder) / "run",
        mesh.layout,
        f"{folder}/actor",
        f"{folder}/judge",
        rollout_batch=8,
        group_size=2,
        global_batch=8,
        micro_batch=4,
        exact_kl_every=2,
        sampling={"temperature": TEMPERATURE, "max_new_tokens": 12},
        shaping={"missing_eos": None},
    )
    cast = ppo_cast(cfg, mesh, 20)
    asked = []

    def noted(policy: Role, reference: Role, rows: Rollout, *, temperature: float) -> Tensor:
        asked.append((policy.name, reference.name, temperature))
        return exact_kl(policy, reference, rows, temperature=temperature)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_metrics, "exact_kl", noted)
        found = [iterate(cast, prompts(), cfg, number).metrics for number in range(3)]
    assert asked == [("actor", "reference", TEMPERATURE)] * 2
    return found


def test_runs_log_it_when_it_is_due(folder: str) -> None:
    (rows,) = run_ranks(iterations, 1, folder)
    assert ["kl/reference_exact" in row for row in rows] == [True, False, True]
    assert rows[0]["kl/reference_exact"] == pytest.approx(0, abs=1e-9)  # both have the same weights yet
    # What 8 responses estimate by k3 is of the size of what the vocabulary says exactly.
    assert 0 < rows[2]["kl/reference_exact"] < 3 * rows[2]["kl/reference_k3_mean"] < 30 * rows[2]["kl/reference_exact"]
    # It is a pass of either model more.
    assert rows[0]["compute/score_flops"] > 1.4 * (rows[1]["compute/score_flops"] - rows[0]["compute/score_flops"])
