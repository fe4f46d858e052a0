"""Settings of the pages without a critic: what they come to, what they refuse, and what a start says of them."""

from __future__ import annotations

from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from megarlhf.errors import ConfigError
from megarlhf.judges.shaping import Shaper
from megarlhf.observe.metrics import names_of
from megarlhf.ops.group_advantages import group_advantages, leave_one_out
from megarlhf.ops.scores import group_moments, normalised
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.trainers.critic_free import CriticFreeConfig, GroupStdConfig, critic_free_loss
from megarlhf.trainers.policy_config import PolicyInputs
from megarlhf.trainers.ppo import PPOConfig
from megarlhf.trainers.reinforce import reinforced
from tests.helpers.models import policy_and_judge
from tests.helpers.ranks import run_ranks
from tests.trainers.test_critic_free import EVENNESS, PLAIN, TRAINERS, config, metrics_of, rows_of

BY_GROUP: dict[str, Any] = {"shaping": {"normalise": "group"}}


def cfg_of(name: str, run_dir: Path, *, more: bool = True, **changes: Any) -> CriticFreeConfig:
    """Of models and a judge that are nowhere: nothing here reads them."""
    return config(name, "nowhere", run_dir, ParallelLayout(), more=more, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("grpo", {"group_size": 1}, "group_size=1: a response is compared with the others to its prompt, and there is"),
        ("rloo", {"group_size": 1}, "group_size=1: a response is compared"),
        ("reinforce", {"group_size": 1}, "baseline=group with group_size=1: a response less itself is 0"),
        ("reinforce", {"gamma": 0.9}, "gamma=0.9 with baseline=group: nothing is discounted"),
        ("grpo", {"kl_target_per_response": 6.0}, "kl_target_per_response=6 steers a KL in the reward; set kl_in=rewa"),
        ("rloo", {"kl_coef": 0.0}, "kl_target_per_response=0.01 with kl_coef=0: it is multiplied, and stays 0"),
        ("grpo", {"kl_horizon": 5}, "kl_horizon=5 is of a target; set kl_target_per_response too"),
        (
            "rloo",
            {"kl_horizon": 7},
            "kl_horizon=7 is less than an iteration's 8 rollouts, and kl_coef could",
        ),
        ("cispo", {"dual_clip": 3.0}, "dual_clip=3 is of surrogate=clip, cispo has none"),
        ("dapo", {"shaping": {"overlong_buffer": 9}}, "shaping.overlong_buffer=9 is more than sampling.max_new_tok"),
        (
            "grpo",
            {"old_logprobs": "sampler", "sampler_correction": {"rule": "mask"}},
            "sampler_correction.rule=mask with old_logprobs=sampler: the ratio has the gap in it already",
        ),
        ("grpo", {"rollout_batch": 6}, "rollout_batch=6 is not divisible by group_size=4"),
        ("dr_grpo", BY_GROUP, "shaping.normalise=group with group_std=null: it divides by the standard deviation that"),
        ("grpo", {**BY_GROUP, "group_std": None}, "group_std=null: .*; set shaping.normalise to none or batch, or"),
        (
            "reinforce",
            {"group_size": 1, "baseline": "token"},
            "baseline=token with group_size=1: there are no others to",
        ),
        ("reinforce", {"gamma": 0.9, "baseline": "token"}, "gamma=0.9 with baseline=token: nothing is discounted"),
        ("dapo", {"kl_bound": 3.0}, "kl_bound=3: nothing logs kl/reference_mean here"),
        (
            "gspo",
            {"policy_loss": "fused"},
            "policy_loss=fused with ratio=sequence: .*; set policy_loss to auto or compos",
        ),
    ],
)
def test_what_means_nothing_is_refused(name: str, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        cfg_of(name, tmp_path, **changes).check_sizes()


BY_STEP: dict[str, Any] = {"judges": {"steps": {"kind": "process", "init": "nowhere", "reward": "soft_min"}}}


@pytest.mark.parametrize("name", [name for name in TRAINERS if name != "reinforce"])
def test_rewards_of_steps_are_refused_where_responses_have_one_advantage(name: str, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"more": False, "shaping": PLAIN}
    says = (
        r"judges.steps.reward=soft_min rewards each step, but .*; set it to min, product, mean or last, .* or take ppo"
    )
    with pytest.raises(ConfigError, match=says):
        cfg_of(name, tmp_path, **plain, **BY_STEP).check_sizes()
    for change in ({"reward": "min"}, {"weight": 0.0}):  # one score; logged alone
        judges = {"steps": {**BY_STEP["judges"]["steps"], **change}, "rule": {"kind": "rule", "rule": "exact"}}
        cfg_of(name, tmp_path, **plain, judges=judges).check_sizes()


def test_rewards_of_steps_are_learnt_from_where_tokens_have_advantages(tmp_path: Path) -> None:
    """And are shaped by nothing that knows no steps."""
    for baseline, learns in (("none", True), ("token", True), ("group", False)):
        cfg = cfg_of("reinforce", tmp_path, more=False, baseline=baseline, **BY_STEP)
        with nullcontext() if learns else pytest.raises(ConfigError, match="or reinforce with baseline=none or"):
            cfg.check_sizes()
    ppo = PPOConfig.model_validate({"run_dir": tmp_path, **BY_STEP})
    ppo.check_sizes()
    for name, value in {"clip": 5.0, "normalise": "running", "positive": 0.5, "negative": 2.0}.items():
        shaping = ppo.shaping.model_copy(update={name: value})
        says = (
            f"shaping.{name}={value} with judges.steps.reward=soft_min: what is made of .*; leave it out, or set judges"
        )
        with pytest.raises(ConfigError, match=says):
            ppo.model_copy(update={"shaping": shaping}).check_sizes()
    marks = {"missing_eos": -1.0, "overlong_buffer": 4}
    ppo.model_copy(update={"shaping": ppo.shaping.model_copy(update=marks)}).check_sizes()


def test_the_baseline_of_tokens_is_what_the_others_earned_for_each_token_from_here_on(tmp_path: Path) -> None:
    """A loop over tokens; and a response that earns as much a token as the others has nothing before its first."""
    cfg: Any = cfg_of("reinforce", tmp_path, more=False, baseline="token", group_size=4)
    rollout = rows_of(8)
    mask = rollout.response_mask
    rewards = torch.where(mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)), 0.0)
    found = reinforced(rewards, rollout, cfg)
    for row in range(8):
        others = [other for other in range(row // 4 * 4, row // 4 * 4 + 4) if other != row]
        tokens = sum(int(mask[other].sum()) for other in others)
        token = sum(rewards[other].double().sum().item() for other in others) / tokens
        own = [t for t in range(mask.shape[1]) if mask[row, t]]
        for place, t in enumerate(own):
            follows = sum(rewards[row, later].item() for later in own[place:])
            assert found[row, t].item() == pytest.approx(follows - token * (len(own) - place), abs=1e-5)
    assert not found[~mask].any()
    alike = reinforced(torch.where(mask, 0.25, 0.0), rollout, cfg)
    assert alike.abs().max() < 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = tmp_path_factory.mktemp("settings")
    policy_and_judge(found)
    (found / "own.py").write_text(EVENNESS)
    (found / "unanswered.jsonl").write_text('{"prompt": "Sam has"}\n' * 9)
    return str(found)


def prepare(name: str, folder: str, run_dir: Path, **changes: Any) -> PolicyInputs:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return TRAINERS[name].prepare(config(name, folder, run_dir, ParallelLayout(), **changes))


ENDS: dict[str, Any] = {"stop_when_over_optimised": True}
UNANSWERED = {"source": "unanswered.jsonl", "template": "plain"}


@pytest.mark.parametrize(
    ("name", "changes", "why", "remedy"),
    [
        ("dapo", {"verifier": "none"}, "(verifier=none), and no KL is measured; ", "or set reference.init, to measure"),
        ("grpo", {"verifier": "none", "kl_bound": None}, "(verifier=none), and kl_bound=null; ", "or set kl_bound, or"),
        (
            "dapo",
            {"verifier": "exact", "prompts": UNANSWERED},
            "(verifier=exact), and no KL",
            "name a verifier, and prompts",
        ),
    ],
)
def test_a_run_that_is_to_end_at_a_warning_must_be_able_to_warn(
    name: str, changes: dict[str, Any], why: str, remedy: str, folder: str, tmp_path: Path
) -> None:
    prepare(name, folder, tmp_path, **changes)
    with pytest.raises(ConfigError) as error:
        prepare(name, folder, tmp_path, **ENDS, **changes)
    assert why in str(error.value)
    assert remedy in str(error.value)
    with pytest.raises(ConfigError, match="keep_best=rollout/accuracy is not logged"):
        prepare(name, folder, tmp_path, keep_best="rollout/accuracy", **changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("dapo", {}), ("grpo", {"verifier": "none"}), ("dapo", {"verifier": "none", "exact_kl_every": 2})],
)
def test_accuracy_or_a_kl_is_enough_for_that(name: str, changes: dict[str, Any], folder: str, tmp_path: Path) -> None:
    prepare(name, folder, tmp_path, **ENDS, **changes)


@pytest.mark.parametrize(
    ("name", "chosen", "how"),
    [
        ("grpo", "auto", "fused"),
        ("grpo", "fused", "fused"),
        ("grpo", "composed", "composed"),
        ("gspo", "auto", "composed"),
        ("gspo", "composed", "composed"),
    ],
)
def test_the_loss_is_fused_where_it_can_be_and_a_start_says_what_it_is(
    name: str, chosen: str, how: str, tmp_path: Path
) -> None:
    cfg = cfg_of(name, tmp_path, policy_loss=chosen)
    cfg.check_sizes()
    actor = Mock()
    actor.model.policy_loss.side_effect = NotImplementedError("fused")
    actor.model.label_logprobs.side_effect = NotImplementedError("composed")
    with pytest.raises(NotImplementedError, match=how):
        critic_free_loss(actor, cfg)(Mock(), Mock())
    assert cfg.policy_loss_choice.implementation[-9:] == {"fused": "3 matmuls", "composed": "4 matmuls"}[how]


def test_a_run_of_gspo_goes_on_whose_settings_say_fused_as_all_once_did(tmp_path: Path) -> None:
    cfg = cfg_of("gspo", tmp_path / "run")
    cfg.run_dir.mkdir()
    (cfg.run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    (cfg.run_dir / "config.yaml").write_text(cfg.to_yaml().replace("policy_loss: auto", "policy_loss: fused"))
    cfg.check_run_dir()
    assert cfg.changes() == {}
    with pytest.raises(ConfigError, match=r"other settings \(ratio 'sequence' -> 'token'\)"):
        cfg.model_copy(update={"ratio": "token"}).check_run_dir()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        *((name, ["group_std what came of that once more: by about 1"]) for name in ("grpo", "dapo", "gspo", "cispo")),
        ("rloo", ["advantages become GRPO's, times n / (n - 1); shaping.normalise=none leaves RLOO's."]),
        ("reinforce", []),
    ],
)
def test_what_is_odd_is_said_at_the_start(name: str, says: list[str], tmp_path: Path) -> None:
    cfg = cfg_of(name, tmp_path, **BY_GROUP)
    cfg.check_sizes()
    assert [part in remark for part, remark in zip(says, cfg.remarks, strict=True)] == [True] * len(says)
    assert cfg_of(name, tmp_path).remarks == []


