"""Pages without a critic on real ranks: they run, go on bit for bit, fill batches, and refuse what means nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.batch.rollouts import Prompts, Rollout
from megarlhf.judges.judge import Verdict, outcome
from megarlhf.judges.panel import Panel
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import Role
from megarlhf.observe.clock import Clock
from megarlhf.observe.metrics import GAPS, names_of
from megarlhf.observe.writers import read_metrics
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.rollout.sampling import SamplingConfig
from megarlhf.runs.guard import StepGuard
from megarlhf.trainers import cispo, dapo, dr_grpo, grpo, gspo, reinforce, rloo
from megarlhf.trainers.critic_free import CriticFreeConfig
from megarlhf.trainers.policy_config import PolicyInputs
from megarlhf.trainers.policy_loop import Cast, Turn
from tests.helpers.models import frozen, policy_and_judge, ragged_rollout, whole_weights, worst
from tests.helpers.ranks import run_ranks
from tests.runs.test_resume import CLOCKED, stopped_after

TRAINERS = {
    module.__name__.rpartition(".")[2]: module.TRAINER for module in (cispo, dapo, dr_grpo, grpo, gspo, reinforce, rloo)
}
SMALL: dict[str, Any] = {
    "tokenizer": "arithmetic",
    "prompts": {"source": "arithmetic", "template": "plain", "max_tokens": 64, "arithmetic": {"level": 1, "rows": 20}},
    "sampling": {"temperature": 1.0, "max_new_tokens": 8},
    "iterations": 3,
    "rollout_batch": 8,
    "global_batch": 4,
    "micro_batch": 2,
    "group_size": 4,
    "samples_every": 2,
    "tensorboard": False,
    "save_every": 1,
}
EVENNESS = """
def even(prompt, response, answer, columns):
    return float(len(response) % 3)
