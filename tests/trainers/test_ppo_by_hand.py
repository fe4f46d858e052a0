"""The library's PPO step is that of examples/00_ppo_by_hand.py, tensor by tensor (invariant 10)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification

from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.by_hand import load_by_hand
from tests.helpers.models import name_of, whole_weights, worst
from tests.helpers.ranks import run_ranks
from tests.trainers.worlds import Canned, iterate, ppo_cast, ppo_config

by_hand = load_by_hand()

ROWS = 24
ACTOR_LR, CRITIC_LR = 1e-3, 3e-3
TENSORS = 1e-5
"""Log-probs, values, advantages: fp32 through two layers; seen 2e-6."""
WEIGHTS = 5e-3
"""In learning rates. Adam divides a gradient's rounding error, about 1e-8, by no less than eps = 1e-5."""
LAYOUTS = [
    ParallelLayout(),
    ParallelLayout(tensor=2),
    ParallelLayout(tensor=2, sequence_parallel=True, data=2),
    ParallelLayout(pipeline=2),
]


@dataclass(frozen=True)
class Oracle:
    """Model directories, one rollout batch, and what plain torch makes of them."""

    folder: str
    rollout: Rollout
    scores: Tensor
    report: dict[str, Tensor]
    """`ppo_step`"""
    twice: dict[str, Any]
    """Two epochs"""


def save_models(folder: Path) -> tuple[Any, Any, Any, Any]:
    """Actor, reference, critic and judge, far from uniform and from each other, under their Hugging Face names."""
    config = by_hand.tiny_llama()
    config.num_labels = 1
    config.pad_token_id = None  # an untrained policy samples it, and transformers would hold back its gradient
    actor, reference = (by_hand.LlamaForCausalLM(config) for _ in range(2))
    critic, judge = by_hand.Critic(config), LlamaForSequenceClassification(config).eval()
    with torch.no_grad():
        for model in (actor, reference):
            model.lm_head.weight.mul_(5)
        judge.score.weight.mul_(30)
    twin = LlamaForSequenceClassification(config)
    twin.load_state_dict({as_hf(name): weight for name, weight in critic.state_dict().items()})
    for name, model in (("actor", actor), ("reference", reference), ("critic", twin), ("judge", judge)):
        model.save_pretrained(folder / name)
    return actor, reference, critic, judge


def as_hf(name: str) -> str:
    """The critic's names in the example, as Hugging Face calls a scalar head."""
    return name.replace("head.weight", "score.weight") if name == "head.weight" else name


