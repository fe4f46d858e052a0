"""The plain-torch GRPO family is its formulas, by hand on tiny tensors, and learns its toy task."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.by_hand import load_by_hand

by_hand = load_by_hand("01_grpo_by_hand")

MASK = torch.tensor([[False, True, True, False], [True, True, True, True]])
"""Two responses, of 2 tokens and of 4."""
KINDS = ["grpo", "dr_grpo", "rloo", "reinforce_baseline"]


def settings(**chosen: Any) -> Any:
    return by_hand.Settings(**chosen)


def close(ours: Tensor, theirs: Tensor | list[Any]) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs, dtype=ours.dtype), rtol=1e-5, atol=1e-6)


def rollouts_of(scores: list[float], terminated: list[bool]) -> Any:
    """Rows of MASK, whatever their tokens."""
    lengths = torch.tensor([4, 5])
    tokens, nothing = torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 4)
    scored = torch.tensor(terminated), torch.tensor(scores)
    return by_hand.Rollouts(tokens, torch.tensor([2, 1]), lengths, *scored, nothing, MASK)


def test_the_advantages_of_a_group():
    """1, 2, 3, 6 have mean 3 and sum of squares 14 around it; the other group's scores are equal."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, *[0.1] * 4])
    centred = torch.tensor([-2.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    group = settings(group_size=4)
    close(by_hand.group_advantages(rewards, group), centred / (math.sqrt(14 / 3) + 1e-6))
    biased = replace(group, std_correction=0, std_eps=0.5)
    close(by_hand.group_advantages(rewards, biased), centred / (math.sqrt(14 / 4) + 0.5))
    for kind in ("dr_grpo", "reinforce_baseline"):
        close(by_hand.group_advantages(rewards, replace(group, advantage=kind)), centred)
    # Of the others: 1 against (2 + 3 + 6) / 3 and so on.
    of_others = [1 - 11 / 3, 2 - 10 / 3, 3 - 3, 6 - 2, 0, 0, 0, 0]
    close(by_hand.group_advantages(rewards, replace(group, advantage="rloo")), of_others)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e6 + 0.1])
def test_equal_rewards_are_exactly_nothing(kind, score):
    """Also where their mean is rounded: that of seven 0.1 is 7e-9 off in fp32, of seven 1,000,000.1 it is 0.06."""
    advantages = by_hand.group_advantages(torch.full((14,), score), settings(advantage=kind, group_size=7))
    assert advantages.tolist() == [0.0] * 14


def test_the_score_is_on_the_last_token_and_the_penalty_on_all():
    logprobs = torch.full((2, 4), -1.0)
    ref_logprobs = torch.tensor([[9.0, -2.0, -1.0, 9.0], [-1.0, -1.5, -0.5, -3.0]])
    rollouts = rollouts_of([0.25, 0.75], [True, False])
    in_loss = by_hand.reward_tokens(rollouts, logprobs, ref_logprobs, settings(missing_eos_score=-1.0))
    close(in_loss, [[0, 0, 0.25, 0], [0, 0, 0, -1.0]])
    chosen = settings(kl_place="reward", kl_estimator="k1", kl_coef=0.1)
    in_reward = by_hand.reward_tokens(rollouts, logprobs, ref_logprobs, chosen)
    close(in_reward, [[0, -0.1, 0.25, 0], [0, -0.05, 0.05, -1.2]])
    # Before the group: the rows are worth 0.15 and -1.2, not 0.25 and -1.
    pair = replace(chosen, advantage="dr_grpo", group_size=2)
    close(by_hand.token_advantages(in_reward, MASK, pair), torch.tensor([[0.675], [-0.675]]) * MASK)


def test_reinforce_discounts_and_whitens_over_all_tokens():
    rewards = torch.tensor([[0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 4.0]])
    returns = torch.tensor([2.0, 2.0, 0.5, 1.0, 2.0, 4.0])  # 1 + 2 / 2, 2; 4 / 8, 4 / 4, 4 / 2, 4
    whitened = (returns - 23 / 12) / math.sqrt(((returns - 23 / 12) ** 2).mean() + 1e-8)
    ours = by_hand.token_advantages(rewards, MASK, settings(advantage="reinforce", gamma=0.5))
    close(ours[MASK], whitened)
    assert ours[~MASK].tolist() == [0.0, 0.0]
    close(ours[MASK].mean(), torch.zeros(()))
    close(ours[MASK].var(unbiased=False), torch.ones(()))