"""
PLAIN = {"missing_eos": None, "overlong_buffer": 0}
"""What is learnt from are the scores as they are."""
MORE: dict[str, dict[str, Any]] = {
    "grpo": {"kl_coef": 0.1, "shaping": {"normalise": "running"}},
    "rloo": {"kl_target_per_response": 0.01, "kl_horizon": 40, "exact_kl_every": 2},
    "reinforce": {"baseline": "group", "sampler_correction": {"rule": "truncate"}, "epochs": 2},
    "dapo": {"max_draws": 3, "batch_unit": "prompts", "rollout_batch": 4, "global_batch": 2},
}
"""Settings of the runs that are stopped: every piece of state is in one of them."""


def config(
    name: str, folder: str, run_dir: Path, layout: ParallelLayout, *, more: bool = True, **changes: Any
) -> CriticFreeConfig:
    judge = {"kind": "function", "function": f"{folder}/own.py:even"}
    settings = {"actor": {"init": f"{folder}/actor", "optim": {"lr": 1e-2}}, "judges": {"even": judge}, **SMALL}
    return TRAINERS[name].config.model_validate(
        {**settings, "run_dir": run_dir, "layout": layout, **(MORE.get(name, {}) if more else {}), **changes}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = tmp_path_factory.mktemp("critic_free")
    policy_and_judge(found)
    (found / "own.py").write_text(EVENNESS)
    return str(found)


def run(name: str, layout: ParallelLayout, stop: int | None, where: str, folder: str) -> dict[str, Tensor]:
    """All iterations, or up to a stop: the final weights."""
    mesh = start(layout, seed=1)
    cfg, trainer = config(name, folder, Path(where), layout), TRAINERS[name]
    inputs = trainer.prepare(cfg)
    if stop is not None:
        with stopped_after(stop):
            trainer.run(cfg, inputs, [], mesh)
        return {}
    trainer.run(cfg, inputs, [], mesh)
    return whole_weights(frozen(f"{where}/model", LabelLogprobs(1.0), mesh))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("grpo", ParallelLayout(data=2)),
        ("rloo", ParallelLayout(tensor=2)),
        ("reinforce", ParallelLayout()),
        ("dapo", ParallelLayout(data=2)),
    ],
)
def test_a_stopped_run_goes_on_bit_for_bit(name: str, layout: ParallelLayout, folder: str, tmp_path: Path) -> None:
    """With every new piece of state: running moments, a coefficient that is steered, prompts drawn between."""
    ranks = layout.world_size
    expected = run_ranks(run, ranks, name, layout, None, str(tmp_path / "whole"), folder)[0]
    run_ranks(run, ranks, name, layout, 1, str(tmp_path / "parts"), folder)
    found = run_ranks(run, ranks, name, layout, None, str(tmp_path / "parts"), folder)[0]
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())
    whole, parts = (
        [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in read_metrics(tmp_path / where).rows]
        for where in ("whole", "parts")
    )
    assert (len(whole), whole) == (3, parts)
    cfg = config(name, folder, tmp_path / "other", layout)
    sometimes = {"rollout/accuracy", "rollout/verified"}
    for row in whole:
        assert cfg.logged - sometimes <= row.keys(), cfg.logged - row.keys()
        assert all(isinstance(value, bool) or abs(value) < float("inf") for value in row.values())
        assert row["policy/first_ratio_gap"] < 1e-5
        assert row["policy/grad_norm"] > 0
    if name == "rloo":
        coefs = [row["kl/coef"] for row in whole]
        assert coefs[0] == 0.05
        # The first iteration's policy is the reference: a KL of 0 against 0.01 is the largest error there is.
        assert coefs[1] == pytest.approx(0.05 * (1 - 0.2 * 8 / 40), rel=1e-3)
        assert "kl/reference_exact" in whole[0]
    if name == "dapo":
        assert all(row["rollout/tokens"] >= row["draws/discarded_tokens"] for row in whole)
        assert any(row["draws/discarded_tokens"] for row in whole)
        assert {row["draws/count"] for row in whole} & {2.0, 3.0}
        assert all(row["group/equal_fraction"] == pytest.approx(1 - row["draws/kept_fraction"]) for row in whole)
    if name == "reinforce":
        assert all(row["sampler/effective_sample_fraction"] == pytest.approx(1.0, abs=1e-4) for row in whole)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_the_samplers_log_probs_start_the_same_ratios_and_save_a_pass(name: str, folder: str, tmp_path: Path) -> None:
    changes = {"more": False, "iterations": 2, "rollout_batch": 8, "global_batch": 4, "kl_coef": 0.1, "seed": 3}
    found = {}
    for whose in ("trainer", "sampler"):
        settings = {**changes, "old_logprobs": whose}
        (found[whose],) = run_ranks(metrics_of, 1, name, folder, str(tmp_path / whose), settings)
    for recomputed, taken in zip(found["trainer"], found["sampler"], strict=True):
        assert recomputed.keys() - taken.keys() == GAPS
        assert not taken.keys() - recomputed.keys()
        assert taken["policy/grad_norm"] == pytest.approx(recomputed["policy/grad_norm"], rel=1e-3)
        assert taken["policy/grad_norm"] > 0
        assert taken["policy/loss"] == pytest.approx(recomputed["policy/loss"], abs=1e-5)
        assert taken["kl/reference_mean"] == pytest.approx(recomputed["kl/reference_mean"], abs=1e-4)
        assert taken["policy/first_ratio_gap"] < 1e-5
    # Two passes of the same model over the same tokens, the reference's and the actor's; now one.
    scoring = [rows[-1]["compute/score_flops"] for rows in found.values()]
    assert scoring[1] == scoring[0] / 2


@pytest.mark.parametrize("name", TRAINERS)
def test_every_metric_is_finite_at_one_token_and_at_the_limit(name: str, folder: str, tmp_path: Path) -> None:
    changes = {"iterations": 1, "sampling": {"temperature": 1.0, "max_new_tokens": 1}}
    (rows,) = run_ranks(metrics_of, 1, name, folder, str(tmp_path), changes)
    for row in rows:
        assert row["rollout/response_length_max"] == 1
        assert all(abs(value) < float("inf") for value in row.values()), row


def metrics_of(name: str, folder: str, where: str, changes: dict[str, Any]) -> list[dict[str, float]]:
    cfg = config(name, folder, Path(where), ParallelLayout(), **changes)
    TRAINERS[name].run(cfg, TRAINERS[name].prepare(cfg), [], start(cfg.layout, seed=1))
    return read_metrics(Path(where)).rows


def measured(folder: str, where: str) -> tuple[list[str], list[set[str]]]:
    """Which models a run without a KL reads in its three iterations, and what of the KL each of them logs."""
    changes = {"kl_coef": 0.0, "exact_kl_every": 2, "gates": "off", "save_every": 0}
    read: list[str] = []

    def noted(role: Role, batch: Any, reading: Any, **dealt: Any) -> Tensor:
        read.append(role.name)
        return plain(role, batch, reading, **dealt)

    with pytest.MonkeyPatch.context() as patch:
        plain = Role.read
        patch.setattr(Role, "read", noted)
        rows = metrics_of("grpo", folder, where, changes)
    return read, [{name for name in row if name.startswith("kl/")} for row in rows]


def test_a_reference_that_is_there_to_be_measured_is_read_when_that_is_due(folder: str, tmp_path: Path) -> None:
    ((read, logged),) = run_ranks(measured, 1, folder, str(tmp_path))
    due = ["actor", "actor", "reference", "reference"]  # log-probs; then the whole vocabulary, and log-probs again
    assert read == [*due, "actor", *due, "actor"]  # the last, before it is saved
    assert logged == [names_of("kl"), set(), names_of("kl")]


class Says:
    """A judge that says what it is told, of each rollout in turn."""

    name, weight, wrong_score = "said", 1.0, float("inf")

    def __init__(self, scores: Callable[[Rollout], Tensor]) -> None:
        self._scores = scores
        self.asked = 0

    def judge(self, rollout: Rollout) -> Verdict:
        self.asked += len(rollout)
        return Verdict(outcome(self._scores(rollout), rollout))


class Sampler:
    """Gives the rows of one rollout, from the first on: so many as prompts and group size ask for."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout, self._next = rollout, 0

    def generate(self, prompts: Prompts, sampling: SamplingConfig, *, seed: int, group_size: int = 1) -> Rollout:
        rows = torch.arange(self._next, self._next + len(prompts) * group_size)
        self._next += len(rows)
        return self._rollout.rows(rows)


