"""Rows end to end say and learn what they do in lines of their own (invariant 5: packed equals padded)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.models import attention
from megarlhf.models.attention import CausalAttention
from megarlhf.models.exact_kl import exact_kl
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs, PositionValues, SequenceScores
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import Cut, Documents, InRows, InTokens
from megarlhf.trainers.policy_loss import policy_loss
from megarlhf.trainers.ppo import PPOConfig
from tests.helpers.models import (
    STRETCHED,
    frozen,
    language_model,
    learner,
    name_of,
    ragged_rollout,
    score_model,
    settings,
)
from tests.helpers.ranks import run_ranks
from tests.trainers.test_splits import lessons

ROWS = ragged_rollout(12)
HEADS, GROUPS, WIDTH = 4, 2, 8
LENGTHS = (7, 1, 12, 3)
LOGPROBS = 2e-5
"""As in test_transformers_agree: fp32 through four layers of weights whose logits reach 5."""
PPO = PPOConfig.model_validate({"run_dir": "unused"})


def documents(*lengths: int) -> Documents:
    return Documents.of(np.array(lengths), torch.device("cpu"), np.arange(sum(lengths)))


def qkv(seed: int = 1) -> list[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(LENGTHS), 1, heads, WIDTH, generator=draws) for heads in (HEADS, GROUPS, GROUPS)]


def by_formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[N, 1, heads * d] in fp64: each token attends to those of its own document that are not behind it."""
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(len(document))
    seen = (document[:, None] == document) & (place <= place[:, None])
    key, value = (x[:, 0].repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query[:, 0], key) / WIDTH**0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value).flatten(1)[:, None]


def varlen(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, _: Tensor, *longest: int, causal: bool) -> Tensor:
    """flash-attn's function, of which the GPU-less know the signature alone: [N, heads, d] and cumulative lengths."""
    lengths = ends.diff()
    assert causal
    assert ends.dtype == torch.int32
    assert longest == (int(lengths.max()),) * 2
    assert tuple(lengths.tolist()) == LENGTHS
    out = by_formula(*(x[:, None].double() for x in (query, key, value)))
    return out[:, 0].view(len(query), HEADS, WIDTH).to(query.dtype)


@pytest.mark.parametrize("flash", [False, True])
def test_attention_over_documents_is_its_formula_and_gradient(flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if flash:
        monkeypatch.setattr(attention, "flash_varlen", lambda query: varlen)
    core = CausalAttention(TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1))
    given = qkv()
    exact = [x.double().requires_grad_() for x in given]
    ours = [x.requires_grad_() for x in given]
    expected, found = by_formula(*exact), core(*ours, packed_seq_params=documents(*LENGTHS))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)  # seen: 3e-7
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    theirs = torch.autograd.grad(expected, exact, upstream.double())
    for mine, other in zip(torch.autograd.grad(found, ours, upstream), theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=5e-6)


def test_flash_attention_is_asked_for_on_a_gpu_alone() -> None:
    assert attention.flash_varlen(torch.zeros(1, dtype=torch.bfloat16)) is None


