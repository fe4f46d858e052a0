"""Steps of the pages without a critic are those of examples/01_grpo_by_hand.py, tensor by tensor (invariant 10)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.judges.panel import Panel
from megarlhf.observe.clock import Clock
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runs.guard import StepGuard
from megarlhf.runtime.checks import Model
from megarlhf.trainers import cispo, dapo, dr_grpo, grpo, gspo, reinforce, rloo
from megarlhf.trainers.policy_config import PolicyInputs
from megarlhf.trainers.policy_loop import Turn
from tests.helpers.by_hand import load_by_hand
from tests.helpers.models import name_of, whole_weights, worst
from tests.helpers.ranks import run_ranks
from tests.trainers.test_critic_free import Sampler, Says, prompts_of
from tests.trainers.worlds import NO_PROMPTS, build_tiny_tokenizer, no_more, words

by_hand = load_by_hand("01_grpo_by_hand")

ROWS, GROUP, LR = 24, 4, 1e-3
TENSORS = 1e-5
"""Log-probs and advantages: fp32 through two layers."""
WEIGHTS = 5e-3
"""In learning rates. Adam divides a gradient's rounding error, about 1e-8, by no less than eps = 1e-5."""
PAGES: dict[str, Any] = {
    "grpo": (grpo, grpo.grpo_iteration),
    "dr_grpo": (dr_grpo, grpo.grpo_iteration),
    "rloo": (rloo, rloo.rloo_iteration),
    "reinforce": (reinforce, reinforce.reinforce_iteration),
    "dapo": (dapo, dapo.dapo_iteration),
    "gspo": (gspo, grpo.grpo_iteration),
    "cispo": (cispo, grpo.grpo_iteration),
}
MASKED = {"rule": "mask", "low": 0.8, "high": 1.25}


@dataclass(frozen=True)
class Case:
    """One algorithm twice: its settings in the example, and those of the library that are not its defaults."""

    trainer: str
    by_hand: dict[str, Any]
    own: dict[str, Any]


CASES = {
    "grpo": Case("grpo", {"kl_coef": 0.04}, {}),
    "grpo, every choice": Case(
        "grpo",
        {"kl_coef": 0.2, "kl_estimator": "k1", "std_correction": 0, "std_eps": 1e-4, "loss_mean": "sequence"}
        | {"clip_low": 0.1, "clip_high": 0.3, "dual_clip": 1.2}
        | {"correction": "mask", "correction_low": 0.8, "correction_high": 1.25},
        {"kl_coef": 0.2, "kl_estimator": "k1", "group_std": {"correction": 0, "eps": 1e-4}, "loss_mean": "sequence"}
        | {"clip_range": 0.1, "clip_range_high": 0.3, "dual_clip": 1.2, "sampler_correction": MASKED},
    ),
    "dr_grpo": Case("dr_grpo", {"advantage": "dr_grpo", "loss_mean": "constant", "kl_coef": 0.0}, {}),
    "rloo": Case("rloo", {"advantage": "rloo", "kl_estimator": "k1", "kl_place": "reward", "kl_coef": 0.05}, {}),
    "reinforce": Case(
        "reinforce",
        {"advantage": "reinforce", "kl_estimator": "k1", "kl_place": "reward", "kl_coef": 0.01, "gamma": 0.9},
        {"gamma": 0.9},
    ),
    "reinforce, baseline": Case(
        "reinforce",
        {"advantage": "reinforce_baseline", "kl_estimator": "k2", "kl_coef": 0.3},
        {"baseline": "group", "kl_estimator": "k2", "kl_in": "loss", "kl_coef": 0.3},
    ),
    "dapo": Case("dapo", {"clip_high": 0.28, "kl_coef": 0.0}, {"max_draws": 1}),
    "gspo": Case(
        "gspo",
        {"ratio": "sequence", "loss_mean": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.1},
        {"kl_coef": 0.1},
    ),
    "cispo": Case(
        "cispo", {"surrogate": "cispo", "clip_low": 1.0, "clip_high": 0.1, "kl_coef": 0.0}, {"clip_range_high": 0.1}
    ),
}
ON_RANKS = ["grpo, every choice", "reinforce", "gspo"]
"""What has to agree about whole responses, or about the whole batch."""
LAYOUTS = [ParallelLayout(tensor=2, sequence_parallel=True), ParallelLayout(pipeline=2), ParallelLayout(data=2)]


@dataclass(frozen=True)
class World:
    """Model directories and a rollout batch."""

    folder: str
    rollout: Rollout
    rolled: Any
    """As the example has it."""
    actor: Any
    ref_logprobs: Tensor


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder: Path = tmp_path_factory.mktemp("grpo_by_hand")
    torch.manual_seed(0)
    config = by_hand.tiny_llama()
    config.pad_token_id = None  # an untrained policy samples it, and transformers would hold back its gradient
    actor, reference = (by_hand.LlamaForCausalLM(config) for _ in range(2))
    with torch.no_grad():
        for model in (actor, reference):
            model.lm_head.weight.mul_(5)
    actor.save_pretrained(folder / "actor")
    reference.save_pretrained(folder / "reference")
    generator = torch.Generator().manual_seed(3)
    settings = by_hand.Settings(rollout_batch=ROWS, group_size=GROUP, temperature=0.7)
    rolled = by_hand.roll_out(actor, settings, generator)
    # A sampler with a mind of its own, scores that are equal in the first group, and no rule's in the others.
    noise = 0.2 * torch.randn(rolled.sampler_logprobs.shape, generator=generator) * rolled.response_mask
    scores = torch.randn(ROWS, generator=generator)
    scores[:GROUP] = 0.3
    rolled = replace(rolled, sampler_logprobs=rolled.sampler_logprobs + noise, scores=scores)
    with torch.no_grad():
        ref_logprobs = by_hand.token_logprobs(reference, rolled.tokens, 0.7)
    ids, answers = torch.arange(ROWS), ("",) * ROWS
    given = (rolled.tokens, rolled.prompt_lengths, rolled.lengths, rolled.terminated, rolled.sampler_logprobs)
    return World(str(folder), Rollout(*given, ids, answers), rolled, actor, ref_logprobs)


