"""The policy loss from hidden states: value and every gradient against fp64, micro-batches, loss scale, ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megarlhf_kernels import Anchor, Clip, PolicyTerms, _projection, kl_loss, linear_logprob, linear_ppo
from megarlhf_kernels.dispatch import Impl
from megarlhf_kernels.linear_ppo import METRICS, Estimator
from tests.helpers.losses import clipped_policy_loss
from tests.helpers.ranks import run_ranks
from tests.kernels.linear_cases import (
    LOSSES,
    a_case,
    assert_as_good_as_torch,
    exact,
    leaves,
    of_each,
    ours,
    shard_of,
    some_terms,
    worst,
)


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> Impl:
    return request.param


@pytest.mark.parametrize("loss", ["clip", "clip, k2"])
@pytest.mark.parametrize(("count", "vocab"), [(1, 2), (33, 7), (20, 1000)])
def test_value_and_gradients_match_fp64_as_well_as_plain_torch_does(count, vocab, loss, impl, monkeypatch):
    monkeypatch.setattr(_projection, "CPU_ELEMENTS", 8 * vocab)  # chunks of 8 rows
    case = a_case(count, vocab, scale=2.0)
    assert_as_good_as_torch(case, LOSSES[loss](case), impl=impl)


@pytest.mark.parametrize("loss", list(LOSSES)[2:])
def test_so_do_those_of_other_losses(loss, impl, monkeypatch):
    monkeypatch.setattr(_projection, "CPU_ELEMENTS", 8 * 50)
    case = a_case(33, 50, scale=2.0)
    assert_as_good_as_torch(case, LOSSES[loss](case), impl=impl)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_pulls_as_far_as_it_is_wherever_the_reference_is(estimator: Estimator) -> None:
    """The gradient of k2 and k3 is r x in every token, in fp32 too, where k3's value is clamped."""
    gap = torch.tensor([-1e4, -30.0, -20.1, -18.0, -10.0, -1e-3, 0.0, 1e-3, 10.0, 30.0])
    new = torch.full_like(gap, -2.0).requires_grad_()
    old = new.detach() - 0.5
    value = kl_loss(new, old, new.detach() - gap, estimator)
    (slope,) = torch.autograd.grad(value.sum(), new)
    torch.testing.assert_close(slope, math.exp(0.5) * gap, rtol=1e-4, atol=1e-6)
    assert value.isfinite().all()
    assert (value >= 0).all()


def test_equals_logits_to_log_softmax_to_the_composed_loss(impl):
    case = a_case(24, 50)
    terms = some_terms(case, full=False)
    hidden, weight = leaves(case, torch.float64)
    logprobs = torch.log_softmax(hidden @ weight.t() / 0.6, dim=1).gather(1, case.labels[:, None]).t()
    loss, metrics = clipped_policy_loss(
        logprobs[0], terms.logprobs.double(), terms.advantages.double(), clip=Clip(0.2, 0.2)
    )
    assert 0.25 < metrics["clip_fraction"] / 24 < 0.8
    expected = [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]
    assert worst(ours(case, terms, impl=impl), expected) < 1e-4


def test_micro_batches_and_a_loss_scale_add_up_to_the_whole(impl):
    case = a_case(29, 40)
    terms = some_terms(case, full=True)
    expected = exact(case, terms)
    hidden, weight = leaves(case, torch.float32)
    weight_grad = torch.zeros_like(weight)
    total = 0.0
    for rows in torch.arange(29).split(8):
        part = of_each(terms, lambda x, rows=rows: x[rows])
        loss, *_ = linear_ppo(
            hidden[rows], weight, case.labels[rows], part, loss_scale=0.125, weight_grad=weight_grad, impl=impl
        )
        (0.125 * loss).backward()
        total += float(loss.detach())
    assert weight.grad is None
    assert hidden.grad is not None
    got = [torch.tensor(total), 8 * hidden.grad, 8 * weight_grad]
    assert worst(got, expected) < 1e-4


def test_another_upstream_gradient_is_refused(impl):
    case = a_case(5, 9)
    hidden, weight = leaves(case, torch.float32)
    loss, *_ = linear_ppo(hidden, weight, case.labels, some_terms(case, full=False), impl=impl)
    with pytest.raises(RuntimeError, match=r"made for loss_scale=1, but .* by another number; pass that"):
        (0.5 * loss).backward()


def test_the_first_pass_has_ratio_one_bit_for_bit(impl, monkeypatch):
    monkeypatch.setattr(_projection, "CPU_ELEMENTS", 8 * 60)
    case = a_case(30, 60)
    old, entropy = linear_logprob(case.hidden, case.weight, case.labels, temperature=0.6, impl=impl)
    terms = PolicyTerms(old, case.d_logprobs, clip=Clip(0.2, 0.2), temperature=0.6)
    loss, metrics, logprobs, same = linear_ppo(case.hidden, case.weight, case.labels, terms, impl=impl)
    assert torch.equal(logprobs, old)
    assert torch.equal(same, entropy)
    assert metrics.tolist() == [0.0, 0.0, 30.0, pytest.approx(float(entropy.double().sum()), rel=1e-12)]
    torch.testing.assert_close(loss, -case.d_logprobs.double().sum().float(), rtol=1e-6, atol=1e-6)