def start_of(folder: str, where: str) -> str:
    """What a run says, which has one iteration."""
    with redirect_stderr(StringIO()) as said:
        metrics_of("rloo", folder, where, {"iterations": 1, "gates": "off", **BY_GROUP})
    return said.getvalue()


def test_a_start_says_it(folder: str, tmp_path: Path) -> None:
    (said,) = run_ranks(start_of, 1, folder, str(tmp_path))
    assert said.count("shaping.normalise=none leaves RLOO's.\n") == 1


def test_a_second_division_by_a_groups_spread_is_by_about_1_and_rloo_with_one_is_grpo() -> None:
    scores = torch.tensor([0.0, 3.0, 1.0, 8.0, 2.0, 2.0, 2.0, 5.0])
    std = GroupStdConfig().divisor
    once, (mean, spread) = group_advantages(scores, 4, std), group_moments(scores, 4)
    divided = normalised(scores, mean, spread)
    torch.testing.assert_close(group_advantages(divided, 4, std), once, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(group_advantages(divided, 4, None), once)  # what Dr.GRPO would do again
    torch.testing.assert_close(leave_one_out(divided, 4), once * 4 / 3)


def test_a_reference_is_loaded_where_a_kl_asks_for_one(tmp_path: Path) -> None:
    def inits(name: str, **changes: Any) -> dict[str, str]:
        return cfg_of(name, tmp_path, **changes).inits

    assert "reference" in inits("grpo")
    assert "reference" not in inits("grpo", kl_coef=0.0)
    assert "reference" not in inits("dapo")
    assert inits("dapo", reference={"init": "other"})["reference"] == "other"
    assert "kl/reference_mean" not in cfg_of("dapo", tmp_path).logged
    assert "reference" in inits("dapo", exact_kl_every=2)


@pytest.mark.parametrize(
    ("changes", "logged"),
    [
        ({"kl_coef": 0.1}, names_of("kl") - {"kl/reference_exact"}),
        ({"reference": {"init": "other"}, "exact_kl_every": 2}, names_of("kl") - {"kl/reference_exact"}),
        ({"exact_kl_every": 2}, set()),
        ({"exact_kl_every": 1}, names_of("kl")),
        ({}, set()),
    ],
)
def test_what_is_logged_of_the_kl_in_every_iteration(changes: dict[str, Any], logged: set[str], tmp_path: Path) -> None:
    """By which a best state may be chosen; that of some iterations can warn of kl_bound all the same."""
    cfg = cfg_of("dapo", tmp_path, **changes)
    assert {name for name in cfg.logged if name.startswith("kl/")} == logged
    assert cfg.measures_kl == bool(changes)
    if changes:
        cfg_of("dapo", tmp_path, kl_bound=3.0, **changes).check_sizes()


def test_batches_are_of_rollouts_or_of_prompts(tmp_path: Path) -> None:
    """With eight responses instead of four: half of the prompts, or twice the rollouts; steps stay two an iteration."""

    def sizes(unit: str, group_size: int) -> tuple[int, ...]:
        changes = {"batch_unit": unit, "group_size": group_size, "rollout_batch": 16, "global_batch": 8}
        cfg = cfg_of("grpo", tmp_path, **changes)
        return (
            cfg.prompts_per_iteration,
            cfg.rollouts_per_iteration,
            cfg.rollouts_per_step,
            cfg.steps_per_iteration,
        )

    assert [sizes("rollouts", n) for n in (4, 8)] == [(4, 16, 8, 2), (2, 16, 8, 2)]
    assert [sizes("prompts", n) for n in (4, 8)] == [(16, 64, 32, 2), (16, 128, 64, 2)]
    with pytest.raises(ConfigError, match=r"rollout_batch=16 is not divisible by global_batch=5"):
        cfg_of("grpo", tmp_path, batch_unit="prompts", rollout_batch=16, global_batch=5).check_sizes()


def test_what_is_paid_where_by_default(tmp_path: Path) -> None:
    """k1 in the reward, for k3 has another gradient there; k3 in the loss."""
    for name in TRAINERS:
        for place, estimator in (("reward", "k1"), ("loss", "k3")):
            changes = {"kl_in": place, "kl_coef": 0.1}
            assert cfg_of(name, tmp_path, more=False, **changes).estimator == estimator
    assert cfg_of("grpo", tmp_path, kl_in="reward", kl_estimator="k2").estimator == "k2"


def test_a_fifth_of_the_limit_is_dear_by_default_in_dapo(tmp_path: Path) -> None:
    """Half of 20 tokens' last four costs half a point; `shaping.clip` alone keeps the buffer."""
    cfg = cfg_of("dapo", tmp_path, shaping={"clip": 5.0, "missing_eos": None})
    shaper = Shaper(cfg.shaping, 1, 20, 0.0)
    rollout = rows_of(8)
    longest = rollout.rows(rollout.response_lengths.argsort()[-1:])
    assert 17 <= int(longest.response_lengths) <= 20
    lost = (int(longest.response_lengths) - 16) / 4
    assert shaper.shape(torch.tensor([1.0]), longest).item() == pytest.approx(1.0 - lost)