def read(layout: ParallelLayout, cut: Cut, language: str, scalar: str) -> dict[str, Tensor]:
    """Everything that a role reads, and what rounding alone may not change."""
    mesh = start(layout, seed=1)
    actor = learner(language, LabelLogprobs(0.7), settings(mesh, cut), mesh, OptimConfig())
    judge = frozen(scalar, SequenceScores(), mesh, cut)
    return {
        "logprobs": actor.score(ROWS),
        "scores": judge.score(ROWS),
        "values": judge.read(ROWS, PositionValues()),
        "reference": frozen(language, LabelLogprobs(0.7), mesh, cut).score(ROWS),
        "one": actor.score(ROWS.rows(slice(0, 1))),  # fewer rows than data ranks
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp("packed")
    language_model(folder / "language", seed=7, rope_parameters=STRETCHED)
    score_model(folder / "scalar", seed=8)
    return str(folder / "language"), str(folder / "scalar")


@pytest.fixture(scope="module")
def expected(models: tuple[str, str]) -> dict[str, Tensor]:
    """What transformers says of each row, which it reads alone."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    policy = LlamaForCausalLM.from_pretrained(models[0]).eval()
    judge: Any = LlamaForSequenceClassification.from_pretrained(models[1]).eval()
    found = {"logprobs": torch.zeros(12, 21), "values": torch.zeros(12, 21), "scores": torch.zeros(12)}
    with torch.no_grad():
        for row, length in enumerate(ROWS.lengths.tolist()):
            text = ROWS.tokens[row : row + 1, :length]
            logprobs = (policy(input_ids=text).logits[0, :-1] / 0.7).log_softmax(-1)
            states = judge.model(input_ids=text).last_hidden_state[0]
            found["logprobs"][row, : length - 1] = logprobs.gather(1, text[0, 1:, None])[:, 0]
            found["values"][row, : length - 1] = judge.score(states[:-1])[:, 0]
            found["scores"][row] = judge.score(states[-1])[0]
    for name in ("logprobs", "values"):
        found[name] *= ROWS.response_mask
    return {**found, "reference": found["logprobs"], "one": found["logprobs"][:1]}


@pytest.mark.parametrize(
    ("layout", "budget"),
    [
        (ParallelLayout(), 22),
        (ParallelLayout(), 1000),
        (ParallelLayout(tensor=2, sequence_parallel=True), 46),
        (ParallelLayout(pipeline=2), 64),
        (ParallelLayout(pipeline=2, virtual_pipeline=2), 46),
        (ParallelLayout(data=2), 46),
        (ParallelLayout(context=2), 46),
    ],
    ids=lambda value: name_of(value) if isinstance(value, ParallelLayout) else str(value),
)
def test_a_pack_reads_what_transformers_reads_of_each_row(
    layout: ParallelLayout, budget: int, models: tuple[str, str], expected: dict[str, Tensor]
) -> None:
    for rank in run_ranks(read, layout.world_size, layout, InTokens(budget), *models):
        for name, found in rank.items():
            torch.testing.assert_close(found, expected[name], atol=LOGPROBS, rtol=0, msg=f"{name}: {found}")
        assert torch.equal(rank["logprobs"], rank["reference"])  # the same weights, in other memory


def refill_and_learn(language: str) -> dict[str, list[Tensor]]:
    """What is read and learnt of the rows, and of the same with other padding."""
    mesh = start(ParallelLayout(), seed=1)
    wide = ROWS.padded_to(40)
    noise = torch.randint(1, 131, wide.tokens.shape, generator=torch.Generator().manual_seed(3))
    padding = torch.arange(41) >= wide.lengths[:, None]
    refilled = Rollout(**{**vars(wide), "tokens": torch.where(padding, noise, wide.tokens)})
    role = frozen(language, LabelLogprobs(1.0), mesh, InTokens(64))
    return {"logprobs": [role.score(rows)[:, :21] for rows in (ROWS, refilled)]}


def test_padding_is_not_packed(models: tuple[str, str]) -> None:
    (found,) = run_ranks(refill_and_learn, 1, models[0])
    plain, padded = found["logprobs"]
    assert torch.equal(plain, padded)


def first_pass(language: str) -> dict[str, float]:
    mesh = start(ParallelLayout(), seed=1)
    reading = LabelLogprobs(PPO.sampling.temperature)
    role = learner(language, reading, settings(mesh, InTokens(46)), mesh, OptimConfig())
    given, _ = lessons(0)
    fresh = type(given)(given.rollout, role.score(given.rollout), given.advantages)
    return role.update(fresh, policy_loss(role, PPO)).means.metrics


def test_the_first_pass_over_a_pack_that_was_scored_has_ratio_one_to_the_bit(models: tuple[str, str]) -> None:
    (means,) = run_ranks(first_pass, 1, models[0])
    assert (means["ratio"], means["approx_kl"], means["clip_fraction"]) == (1.0, 0.0, 0.0)


def rows_of_mlps(language: str, cut: Cut) -> list[int]:
    """How many tokens each layer's MLP computes while the rows are scored."""
    mesh = start(ParallelLayout(), seed=1)
    role = frozen(language, LabelLogprobs(1.0), mesh, cut)
    seen: list[int] = [0] * role.spec.layers

    def counting(layer: int) -> Any:
        def count(_: MLP, inputs: tuple[Tensor, ...]) -> None:
            seen[layer] += inputs[0].shape[0] * inputs[0].shape[1]

        return count

    layers: Any = role.model.decoder.layers
    for number, layer in enumerate(layers):
        layer.mlp.register_forward_pre_hook(counting(number))
    role.score(ROWS)
    return seen


def test_a_pack_computes_its_tokens_and_in_the_last_layer_those_that_are_read(models: tuple[str, str]) -> None:
    tokens, read_of = int((ROWS.lengths - 1).sum()), int(ROWS.response_mask.sum())
    assert read_of < tokens
    for budget in (22, 1000):
        assert run_ranks(rows_of_mlps, 1, models[0], InTokens(budget)) == [[tokens] * 3 + [read_of]]
    (padded,) = run_ranks(rows_of_mlps, 1, models[0], InRows(4))
    assert padded[0] > tokens


def two_rows() -> Rollout:
    """One is longer, of the other more is read: which costs more depends on the model."""
    tokens = torch.randint(1, 131, (2, 21), generator=torch.Generator().manual_seed(5))
    tokens[1, 20] = 0
    both = torch.arange(2)
    lengths, prompts = torch.tensor([21, 20]), torch.tensor([20, 2])
    return Rollout(tokens, prompts, lengths, both > 2, torch.zeros(2, 20), both, ("", ""))


def kl_of_unlike_models(policy: str, reference: str, cut: Cut) -> Tensor:
    mesh = start(ParallelLayout(data=2), seed=1)
    actor = learner(policy, LabelLogprobs(1.0), settings(mesh, cut), mesh, OptimConfig())
    return exact_kl(actor, frozen(reference, LabelLogprobs(1.0), mesh, cut), two_rows(), temperature=1.0)


def test_a_reference_of_another_size_gets_the_rows_that_its_policy_had(models: tuple[str, str], tmp_path: Path) -> None:
    """The layers of the deeper one cost more beside the projection: by its own costs it would be dealt other rows."""
    language_model(tmp_path / "deep", seed=3, num_hidden_layers=6, head_dim=64, intermediate_size=16)
    padded, packed = (
        run_ranks(kl_of_unlike_models, 2, models[0], str(tmp_path / "deep"), cut) for cut in (InRows(3), InTokens(46))
    )
    assert padded[0].max() > 0.5
    for rank in packed:
        torch.testing.assert_close(rank, padded[0], atol=1e-4, rtol=1e-4)


def test_documents_are_what_megatron_and_transformer_engine_call_packed() -> None:
    made = documents(*LENGTHS)
    assert isinstance(made, PackedSeqParams)
    assert made.positions.tolist() == [t for length in LENGTHS for t in range(length)]
    assert made.cu_seqlens_kv.tolist() == [0, 7, 8, 20, 23]