def prompts_of(count: int) -> Prompts:
    one = torch.ones(count, 1, dtype=torch.int64)
    return Prompts(one, one[:, 0], torch.arange(count), ("",) * count)


def iterate(name: str, cfg: CriticFreeConfig, rollout: Rollout, scores: Callable[[Rollout], Tensor]) -> dict[str, Any]:
    """One iteration on a prepared rollout and prepared scores; and the actor's weights after it."""
    mesh, trainer = start(cfg.layout, seed=1), TRAINERS[name]
    inputs: PolicyInputs = trainer.prepare(cfg)
    cast: Cast = trainer.models(cfg, inputs, mesh)
    judge = Says(scores)
    cast = replace(cast, panel=Panel((judge,)), sampler=Sampler(rollout))
    asked: list[int] = []

    def more(count: int) -> Prompts:
        asked.append(count)
        return prompts_of(count)

    before = whole_weights(cast.actor)
    turn = Turn(0, cfg.seed, Clock(mesh.device), StepGuard(cfg.run_dir, 0, mesh), more)
    pages = {"grpo": grpo.grpo_iteration, "dapo": dapo.dapo_iteration, "rloo": rloo.rloo_iteration}
    page: Any = pages.get(name, reinforce.reinforce_iteration if name == "reinforce" else grpo.grpo_iteration)
    done = page(cast, prompts_of(cfg.prompts_per_iteration), cfg, turn)
    after = whole_weights(cast.actor)
    return {
        "metrics": done.metrics,
        "before": before,
        "after": after,
        "asked": asked,
        "judged": judge.asked,
        "drawn": len(done.rollout),
        "rows": done.rows,
        "rewards": done.token_level_rewards,
    }


def rows_of(count: int, seed: int = 3) -> Rollout:
    return ragged_rollout(count, vocab=150, seed=seed)


def by_prompt(rollout: Rollout) -> Tensor:
    """Scores that differ between prompts of four responses and not within one."""
    return (rollout.prompt_ids // 4).float()


def by_row(rollout: Rollout) -> Tensor:
    return (rollout.prompt_ids % 4).float()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "gspo", "cispo"])
def test_groups_of_equal_scores_move_nothing(name: str, folder: str, tmp_path: Path) -> None:
    for scores, moves in ((by_prompt, False), (by_row, True)):
        changes = {"kl_coef": 0.0, "shaping": PLAIN}
        cfg = config(name, folder, tmp_path, ParallelLayout(), more=False, **changes)
        (done,) = run_ranks(iterate, 1, name, cfg, rows_of(8), scores)
        assert (worst(done["after"], done["before"]) > 0) == moves
        assert done["metrics"]["group/equal_fraction"] == float(not moves)


def test_padding_and_the_order_of_groups_change_nothing(folder: str, tmp_path: Path) -> None:
    cfg = config("grpo", folder, tmp_path, ParallelLayout(), global_batch=8, shaping=PLAIN)
    rollout = rows_of(8)
    swapped = rollout.rows(torch.tensor([4, 5, 6, 7, 0, 1, 2, 3]))
    expected, *others = (
        run_ranks(iterate, 1, "grpo", cfg, each, by_row)[0]
        for each in (rollout, rollout.padded_to(rollout.tokens.shape[1] + 9), swapped)
    )
    for other in others:
        assert worst(other["after"], expected["after"]) < 1e-6
        assert other["metrics"]["policy/loss"] == pytest.approx(expected["metrics"]["policy/loss"], abs=1e-6)