def test_the_baseline_is_whitened_by_tokens_not_rows():
    """Rows 3 and 4: -0.5 on two tokens, 0.5 on four, of mean 1/6 and variance 2/9."""
    rewards = torch.tensor([[0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 4.0]])
    ours = by_hand.token_advantages(rewards, MASK, settings(advantage="reinforce_baseline", group_size=2))
    close(ours, torch.tensor([[-2 / 3], [1 / 3]]) / math.sqrt(2 / 9) * MASK)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),
        (1.5, 2.0, -2.56, 0.0, True),  # 1.28 at most
        (0.5, 2.0, -1.0, -2.0, False),
        (0.5, -2.0, 1.6, 0.0, True),  # 0.8 at least
        (1.5, -2.0, 3.0, 2.0, False),
        (5.0, -2.0, 6.0, 0.0, False),  # dual clip: 3 x 2
        (5.0, 2.0, -2.56, 0.0, True),  # which knows no positive advantage
        (5.0, 0.0, 0.0, 0.0, False),
    ],
)
def test_the_clipped_surrogate(ratio, advantage, loss, slope, clipped):
    chosen = settings(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    at = torch.tensor([[ratio]], requires_grad=True)
    ours, was_clipped = by_hand.policy_loss(at, torch.zeros(1, 1), torch.tensor([[advantage]]), chosen)
    (gradient,) = torch.autograd.grad(ours.sum(), at)
    assert (ours.item(), gradient.item()) == pytest.approx((loss, slope))
    assert was_clipped.item() is clipped


def test_cispo_stops_the_weight_and_never_the_token():
    chosen = settings(surrogate="cispo", clip_low=0.2, clip_high=0.28)
    ratio = torch.tensor([[0.5, 1.0, 5.0]])
    new = (ratio.log() - 2.0).requires_grad_()
    advantages = torch.tensor([[2.0, -1.0, 3.0]])
    ours, clipped = by_hand.policy_loss((new + 2.0).exp(), new, advantages, chosen)
    weights = torch.tensor([[0.8, 1.0, 1.28]])
    close(ours, -weights * advantages * new.detach())
    close(torch.autograd.grad(ours.sum(), new)[0], -weights * advantages)
    assert clipped.tolist() == [[True, False, True]]


def test_the_ratio_of_a_sequence_has_the_gradient_of_its_geometric_mean():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(2, 4, generator=generator)
    new = (old + 0.1 * torch.randn(2, 4, generator=generator)).requires_grad_()
    mean = (torch.where(MASK, new - old, 0.0).sum(dim=1) / MASK.sum(dim=1)).exp()
    ratio = by_hand.importance_ratio(new, old, MASK, "sequence")
    close(ratio, mean.detach()[:, None].expand(2, 4))
    # Averaged over each row, as GSPO's loss is.
    weights = torch.tensor([3.0, -2.0])
    (ours,) = torch.autograd.grad((by_hand.row_means(ratio, MASK)[:, 0] * weights).sum(), new)
    (theirs,) = torch.autograd.grad((mean * weights).sum(), new)
    close(ours, theirs)
    close(by_hand.importance_ratio(new, old, MASK, "token")[MASK], (new - old).exp()[MASK])


def test_three_means():
    losses = torch.tensor([[9.0, 1.0, 3.0, 9.0], [1.0, 1.0, 1.0, 3.0]])
    for kind, mean in (("token", 10 / 6), ("sequence", (2 + 1.5) / 2), ("constant", 10 / (2 * 8))):
        assert by_hand.loss_mean(losses, MASK, settings(loss_mean=kind, max_response=8)).item() == pytest.approx(mean)


def test_kl_estimators_and_their_weights():
    new, old, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.5]), torch.tensor([-1.2, -2.7])
    x, weight = torch.tensor([0.2, 0.7]), torch.tensor([0.5, -0.5]).exp()
    values = {"k1": x, "k2": x**2 / 2, "k3": (-x).exp() - 1 + x}
    slopes = {"k1": weight * (x + 1), "k2": weight * x, "k3": weight * x}
    for name, value in values.items():
        close(by_hand.kl(new, ref, name), value)
        at = new.clone().requires_grad_()
        weighted = by_hand.kl_in_loss(at, old, ref, name)
        close(weighted.detach(), weight * value)
        close(torch.autograd.grad(weighted.sum(), at)[0], slopes[name])