def expected(world: World, case: Case) -> dict[str, Any]:
    """Two passes of the example with one optimiser over all rows, and what they start from."""
    settings = by_hand.Settings(
        **{"rollout_batch": ROWS, "group_size": GROUP, "temperature": 0.7, "lr": LR, **case.by_hand}
    )
    actor = by_hand.LlamaForCausalLM.from_pretrained(f"{world.folder}/actor")
    experience = by_hand.estimate(actor, world.ref_logprobs, world.rolled, settings)
    optimizer = by_hand.make_optimizer(actor, LR, settings)
    losses, norms = [], []
    for _ in range(2):
        losses.append(by_hand.backward(actor, world.rolled.tokens, experience, settings))
        norms.append(float(by_hand.update(actor, optimizer, settings)))
    weights = {name: weight.detach().clone() for name, weight in actor.named_parameters()}
    return {"experience": experience, "losses": losses, "norms": norms, "weights": weights}


def told(scores: Tensor, rollout: Rollout) -> Tensor:
    """The scores of rows by their ids, in whatever order they come."""
    return scores[rollout.prompt_ids.cpu()]


def step(layout: ParallelLayout, folder: str, rollout: Rollout, scores: Tensor, case: Case) -> dict[str, Any]:
    """The library's iteration on the same rollout and scores."""
    mesh = start(layout, seed=1)
    module, page = PAGES[case.trainer]
    optim = {"schedule": "constant", "beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "max_grad_norm": 1.0, "lr": LR}
    cfg = module.TRAINER.config.model_validate(
        {
            "run_dir": Path(folder) / "run",
            "layout": layout,
            "actor": {"init": f"{folder}/actor", "optim": optim},
            "reference": {"init": f"{folder}/reference"},
            "judges": {"said": {"kind": "rule", "rule": "arithmetic"}},
            "sampling": {"temperature": 0.7, "max_new_tokens": by_hand.MAX_NEW},
            "shaping": {"missing_eos": -1.0, "overlong_buffer": 0},
            "rollout_batch": ROWS,
            "global_batch": ROWS,
            "micro_batch": 5,
            "group_size": GROUP,
            "epochs": 2,
            **case.own,
        }
    )
    models = {role: Model(f"{role}.init", init, describe_model(init)) for role, init in cfg.inits.items()}
    inputs = PolicyInputs(models, build_tiny_tokenizer(words()), cfg.prompts, NO_PROMPTS, verifier=None, doubts="")
    cast = module.TRAINER.models(cfg, inputs, mesh)
    panel = Panel((Says(lambda rows: told(scores, rows)),))
    cast = replace(cast, sampler=Sampler(rollout), panel=panel)
    turn = Turn(0, cfg.seed, Clock(mesh.device), StepGuard(cfg.run_dir, 0, mesh), no_more)
    done = page(cast, prompts_of(ROWS // GROUP), cfg, turn)
    rows = done.rows
    order = torch.argsort(rows.rollout.prompt_ids)
    return {
        "logprobs": rows.logprobs[order],
        "weighted_advantages": rows.advantages[order],
        "ref_logprobs": rows.ref_logprobs[order],
        "token_level_rewards": done.token_level_rewards[order],
        "metrics": done.metrics,
        "weights": whole_weights(cast.actor),
    }


def check(world: World, case: Case, layout: ParallelLayout) -> None:
    by = expected(world, case)
    mask, experience = world.rollout.response_mask, by["experience"]
    assert by["losses"][1]["clip_fraction"] > 0.02  # or nothing would be seen of it
    for rank in run_ranks(step, layout.world_size, layout, world.folder, world.rollout, world.rolled.scores, case):
        for name in ("logprobs", "ref_logprobs", "token_level_rewards", "weighted_advantages"):
            torch.testing.assert_close(
                rank[name], experience[name] * mask, atol=TENSORS, rtol=TENSORS, msg=lambda text, n=name: f"{n}: {text}"
            )
        metrics = rank["metrics"]
        assert metrics["policy/loss"] == pytest.approx(
            sum(float(x["loss"]) for x in by["losses"]) / 2, rel=2e-5, abs=1e-6
        )
        clipped = sum(float(x["clip_fraction"]) for x in by["losses"]) / 2
        assert metrics["policy/grad_norm"] == pytest.approx(sum(by["norms"]) / 2, rel=1e-4)
        if "dual_clip" not in case.by_hand:  # the example does not count those tokens
            assert metrics["policy/clip_fraction"] == pytest.approx(clipped, abs=1e-6)
        assert worst(rank["weights"], by["weights"]) < 2 * WEIGHTS * LR


@pytest.mark.parametrize("name", CASES)
def test_two_passes_are_the_examples(name: str, world: World) -> None:
    check(world, CASES[name], ParallelLayout())


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("name", ON_RANKS)
def test_they_are_in_every_layout(name: str, layout: ParallelLayout, world: World) -> None:
    check(world, CASES[name], layout)
