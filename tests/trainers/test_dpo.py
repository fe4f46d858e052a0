"""DPO as a user runs it: plain torch's gradient, log 2 at the start, any layout, after a stop, and refusals."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.batch.supervised import AnchoredPairs, PreferencePairs
from megarlhf.errors import TrainingError
from megarlhf.models.optim import OptimConfig
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import TrainableRole
from megarlhf.models.transformer import named_parameters
from megarlhf.parallel.gradients import main_grad
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import Loss
from megarlhf.runs.capsule import read_batch, read_notes
from megarlhf.trainers import dpo
from megarlhf.trainers.dpo import DPOConfig, anchored, preference_loss
from tests.helpers.models import (
    frozen,
    language_model,
    learner,
    name_of,
    ragged_rollout,
    settings,
    whole_weights,
    worst,
)
from tests.helpers.ranks import run_ranks
from tests.runs.test_capsules import replay
from tests.runs.test_resume import logged_lines, stopped_after

BETA, SMOOTHING = 0.3, 0.1
TASK = {"vocab_size": 160, "max_position_embeddings": 128}
LAYOUTS = [
    ParallelLayout(tensor=2),
    ParallelLayout(pipeline=2),
    ParallelLayout(data=2),
    pytest.param(ParallelLayout(tensor=2, data=2, sequence_parallel=True), marks=pytest.mark.slow),
]


def some_pairs() -> PreferencePairs:
    """Four pairs of ragged rows with weights that differ."""
    rows = ragged_rollout(8, seed=7)
    return PreferencePairs(rows.tokens, rows.prompt_lengths, rows.lengths, torch.tensor([1.0, 0.5, 2.0, 1.5]))


def plain_sums(model: Any, pairs: PreferencePairs) -> Tensor:
    """[2P]: log p of each response, by transformers and a loop over rows."""
    logprobs = F.log_softmax(model(input_ids=pairs.tokens).logits.double(), dim=-1)
    lengths = zip(pairs.prompt_lengths.tolist(), pairs.lengths.tolist(), strict=True)
    return torch.stack(
        [
            torch.stack([logprobs[row, at - 1, pairs.tokens[row, at]] for at in range(first, last)]).sum()
            if last > first
            else logprobs.new_zeros(())
            for row, (first, last) in enumerate(lengths)
        ]
    )


def plain_loss(policy: Any, reference: Any, pairs: PreferencePairs) -> Tensor:
    """Eq. 7 of Rafailov et al. 2023, smoothed, its mean weighted by the pairs' margins."""
    with torch.no_grad():
        ref = plain_sums(reference, pairs)
    ratio = plain_sums(policy, pairs) - ref
    logits = BETA * (ratio[0::2] - ratio[1::2])
    losses = -F.logsigmoid(logits) * (1 - SMOOTHING) - F.logsigmoid(-logits) * SMOOTHING
    return (losses * pairs.weight).sum() / pairs.weight.sum()


def gradients(role: TrainableRole, batch: AnchoredPairs, loss: Loss[AnchoredPairs]) -> tuple[float, dict[str, Tensor]]:
    """The mean loss, and its gradients under their Hugging Face names; the weights are lost."""
    with role.resident(*role.parts):
        for wrapped in role.wrapped:
            wrapped.zero_grad_buffer()
        means = role.accumulate(batch, loss, role.settings.cut)
        for _, parameter in named_parameters(role.chunks):
            gradient = main_grad(parameter)
            assert gradient is not None
            parameter.data.copy_(gradient)
        return means.loss, whole_weights(role)


def loss_and_gradients(layout: ParallelLayout, policy: str, reference: str) -> tuple[float, dict[str, Tensor]]:
    mesh = start(layout, seed=1)
    role = learner(policy, LabelLogprobs(1.0), settings(mesh, 3), mesh, OptimConfig(distributed=False))
    batch = anchored(some_pairs(), frozen(reference, LabelLogprobs(1.0), mesh).score(some_pairs()))
    cfg = DPOConfig.model_validate({"run_dir": "unused", "beta": BETA, "label_smoothing": SMOOTHING})
    return gradients(role, batch, preference_loss(role, cfg))


@pytest.mark.parametrize(
    "layout", [ParallelLayout(), ParallelLayout(tensor=2), ParallelLayout(pipeline=2)], ids=name_of
)
def test_loss_and_gradient_are_those_of_plain_torch(layout: ParallelLayout, tmp_path: Path) -> None:
    policy, reference = (language_model(tmp_path / name, seed=seed) for name, seed in (("policy", 1), ("other", 2)))
    expected = plain_loss(policy, reference, some_pairs())
    expected.backward()
    folders = str(tmp_path / "policy"), str(tmp_path / "other")
    for loss, found in run_ranks(loss_and_gradients, layout.world_size, layout, *folders):
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        plain: dict[str, Any] = {name: weight.grad for name, weight in policy.named_parameters()}
        size = max(float(gradient.abs().max()) for gradient in plain.values())
        assert size > 0.1
        assert worst(found, plain) < 1e-5 * size  # fp32 through four layers; seen 1e-6


def config(run_dir: Path, layout: ParallelLayout, model: str, **changes: Any) -> DPOConfig:
    data = {"template": "plain", "arithmetic": {"level": 1, "rows": 40}}
    return DPOConfig.model_validate(
        {
            "run_dir": run_dir,
            "layout": layout,
            "model": model,
            "tokenizer": "arithmetic",
            "pairs": {"source": "arithmetic", **data},
            "heldout": {"source": "arithmetic", "split": "heldout", **data},
            "global_batch": 8,
            "micro_batch": 2,
            "save_every": 1,
            "tensorboard": False,
            "optim": {"lr": 1e-3, "schedule": "constant"},
            **changes,
        }
    )