def test_weights_of_another_sampler():
    """w is 1/2 and 4 in the first row, of geometric mean sqrt(2); 1, 1, 1 and 1/8 in the second, of 8^-1/4 = 0.59."""
    weights = torch.tensor([[7.0, 0.5, 4.0, 7.0], [1.0, 1.0, 1.0, 0.125]])
    expected = {
        "none": [[0, 1, 1, 0], [1, 1, 1, 1]],
        "truncate": [[0, 0.5, 2, 0], [1, 1, 1, 0.125]],
        "mask": [[0, 0.5, 0, 0], [1, 1, 1, 0]],
        "sequence_mask": [[0, 0.5, 4, 0], [0, 0, 0, 0]],
    }
    for kind, wanted in expected.items():
        low = 0.6 if kind == "sequence_mask" else 0.5
        chosen = settings(correction=kind, correction_low=low, correction_high=2.0)
        close(by_hand.sampler_weights(weights.log(), torch.zeros(2, 4), MASK, chosen), wanted)


def experience_of(generator: torch.Generator, rows: int) -> dict[str, Tensor]:
    names = ("logprobs", "ref_logprobs", "weighted_advantages")
    drawn = {name: torch.randn(rows, 4, generator=generator) for name in names}
    return {**drawn, "response_mask": MASK.repeat(rows // 2, 1)}


@pytest.mark.parametrize("kind", ["token", "sequence", "constant"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_loss_is_the_mean_of_surrogate_and_kl_alike(kind, estimator):
    generator = torch.Generator().manual_seed(0)
    experience, noise = experience_of(generator, 4), 0.2 * torch.randn(4, 4, generator=generator)
    chosen = settings(loss_mean=kind, kl_estimator=estimator, kl_coef=0.3)
    new, mask = experience["logprobs"] + noise, experience["response_mask"]
    ours = by_hand.total_loss(new, experience, chosen)
    ratio, advantages = noise.exp(), experience["weighted_advantages"]
    surrogate = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    each = surrogate + 0.3 * ratio * by_hand.kl(new, experience["ref_logprobs"], estimator)
    divisors = {"token": torch.full((4, 1), 12.0), "sequence": 4.0 * mask.sum(1, True), "constant": torch.tensor(48.0)}
    close(ours["loss"], (each / divisors[kind])[mask].sum())
    close(ours["policy_loss"] + 0.3 * ours["kl_loss"], ours["loss"])
    outside = by_hand.total_loss(new, experience, replace(chosen, kl_place="reward"))
    close(outside["loss"], ours["policy_loss"])


@pytest.mark.parametrize("kind", ["sequence", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_halves_average_to_the_whole(kind, ratio):
    """Where no divisor depends on which rows are together; padding holds anything."""
    generator = torch.Generator().manual_seed(0)
    experience = experience_of(generator, 4)
    new = experience["logprobs"] + 0.2 * torch.randn(4, 4, generator=generator)
    new = torch.where(experience["response_mask"], new, 1e3)
    chosen = settings(loss_mean=kind, ratio=ratio)
    halves = [
        by_hand.total_loss(new[rows], {name: value[rows] for name, value in experience.items()}, chosen)["loss"]
        for rows in (slice(0, 2), slice(2, 4))
    ]
    close(torch.stack(halves).mean(), by_hand.total_loss(new, experience, chosen)["loss"])


def case(chosen: Any, *, scores: float | None = None) -> tuple[Any, Tensor, Any]:
    """An actor far from uniform, a reference's log-probs, rollouts (of equal scores, if one is given)."""
    torch.manual_seed(0)
    actor, reference = (by_hand.LlamaForCausalLM(by_hand.tiny_llama()) for _ in range(2))
    with torch.no_grad():
        for model in (actor, reference):
            model.lm_head.weight.mul_(5)
    rollouts = by_hand.roll_out(actor, chosen, torch.Generator().manual_seed(0))
    if scores is not None:
        rollouts = replace(rollouts, scores=torch.full_like(rollouts.scores, scores))
    with torch.no_grad():
        return actor, by_hand.token_logprobs(reference, rollouts.tokens, chosen.temperature), rollouts


@pytest.mark.parametrize("name", sorted(by_hand.FAMILY))
def test_one_step_of_each(name):
    """First pass: no ratio is clipped, and the gradient is that of -A logprob; then Adam's first step."""
    chosen = replace(by_hand.FAMILY[name], rollout_batch=32, kl_coef=0.0, temperature=0.7)
    actor, ref_logprobs, rollouts = case(chosen)
    before = {name: weight.clone() for name, weight in actor.state_dict().items()}
    report = by_hand.grpo_step(actor, ref_logprobs, rollouts, chosen)
    mask = rollouts.response_mask
    assert report["clip_fraction"].item() == 0.0
    torch.testing.assert_close(rollouts.sampler_logprobs[mask], report["logprobs"][mask], rtol=0, atol=1e-5)
    twin = by_hand.LlamaForCausalLM(by_hand.tiny_llama())
    twin.load_state_dict(before)
    new = by_hand.token_logprobs(twin, rollouts.tokens, 0.7)
    lengths = mask.sum(dim=1, keepdim=True)
    divisor = {"token": mask.sum(), "sequence": 32 * lengths, "constant": 32 * 12}[chosen.loss_mean]
    (-report["advantages"] * new / divisor)[mask].sum().backward()
    norm = torch.stack([p.grad.norm() for p in twin.parameters() if p.grad is not None]).norm()
    close(report["actor_grad_norm"], norm)
    for name, parameter in twin.named_parameters():
        gradient = report[f"actor_grad/{name}"]
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
        gradient = gradient * min(1.0, chosen.max_grad_norm / norm.item())
        # Both of Adam's bias corrections cancel at the first step: m = g, v = g^2.
        expected = before[name] - chosen.lr * gradient / (gradient.abs() + chosen.adam_eps)
        close(report[f"actor_weight/{name}"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_move_nothing(kind):
    chosen = settings(advantage=kind, rollout_batch=16, kl_coef=0.0, missing_eos_score=0.3)
    actor, ref_logprobs, rollouts = case(chosen, scores=0.3)
    report = by_hand.grpo_step(actor, ref_logprobs, rollouts, chosen)
    assert report["actor_grad_norm"].item() == 0.0


def test_rows_of_a_prompt_are_neighbours_and_its_own():
    _, _, rollouts = case(settings())
    groups = rollouts.tokens[:, :4].masked_fill(torch.arange(4) >= rollouts.prompt_lengths[:, None], -1)
    groups = groups.view(32, 8, 4)
    assert (groups == groups[:, :1]).all()
    assert len(groups[:, 0].unique(dim=0)) > 20
    assert 0 < rollouts.terminated.sum() < 256
    assert rollouts.sampler_logprobs[~rollouts.response_mask].abs().max() == 0


def test_the_score_rises():
    history = by_hand.train(replace(by_hand.FAMILY["grpo"], iterations=7), log_every=0)
    assert abs(history[0]["kl"]) < 1e-6  # the actor is still its reference
    assert history[-1]["score"] > history[0]["score"] + 0.15


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(by_hand.FAMILY))
def test_each_of_the_family_learns(name):
    """In twenty updates from 0.64 to 0.86 (CISPO) and above 0.95 (all others)."""
    history = by_hand.train(by_hand.FAMILY[name], log_every=0)
    assert history[-1]["score"] > 0.8
