"""TRL's DPOTrainer and `megarlhf dpo` agree on loss, gradients and rewards of the same pairs.

TRL 1.16 has label_smoothing in other losses than DPO's. Conservative DPO is its DPO loss of the pairs as they are, and
with a weight of label_smoothing that of the pairs the other way round: so it is asked twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from megarlhf.batch.supervised import PreferencePairs
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers.dpo import DPOConfig, anchored, preference_loss
from tests.helpers.models import frozen, language_model, learner, ragged_rollout, settings
from tests.helpers.ranks import run_ranks
from tests.trainers.test_dpo import gradients

trl: Any = pytest.importorskip("trl", reason="TRL is not installed; it is in the set `bench`")
if not trl.__version__.startswith("1.16."):
    pytest.skip(f"holds for TRL 1.16, not {trl.__version__}", allow_module_level=True)

TOLERANCE = 1e-5
"""Of the loss, and of gradients in units of the largest: fp32 through four layers; seen 5e-8 and 2e-6."""


@dataclass(frozen=True)
class Theirs:
    """What TRL makes of the pairs."""

    loss: float
    gradients: dict[str, Tensor]
    rewards: dict[str, float]


def some_pairs() -> PreferencePairs:
    """Eight pairs of one prompt each with its two responses, of lengths that differ; TRL knows no weights."""
    rows = ragged_rollout(16, seed=11)
    prompts = rows.prompt_lengths[0::2].repeat_interleave(2)
    same = torch.arange(rows.tokens.shape[1]) < prompts[:, None]
    tokens = torch.where(same, rows.tokens[0::2].repeat_interleave(2, dim=0), rows.tokens)
    return PreferencePairs(tokens, prompts, rows.lengths.clamp(min=6), torch.ones(8))


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def by_trl(folder: Path, pairs: PreferencePairs, beta: float) -> Theirs:
    config = trl.DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=len(pairs),
        beta=beta,
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
    )
    trainer = trl.DPOTrainer(
        model=str(folder / "policy"),
        ref_model=LlamaForCausalLM.from_pretrained(folder / "reference"),
        args=config,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 8, "chosen": ["b"] * 8, "rejected": ["c"] * 8}),
        processing_class=tokenizer(),
    )
    rows = [
        (row[:prompt].tolist(), row[prompt:end].tolist())
        for row, prompt, end in zip(pairs.tokens, pairs.prompt_lengths, pairs.lengths, strict=True)
    ]
    examples = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for (prompt, chosen), (_, rejected) in zip(rows[0::2], rows[1::2], strict=True)
    ]
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
    loss.backward()
    logged = {name: float(values[-1]) for name, values in trainer._metrics["train"].items()}
    weights = {name: weight.grad for name, weight in trainer.model.named_parameters()}
    return Theirs(float(loss.detach()), weights, logged)


def smoothed(folder: Path, pairs: PreferencePairs, beta: float, label_smoothing: float) -> Theirs:
    """The mean of TRL's losses over labels that are right, and with a probability of label_smoothing wrong."""
    as_said = by_trl(folder, pairs, beta)
    if not label_smoothing:
        return as_said
    turned = torch.arange(len(pairs.lengths)).view(-1, 2).flip(1).flatten()
    swapped = replace(pairs, tokens=pairs.tokens[turned], lengths=pairs.lengths[turned])
    other = by_trl(folder, swapped, beta)
    share = (1 - label_smoothing, label_smoothing)
    return Theirs(
        share[0] * as_said.loss + share[1] * other.loss,
        {name: share[0] * x + share[1] * other.gradients[name] for name, x in as_said.gradients.items()},
        as_said.rewards,
    )


def by_us(folder: str, pairs: PreferencePairs, beta: float, label_smoothing: float) -> Any:
    """A role's loss, gradients and metrics."""
    mesh = start(ParallelLayout(), seed=1)
    cfg = DPOConfig.model_validate({"run_dir": "unused", "beta": beta, "label_smoothing": label_smoothing})
    batch = anchored(pairs, frozen(f"{folder}/reference", LabelLogprobs(1.0), mesh).score(pairs))
    optim = OptimConfig(distributed=False)
    role = learner(f"{folder}/policy", LabelLogprobs(1.0), settings(mesh, 3), mesh, optim)
    metrics = role.update(batch, preference_loss(role, cfg)).means.metrics
    role = learner(f"{folder}/policy", LabelLogprobs(1.0), settings(mesh, 3), mesh, optim)
    return *gradients(role, batch, preference_loss(role, cfg)), metrics


@pytest.mark.parametrize(("beta", "label_smoothing"), [(0.1, 0.0), (0.5, 0.0), (0.3, 0.2)])
def test_loss_gradient_and_rewards_are_trls(beta: float, label_smoothing: float, tmp_path: Path) -> None:
    for name, seed in (("policy", 1), ("reference", 2)):
        language_model(tmp_path / name, seed=seed)
    pairs = some_pairs()
    theirs = smoothed(tmp_path, pairs, beta, label_smoothing)
    loss, found, metrics = run_ranks(by_us, 1, str(tmp_path), pairs, beta, label_smoothing)[0]
    size = max(float(gradient.abs().max()) for gradient in theirs.gradients.values())
    apart = max(float((found[name] - gradient).abs().max()) for name, gradient in theirs.gradients.items())
    rewards = {
        "rewards/chosen": metrics["dpo/chosen_reward_mean"],
        "rewards/rejected": metrics["dpo/rejected_reward_mean"],
        "rewards/margins": metrics["dpo/margin_mean"],
        "rewards/accuracies": metrics["dpo/accuracy"],
    }
    print(f"loss {theirs.loss:.6f}, apart {abs(loss - theirs.loss):.1e}; gradient {size:.3g}, apart {apart:.1e}")
    assert found.keys() == theirs.gradients.keys()
    assert loss == pytest.approx(theirs.loss, rel=TOLERANCE)
    assert size > 0.1
    assert apart < TOLERANCE * size
    assert {name: theirs.rewards[name] for name in rewards} == pytest.approx(rewards, rel=TOLERANCE, abs=TOLERANCE)