def weights_of(model: Any) -> dict[str, Tensor]:
    return {as_hf(name): weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder: Path = tmp_path_factory.mktemp("by_hand")
    torch.manual_seed(0)
    settings = by_hand.Settings(
        temperature=0.7, gamma=0.99, kl_coef=0.1, rollout_batch=ROWS, actor_lr=ACTOR_LR, critic_lr=CRITIC_LR
    )
    actor, reference, critic, judge = save_models(folder)
    rolled = by_hand.roll_out(actor, settings, torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = judge.model(input_ids=rolled.tokens, use_cache=False).last_hidden_state
        scores = judge.score(states)[torch.arange(ROWS), rolled.lengths - 1, 0]
        ref_logprobs = by_hand.token_logprobs(reference, rolled.tokens, settings.temperature)
    rolled = by_hand.Rollouts(rolled.tokens, rolled.prompt_lengths, rolled.lengths, rolled.terminated, scores)
    before = [model.state_dict() for model in (actor, critic)]
    before = [{name: weight.clone() for name, weight in state.items()} for state in before]
    report = by_hand.ppo_step(actor, critic, ref_logprobs, rolled, settings)
    for model, state in zip((actor, critic), before, strict=True):
        model.load_state_dict(state)
    rollout = Rollout(
        rolled.tokens,
        rolled.prompt_lengths,
        rolled.lengths,
        rolled.terminated,
        torch.zeros(rolled.tokens[:, 1:].shape),
        torch.arange(ROWS),
        ("",) * ROWS,
    )
    return Oracle(str(folder), rollout, scores, report, two_epochs(actor, critic, ref_logprobs, rolled, settings))


def two_epochs(actor: Any, critic: Any, ref_logprobs: Tensor, rolled: Any, settings: Any) -> dict[str, Any]:
    """The example's loop with one mini-batch: in the second pass the ratio is no longer 1."""
    experience = by_hand.estimate(actor, critic, ref_logprobs, rolled, settings)
    learners = [
        (model, by_hand.make_optimizer(model, lr, settings)) for model, lr in ((actor, ACTOR_LR), (critic, CRITIC_LR))
    ]
    losses = []
    for _ in range(2):
        losses.append(by_hand.backward(actor, critic, rolled, experience, settings))
        norms = [by_hand.update(model, optimizer, settings) for model, optimizer in learners]
    return {"losses": losses, "norms": norms, "actor": weights_of(actor), "critic": weights_of(critic)}


def step(layout: ParallelLayout, folder: str, rollout: Rollout, epochs: int) -> dict[str, Any]:
    """The library's iteration on the same rollout, and the tensors inside it."""
    mesh = start(layout, seed=1)
    optim = {"schedule": "constant", "beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "max_grad_norm": 1.0}
    cfg = ppo_config(
        Path(folder) / "run",
        layout,
        f"{folder}/actor",
        f"{folder}/judge",
        reference={"init": f"{folder}/reference"},
        actor={"init": f"{folder}/actor", "optim": {**optim, "lr": ACTOR_LR}},
        critic={"init": f"{folder}/critic", "optim": {**optim, "lr": CRITIC_LR}},
        sampling={"temperature": 0.7},
        gamma=0.99,
        kl_coef=0.1,
        value_clip_range=0.2,
        shaping={"missing_eos": -1.0},  # the page has no rule for it, only the number
        rollout_batch=ROWS,
        global_batch=ROWS,
        micro_batch=4,
        ppo_epochs=epochs,
    )
    cast = ppo_cast(cfg, mesh)
    nothing = Prompts(torch.ones(1, 1, dtype=torch.int64), torch.tensor([1]), torch.tensor([0]), ("",))
    done = iterate(replace(cast, sampler=Canned(rollout, cast.actor)), nothing, cfg)
    seen = {**done.scored._asdict(), **done.estimate._asdict()}
    del seen["rollout"]
    seen["whitened_advantages"] = seen.pop("whitened")
    return {
        "seen": seen,
        "metrics": done.metrics,
        "actor": whole_weights(cast.actor),
        "critic": whole_weights(cast.critic),
    }


def test_the_oracle_is_not_trivial(oracle: Oracle) -> None:
    """Both ends of a response occur, the policy left its reference, and the second pass is clipped."""
    assert 0 < oracle.rollout.terminated.sum() < ROWS
    mask = oracle.rollout.response_mask
    assert (oracle.report["logprobs"] - oracle.report["ref_logprobs"])[mask].abs().max() > 0.5
    assert oracle.scores.std() > 0.5
    assert oracle.twice["losses"][1]["clip_fraction"] > 0.02
    assert oracle.report["actor_grad_norm"] > 1.5  # clipped to 1
    assert oracle.report["critic_grad_norm"] > 1.5


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_one_step_is_the_examples(layout: ParallelLayout, oracle: Oracle) -> None:
    mask, report = oracle.rollout.response_mask, oracle.report
    after = {
        role: {
            as_hf(name.removeprefix(f"{role}_weight/")): weight
            for name, weight in report.items()
            if name.startswith(f"{role}_weight/")
        }
        for role in ("actor", "critic")
    }
    for rank in run_ranks(step, layout.world_size, layout, oracle.folder, oracle.rollout, 1):
        torch.testing.assert_close(rank["seen"].pop("scores"), oracle.scores, atol=TENSORS, rtol=0)
        assert len(rank["seen"]) == 7
        for name, tensor in rank["seen"].items():
            torch.testing.assert_close(tensor, report[name] * mask, atol=TENSORS, rtol=TENSORS, msg=name)
        metrics = rank["metrics"]
        assert metrics["policy/loss"] == pytest.approx(float(report["policy_loss"]), abs=1e-6)
        assert metrics["policy/clip_fraction"] == 0.0 == float(report["clip_fraction"])
        assert metrics["value/loss"] == pytest.approx(float(report["value_loss"]), rel=1e-5)
        assert metrics["policy/grad_norm"] == pytest.approx(float(report["actor_grad_norm"]), rel=1e-5)
        assert metrics["value/grad_norm"] == pytest.approx(float(report["critic_grad_norm"]), rel=1e-5)
        assert worst(rank["actor"], after["actor"]) < WEIGHTS * ACTOR_LR
        assert worst(rank["critic"], after["critic"]) < WEIGHTS * CRITIC_LR


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=name_of)
def test_two_epochs_are_the_examples(layout: ParallelLayout, oracle: Oracle) -> None:
    losses, norms = oracle.twice["losses"], oracle.twice["norms"]
    for rank in run_ranks(step, layout.world_size, layout, oracle.folder, oracle.rollout, 2):
        metrics = rank["metrics"]
        for ours, theirs in (("policy/loss", "policy_loss"), ("value/loss", "value_loss")):
            mean = sum(float(epoch[theirs]) for epoch in losses) / 2
            assert metrics[ours] == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert metrics["policy/clip_fraction"] == pytest.approx(float(losses[1]["clip_fraction"]) / 2, abs=1e-6)
        first = [float(oracle.report[f"{role}_grad_norm"]) for role in ("actor", "critic")]
        assert metrics["policy/grad_norm"] == pytest.approx((first[0] + float(norms[0])) / 2, rel=1e-4)
        assert metrics["value/grad_norm"] == pytest.approx((first[1] + float(norms[1])) / 2, rel=1e-4)
        assert worst(rank["actor"], oracle.twice["actor"]) < 2 * WEIGHTS * ACTOR_LR
        assert worst(rank["critic"], oracle.twice["critic"]) < 2 * WEIGHTS * CRITIC_LR
