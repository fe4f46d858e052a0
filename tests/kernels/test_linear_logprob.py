"""Log-probs from hidden states: fp64 oracles, chunks, gradients added elsewhere, split vocabularies, memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megarlhf_kernels import _projection, linear_logprob
from megarlhf_kernels.dispatch import Impl
from megarlhf_kernels.linear_logprob import definition
from tests.helpers.ranks import run_ranks
from tests.kernels.linear_cases import Case, a_case, leaves, shard_of, worst


@pytest.fixture(params=["reference", "triton"])
def impl(request: pytest.FixtureRequest) -> Impl:
    return request.param


def by(function, case: Case, dtype: torch.dtype = torch.float32, **options) -> list[torch.Tensor]:
    """Log-probs, entropy, and the gradients of hidden and weight."""
    hidden, weight = leaves(case, dtype)
    logprobs, entropy = function(hidden, weight, case.labels, **options)
    total = case.d_logprobs.to(logprobs) @ logprobs + case.d_entropy.to(entropy) @ entropy
    return [logprobs.detach(), entropy.detach(), *torch.autograd.grad(total, (hidden, weight))]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("count", "vocab"), [(1, 1), (33, 7), (20, 1000), (5, 16_032)])
def test_matches_fp64_as_well_as_plain_torch_does(count, vocab, temperature, impl, monkeypatch):
    monkeypatch.setattr(_projection, "CPU_ELEMENTS", 8 * vocab)  # chunks of 8 rows, the last one ragged
    monkeypatch.setattr(_projection, "CPU_KEPT", 2)
    case = a_case(count, vocab, scale=4.0)
    expected = by(definition, case, torch.float64, temperature=temperature)
    plain = worst(by(definition, case, temperature=temperature), expected)
    assert worst(by(linear_logprob, case, temperature=temperature, impl=impl), expected) <= 2 * plain + 1e-6


@pytest.mark.parametrize("kept", [0, 1, 3, 9])
def test_kept_logits_change_no_result_and_serve_once(kept, monkeypatch):
    monkeypatch.setattr(_projection, "CPU_ELEMENTS", 8 * 50)
    monkeypatch.setattr(_projection, "CPU_KEPT", kept)
    case = a_case(37, 50)
    expected = by(definition, case, torch.float64)
    hidden, weight = leaves(case, torch.float64)
    logprobs, entropy = linear_logprob(hidden, weight, case.labels)
    total = case.d_logprobs.double() @ logprobs + case.d_entropy.double() @ entropy
    for _ in range(2):
        gradients = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
        assert worst([logprobs, entropy, *gradients], expected) < 1e-12


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(_projection, "CPU_ELEMENTS", 3 * 11)
    case = a_case(7, 11, 5)
    options = {"temperature": 0.7, "vocab_size": 9}
    labels = case.labels.clamp(max=8)
    assert torch.autograd.gradcheck(lambda h, w: linear_logprob(h, w, labels, **options), leaves(case, torch.float64))


def test_the_gradient_of_one_output_or_one_input_alone(impl):
    case = a_case(9, 30)
    for upstream in (case._replace(d_logprobs=0 * case.d_logprobs), case._replace(d_entropy=0 * case.d_entropy)):
        expected = by(definition, upstream, torch.float64)
        hidden, weight = leaves(case, torch.float32)
        logprobs, entropy = linear_logprob(hidden, weight, case.labels, impl=impl)
        one = upstream.d_entropy @ entropy if upstream.d_entropy.any() else upstream.d_logprobs @ logprobs
        (d_hidden,) = torch.autograd.grad(one, hidden, retain_graph=True)
        (d_weight,) = torch.autograd.grad(one, weight)
        assert worst([d_hidden, d_weight], expected[2:]) < 1e-5


def test_entropy_is_optional_and_changes_no_bit(impl):
    case = a_case(20, 300, scale=30.0)
    gradients = []
    for with_entropy in (True, False):
        hidden, weight = leaves(case, torch.float32)
        logprobs, entropy = linear_logprob(hidden, weight, case.labels, with_entropy=with_entropy, impl=impl)
        assert entropy.shape == ((20,) if with_entropy else (0,))
        assert entropy.requires_grad is with_entropy
        gradients.append([logprobs.detach(), *torch.autograd.grad(case.d_logprobs @ logprobs, (hidden, weight))])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_the_weights_gradient_is_added_where_told(impl):
    case = a_case(12, 40)
    expected = by(definition, case, torch.float64)
    hidden, weight = leaves(case, torch.float32)
    weight_grad = torch.full_like(weight, 3.0).detach()
    for _ in range(2):
        logprobs, entropy = linear_logprob(hidden, weight, case.labels, weight_grad=weight_grad, impl=impl)
        (case.d_logprobs @ logprobs + case.d_entropy @ entropy).backward()
    assert weight.grad is None
    assert hidden.grad is not None
    assert worst([hidden.grad, weight_grad - 3.0], [2 * expected[2], 2 * expected[3]]) < 1e-5


def test_half_precision_weights_have_fp32_logits(impl):
    """Only the inputs' own rounding remains: bf16 logits of this size would be off by 0.06."""
    case = a_case(30, 200, scale=20.0)
    rounded = case._replace(hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16())
    exact = by(definition, rounded, torch.float64)
    got = by(linear_logprob, rounded, torch.bfloat16, impl=impl)
    assert got[0].dtype == torch.float32
    assert worst(got[:2], exact[:2]) < 1e-4
    assert got[2].dtype == got[3].dtype == torch.bfloat16
    for gradient, expected in zip(got[2:], exact[2:], strict=True):
        assert (gradient.double() - expected).norm() < 2**-7 * expected.norm()  # one rounding, in the interpreter a cut