def test_metrics_are_those_of_the_clipped_loss(impl, monkeypatch):
    monkeypatch.setattr(_projection, "CPU_ELEMENTS", 8 * 60)  # chunks of 8 rows
    case = a_case(30, 60)
    terms = some_terms(case, full=True)
    _, metrics, logprobs, entropy = linear_ppo(case.hidden, case.weight, case.labels, terms, impl=impl)
    assert terms.weights is not None
    _, seen = clipped_policy_loss(logprobs, terms.logprobs, terms.weights * terms.advantages, clip=Clip(0.2, 0.2))
    expected = [*(float(seen[name]) for name in METRICS[:-1]), float(entropy.double().sum())]
    assert metrics.tolist() == pytest.approx(expected, rel=1e-6)
    assert 0.2 < metrics[0] / 30 < 0.8


def test_ratios_that_overflow_stay_finite(impl):
    case = a_case(4, 9)
    old, _ = linear_logprob(case.hidden, case.weight, case.labels)
    old[:3] = torch.tensor([-1e4, 1e4, -200.0])
    terms = PolicyTerms(old, torch.tensor([1.0, 1.0, -1.0, 1.0]), clip=Clip(0.2, 0.2))
    loss, d_hidden, d_weight = ours(case, terms, impl=impl)
    assert torch.isfinite(loss)
    assert torch.isfinite(d_weight).all()
    assert d_hidden[:3].abs().max() == 0.0  # clamped or clipped away
    assert d_hidden[3].abs().max() > 0.0


def test_without_gradients_only_the_numbers_come_out(impl):
    case = a_case(5, 9)
    terms = some_terms(case, full=True)
    with torch.no_grad():
        loss, *_ = linear_ppo(case.hidden, case.weight, case.labels, terms, impl=impl)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.double(), exact(case, terms)[0], rtol=1e-5, atol=1e-5)


def test_empty_batch(impl):
    case = a_case(0, 9)
    loss, d_hidden, d_weight = ours(case, some_terms(case, full=True), impl=impl)
    assert loss == 0.0
    assert d_hidden.shape == (0, 16)
    assert d_weight.abs().max() == 0.0


def test_errors_name_the_argument(impl):
    case = a_case(4, 9)
    terms = some_terms(case, full=True)
    far = terms.logprobs.to("meta")
    for match, bad in [
        (r"logprobs: got shape \[3\]; must be \[4\]", replace(terms, logprobs=terms.logprobs[:3])),
        (r"advantages: got torch.float64; must be torch.float32", replace(terms, advantages=terms.advantages.double())),
        (r"anchor.ref_logprobs: is on meta", replace(terms, anchor=Anchor(terms.logprobs, far, 0.2, "k2"))),
        (r"anchor.logprobs: is on meta", replace(terms, anchor=Anchor(far, terms.logprobs, 0.2, "k2"))),
        (r"weights: got shape \[3\]; must be \[4\]", replace(terms, weights=terms.logprobs[:3])),
        (r"clip.low: 0; must be positive", replace(terms, clip=Clip(0, 0.2))),
        (r"clip.high: -1; must be positive", replace(terms, clip=Clip(0.2, -1))),
        (r"temperature: -1\.0; must be positive", replace(terms, temperature=-1.0)),
    ]:
        with pytest.raises(ValueError, match=match):
            linear_ppo(case.hidden, case.weight, case.labels, bad, impl=impl)


def split_on_this_rank(columns: int, vocab: int, impl: Impl) -> list[torch.Tensor]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    case = a_case(21, vocab, scale=3.0, seed=7)
    terms = some_terms(case, full=True)
    own = case._replace(weight=shard_of(case.weight, rank, columns))
    shard = {"vocab_start": rank * columns, "vocab_size": vocab, "group": dist.group.WORLD}
    with pytest.MonkeyPatch.context() as patch:  # the process goes on to other tests
        patch.setattr(_projection, "CPU_ELEMENTS", 8 * columns)
        return ours(own, terms, impl=impl, **shard)


@pytest.mark.parametrize(("ranks", "columns", "vocab"), [(1, 128, 101), (2, 64, 101), (4, 64, 101)])
def test_split_vocabularies_equal_the_whole_and_each_other(ranks, columns, vocab, impl):
    results = run_ranks(split_on_this_rank, ranks, columns, vocab, impl)
    case = a_case(21, vocab, scale=3.0, seed=7)
    terms = some_terms(case, full=True)
    expected = exact(case, terms)
    plain = worst(exact(case, terms, torch.float32), expected)
    for result in results:
        assert torch.equal(result[0], results[0][0])
        assert torch.equal(result[1], results[0][1])
    d_weight = torch.cat([result[2] for result in results])
    assert worst([*results[0][:2], d_weight[:vocab]], expected) <= 2 * plain + 1e-5
    assert d_weight[vocab:].abs().sum() == 0.0
    assert not math.isclose(float(expected[0]), 0.0, abs_tol=1e-3)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_terms_of_some_tokens_are_theirs(loss: str) -> None:
    """A part of the tokens by itself: as a chunk of all of them."""
    terms, chosen = LOSSES[loss](a_case(24, 50)), slice(5, 17)
    new, entropy = torch.linspace(-3, -1, 12), torch.linspace(0, 2, 12)
    of_all = terms.loss(new, entropy, chosen, impl="reference")
    alone = terms.rows(chosen).loss(new, entropy, slice(None), impl="reference")
    assert torch.equal(of_all[0], alone[0])
    assert torch.equal(of_all[1], alone[1])
