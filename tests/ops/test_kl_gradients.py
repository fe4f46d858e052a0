"""What a KL penalty's gradient is on average: every outcome enumerated, in fp64, for each estimator and place.

The policy is a softmax over six tokens, or two such tokens in a row, the second given the first. Expectations are sums
over all outcomes with their probabilities, so that the only error is rounding.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarlhf_kernels import kl_loss as kl_in_loss
from megarlhf_kernels.linear_ppo import Estimator

V = 6
ROUNDING = 1e-10
"""Near 0 the library's k3 is a series, good to 1e-8 of terms that are below 1e-2."""
ESTIMATORS: list[Estimator] = ["k1", "k2", "k3"]


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=ROUNDING)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LOGITS, OLD, REF = draw(0, V).requires_grad_(), draw(1, V).log_softmax(0), draw(2, V).log_softmax(0)


def new() -> Tensor:
    return LOGITS.log_softmax(0)


def unweighted(logprobs: Tensor, ref: Tensor, estimator: Estimator) -> Tensor:
    """The estimator by its formula alone."""
    x = logprobs - ref
    return {"k1": x, "k2": x**2 / 2, "k3": (-x).exp() - 1 + x}[estimator]


def gradient(value: Tensor, of: Tensor = LOGITS) -> Tensor:
    return torch.autograd.grad(value, of)[0]


def expected(probabilities: Tensor, each: Tensor) -> Tensor:
    """The gradient that samples of these probabilities give on average: they are drawn, not differentiated."""
    return gradient((probabilities.detach() * each).sum())


def reverse() -> Tensor:
    """grad KL(policy || reference)"""
    return gradient((new().exp() * (new() - REF)).sum())


def forward() -> Tensor:
    """grad KL(reference || policy)"""
    return gradient((REF.exp() * (REF - new())).sum())


def in_reward(estimator: Estimator) -> Tensor:
    """REINFORCE with the estimate as a cost: its own gradient is not taken."""
    return expected(new().exp(), unweighted(new(), REF, estimator).detach() * new())


def test_the_two_kls_are_not_the_same_thing() -> None:
    assert (reverse() - forward()).abs().max() > 0.05


def test_in_the_loss_on_policy_without_weight() -> None:
    """k1 says nothing, k2 the reverse KL, k3 the forward one."""
    on_policy = {name: expected(new().exp(), unweighted(new(), REF, name)) for name in ESTIMATORS}
    same(on_policy["k1"], torch.zeros_like(LOGITS))
    same(on_policy["k2"], reverse())
    same(on_policy["k3"], forward())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_in_the_loss_with_weight_it_is_the_reverse_kl_on_and_off_policy(estimator: Estimator) -> None:
    on_policy = expected(new().exp(), kl_in_loss(new(), new().detach(), REF, estimator))
    same(on_policy, reverse())
    off_policy = expected(OLD.exp(), kl_in_loss(new(), OLD, REF, estimator))
    same(off_policy, reverse())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_in_the_loss_off_policy_without_weight_it_is_neither(estimator: Estimator) -> None:
    biased = expected(OLD.exp(), unweighted(new(), REF, estimator))
    for right in (reverse(), forward(), torch.zeros_like(LOGITS)):
        assert (biased - right).abs().max() > 0.05


def test_a_weight_without_gradient_mends_k2_alone() -> None:
    weight = (new() - OLD).exp().detach()
    stopped = {name: expected(OLD.exp(), weight * unweighted(new(), REF, name)) for name in ESTIMATORS}
    same(stopped["k1"], torch.zeros_like(LOGITS))
    same(stopped["k2"], reverse())
    same(stopped["k3"], forward())
    # And one with gradient spoils it: k2 is no unbiased KL, whose gradient it would then be.
    spoilt = expected(OLD.exp(), (new() - OLD).exp() * unweighted(new(), REF, "k2"))
    assert (spoilt - reverse()).abs().max() > 0.05


def test_in_the_reward() -> None:
    same(in_reward("k1"), reverse())
    same(in_reward("k3"), reverse() - forward())
    assert (in_reward("k2") - reverse()).abs().max() > 0.05


def test_sample_by_sample_k2_and_k3_are_one_and_k1_is_noisier() -> None:
    """With weight w and x = new - ref: w x for both; w (x + 1) for k1, whose surplus w grad(new) has mean 0."""
    at = draw(3, V).requires_grad_()
    slopes = {name: gradient(kl_in_loss(at, OLD, REF, name).sum(), at) for name in ESTIMATORS}
    weight = (at - OLD).exp().detach()
    same(slopes["k2"], weight * (at.detach() - REF))
    same(slopes["k3"], slopes["k2"])
    same(slopes["k1"], slopes["k2"] + weight)
    same(expected(OLD.exp(), (new() - OLD).exp().detach() * new()), torch.zeros_like(LOGITS))


# Two tokens. FIRST [V] and SECOND [V, V] are logits. The log-probs of an outcome (a, b), those of a and of b given a,
# are at [a, b] of two [V, V] tensors.

FIRST, SECOND = draw(4, V).requires_grad_(), draw(5, V, V).requires_grad_()


def two_tokens(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return first.log_softmax(0)[:, None].expand(V, V), second.log_softmax(1)


REF_FIRST, REF_SECOND = two_tokens(draw(6, V), draw(7, V, V))


def gradients(value: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, (FIRST, SECOND), retain_graph=True)])


def kl_of_sequences() -> Tensor:
    first, second = two_tokens(FIRST, SECOND)
    return gradients(((first + second).exp() * (first - REF_FIRST + second - REF_SECOND)).sum())


def test_of_two_tokens_the_reward_gives_all_of_the_gradient() -> None:
    """k1 of the whole row as the cost of each token, or of the tokens from this one on: the same on average."""
    first, second = two_tokens(FIRST, SECOND)
    probabilities = (first + second).exp().detach()
    costs = (first - REF_FIRST).detach(), (second - REF_SECOND).detach()
    whole = gradients((probabilities * sum(costs) * (first + second)).sum())
    same(whole, kl_of_sequences())
    from_here = gradients((probabilities * (sum(costs) * first + costs[1] * second)).sum())
    same(from_here, kl_of_sequences())


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_of_two_tokens_the_loss_leaves_out_what_the_first_does_to_the_second(
    estimator: Estimator, on_policy: bool
) -> None:
    """It is each token's KL given what was written before it, by whoever wrote that."""
    first, second = two_tokens(FIRST, SECOND)
    old_first, old_second = (first.detach(), second.detach()) if on_policy else two_tokens(draw(8, V), draw(9, V, V))
    each = kl_in_loss(first, old_first, REF_FIRST, estimator) + kl_in_loss(second, old_second, REF_SECOND, estimator)
    ours = gradients(((old_first + old_second).exp() * each).sum())
    kl_first = (first.exp() * (first - REF_FIRST)).sum() / V  # every a stands V times
    kl_second = (old_first.exp() * second.exp() * (second - REF_SECOND)).sum()
    same(ours, gradients(kl_first + kl_second))
    missing = (ours - kl_of_sequences()).abs()
    assert missing[:V].max() > 0.05
    assert (missing[V:].max() < ROUNDING) == on_policy