@pytest.mark.parametrize("level", [-1e4, 0.0, 1e4])
def test_equal_logits_are_uniform_at_any_level(level, impl):
    hidden, weight = torch.ones(3, 1), torch.full((11, 1), level)
    logprobs, entropy = linear_logprob(hidden, weight, torch.tensor([0, 5, 10]), impl=impl)
    torch.testing.assert_close(logprobs, torch.full((3,), -math.log(11)), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy, torch.full((3,), math.log(11)), rtol=1e-6, atol=0)


def test_padded_rows_of_the_weight_and_foreign_labels_learn_nothing(impl):
    case = a_case(6, 20)
    labels = torch.tensor([-1, 20, 25, 3, 4, 5])
    hidden = case.hidden.clone().requires_grad_()
    weight = torch.nn.functional.pad(case.weight, (0, 0, 0, 4), value=math.nan).requires_grad_()
    logprobs, _ = linear_logprob(hidden, weight, labels, vocab_size=20, impl=impl)
    assert (logprobs[:3] < -1e29).all()
    d_hidden, d_weight = torch.autograd.grad(case.d_logprobs @ logprobs, (hidden, weight))
    assert d_weight[20:].abs().max() == 0.0
    # What is multiplied by the padding's gradient of 0 must be finite: Megatron pads with real weights.
    finite = torch.nn.functional.pad(case.weight, (0, 0, 0, 4), value=9.0)
    logprobs, _ = linear_logprob(hidden, finite, labels, vocab_size=20, impl=impl)
    (d_hidden,) = torch.autograd.grad(case.d_logprobs @ logprobs, hidden)
    assert d_hidden[:3].abs().max() == 0.0
    expected = by(definition, a_case(6, 20)._replace(labels=labels.clamp(0, 19), d_entropy=0 * case.d_entropy))
    torch.testing.assert_close(d_hidden[3:], expected[2][3:], rtol=1e-5, atol=1e-6)


def test_empty_batch(impl):
    logprobs, entropy, d_hidden, d_weight = by(linear_logprob, a_case(0, 9), impl=impl)
    assert logprobs.shape == entropy.shape == (0,)
    assert d_hidden.shape == (0, 16)
    assert d_weight.abs().max() == 0.0


def test_errors_name_the_argument(impl):
    case = a_case(4, 9)
    hidden, weight, labels = case[:3]
    for match, arguments, options in [
        (r"hidden: got shape \[16\]; must be \[any, any\]", (hidden[0], weight, labels), {}),
        (r"weight: got shape \[9, 15\]; must be \[any, 16\]", (hidden, weight[:, :15], labels), {}),
        (r"weight: got torch.float64; must be torch.float32", (hidden, weight.double(), labels), {}),
        (r"weight: strides \[1, 9\]", (hidden, weight.t().contiguous().t(), labels), {}),
        (r"labels: got torch.int32", (hidden, weight, labels.int()), {}),
        (r"labels: is on meta", (hidden, weight, labels.to("meta")), {}),
        (r"weight_grad: got torch.bfloat16", (hidden, weight, labels), {"weight_grad": weight.bfloat16()}),
        (r"weight_grad: got shape \[3, 16\]; must be \[9, 16\]", (hidden, weight, labels), {"weight_grad": weight[:3]}),
        (r"temperature: nan; must be positive", (hidden, weight, labels), {"temperature": math.nan}),
    ]:
        with pytest.raises(ValueError, match=match):
            linear_logprob(*arguments, impl=impl, **options)


def split_on_this_rank(columns: int, vocab: int, impl: Impl) -> list[torch.Tensor]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    case = a_case(21, vocab, scale=30.0, seed=7)
    own = case._replace(weight=shard_of(case.weight, rank, columns))
    shard = {"vocab_start": rank * columns, "vocab_size": vocab, "group": dist.group.WORLD}
    with pytest.MonkeyPatch.context() as patch:  # the process goes on to other tests
        patch.setattr(_projection, "CPU_ELEMENTS", 8 * columns)
        return by(linear_logprob, own, temperature=0.6, impl=impl, **shard)


@pytest.mark.parametrize(
    ("ranks", "columns", "vocab"),
    [(1, 128, 101), (2, 50, 100), (2, 64, 101), (4, 64, 101)],  # even, ragged, two shards of nothing but padding
)
def test_split_vocabularies_equal_the_whole_and_each_other(ranks, columns, vocab, impl):
    results = run_ranks(split_on_this_rank, ranks, columns, vocab, impl)
    case = a_case(21, vocab, scale=30.0, seed=7)
    expected = by(definition, case, torch.float64, temperature=0.6)
    plain = worst(by(definition, case, temperature=0.6), expected)
    for result in results:
        for part, first in zip(result[:3], results[0][:3], strict=True):
            assert torch.equal(part, first)  # bitwise, the summed gradient of hidden too: ranks must not drift apart
    d_weight = torch.cat([result[3] for result in results])
    assert worst([*results[0][:3], d_weight[:vocab]], expected) <= 2 * plain + 1e-6
    assert d_weight[vocab:].abs().sum() == 0.0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_needs_a_quarter_of_the_memory_of_logits_and_log_softmax():
    case = a_case(4096, 32_768, 32)

    def added_peak(function) -> int:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's name for "reset the peak resident size"
        before = resident("VmRSS")
        by(function, case._replace(d_entropy=0 * case.d_entropy))
        return resident("VmHWM") - before

    def logprobs_alone(hidden, weight, labels):
        logprobs = torch.log_softmax(hidden @ weight.t(), dim=1).gather(1, labels[:, None])[:, 0]
        return logprobs, logprobs

    assert added_peak(linear_logprob) <= added_peak(logprobs_alone) / 4


def resident(field: str) -> int:
    """KiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