def run_dpo(stop: int | None, cfg: DPOConfig) -> dict[str, Tensor]:
    """Start the run, or start it again: the final weights, or none if it stops before."""
    mesh = start(cfg.layout, seed=1)
    inputs = dpo.prepare(cfg)
    assert inputs.steps >= 3
    with stopped_after(stop) if stop is not None else nullcontext():
        dpo.TRAINER.run(cfg, inputs, [], mesh)
    return {} if stop else whole_weights(frozen(str(cfg.model_dir), LabelLogprobs(1.0), mesh))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dpo")
    language_model(folder / "model", seed=4, **TASK)
    language_model(folder / "other", seed=6, **TASK)
    return str(folder / "model")


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A run on one rank: its directory and its weights."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, run_ranks(run_dpo, 1, None, config(run_dir, ParallelLayout(), model))[0]


def test_it_starts_at_log_two_and_learns(whole: tuple[Path, dict[str, Tensor]]) -> None:
    """Policy and reference are one model at first: every implicit reward is 0, to the bit."""
    steps = logged_lines(whole[0])
    assert steps[0]["dpo/loss"] == pytest.approx(math.log(2), rel=1e-7)
    rewards = ("dpo/margin_mean", "dpo/chosen_reward_mean", "dpo/rejected_reward_mean")
    assert [steps[0][name] for name in rewards] == [0.0, 0.0, 0.0]
    assert steps[0]["dpo/accuracy"] == 0.5
    assert steps[0]["dpo/grad_norm"] > 0
    assert steps[-1]["dpo/loss"] < 0.67 < math.log(2)
    assert steps[-1]["dpo/margin_mean"] > 0
    assert [row["step"] for row in steps if "dpo/heldout_accuracy" in row] == [steps[-1]["step"]]
    assert steps[-1]["dpo/heldout_accuracy"] > 0.7


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_no_layout_changes_a_run(
    layout: ParallelLayout, model: str, whole: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    found = run_ranks(run_dpo, layout.world_size, None, config(tmp_path / "run", layout, model))[0]
    assert worst(found, whole[1]) < 2e-5
    for ours, theirs in zip(logged_lines(tmp_path / "run"), logged_lines(whole[0]), strict=True):
        counted = {name: value for name, value in theirs.items() if not name.startswith("compute/")}
        assert {name: ours[name] for name in counted} == pytest.approx(counted, rel=1e-4, abs=1e-5)
        if ours["step"] == 1 and "dpo/loss" in ours:
            assert ours["dpo/margin_mean"] == 0.0


def test_a_stopped_run_goes_on_bit_for_bit(model: str, whole: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    cfg = config(tmp_path / "run", ParallelLayout(), model)
    for stop in (1, 2):
        run_ranks(run_dpo, 1, stop, cfg)
    found = run_ranks(run_dpo, 1, None, cfg)[0]
    assert logged_lines(cfg.run_dir) == logged_lines(whole[0])
    for name, weight in whole[1].items():
        assert torch.equal(found[name], weight), name


def another_reference(cfg: DPOConfig) -> list[dict[str, float]]:
    """A step against another model than the policy's start, and against that without offloading."""
    mesh = start(cfg.layout, seed=1)
    dpo.TRAINER.run(cfg, dpo.prepare(cfg), [], mesh)
    return logged_lines(cfg.run_dir)


def test_another_reference_is_kept_near_to(model: str, tmp_path: Path) -> None:
    other = model.replace("model", "other")
    rows = [
        run_ranks(another_reference, 1, config(tmp_path / offload, ParallelLayout(), model, **changes))[0]
        for offload, changes in (("host", {"reference": other}), ("none", {"reference": other, "offload": "none"}))
    ]
    assert rows[0] == rows[1]
    assert abs(rows[0][0]["dpo/chosen_reward_mean"]) > 0.1


def explode(cfg: DPOConfig) -> str:
    """A learning rate that no model survives."""
    with pytest.raises(TrainingError) as failed:
        dpo.TRAINER.run(cfg, dpo.prepare(cfg), ["dpo"], start(cfg.layout, seed=1))
    return str(failed.value)


def test_an_exploding_step_leaves_its_pairs_and_is_taken_again(model: str, tmp_path: Path) -> None:
    changes = {"optim": {"lr": 1e12}, "max_skipped_steps": 0, "save_every": 0}
    cfg = config(tmp_path / "run", ParallelLayout(data=2), model, **changes)
    run_ranks(explode, 2, cfg)
    (capsule,) = (tmp_path / "run" / "capsules").iterdir()
    notes = read_notes(capsule)
    assert [(note.kind, note.role, note.part) for note in notes] == [
        ("AnchoredPairs", "policy", 0),
        ("AnchoredPairs", "policy", 1),
    ]
    parts = [read_batch(capsule, note, AnchoredPairs) for note in notes]
    assert [len(part) for part in parts] == [4, 4]
    ((code, printed),) = run_ranks(replay, 1, str(capsule))
    assert code == 1
    assert "8 rows, weights of the failed step: the step is not finite here either" in printed


def test_weights_of_pairs_have_a_mean_of_one() -> None:
    """As in reward training, a margin weighs a pair against the others of its step, not the step against others."""
    pairs = some_pairs()
    batch = anchored(replace(pairs, weight=7 * pairs.weight), torch.zeros(pairs.labels.shape))
    torch.testing.assert_close(batch.pairs.weight, pairs.weight * (4 / 5.0))
