"""Exact KL from hidden states: what `full_kl` says of whole logits, in chunks, in halves, over split vocabularies."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megarlhf_kernels import _projection
from megarlhf_kernels.full_kl import full_kl
from megarlhf_kernels.linear_kl import Projected, definition, linear_kl
from tests.helpers.ranks import run_ranks


def a_case(count: int, vocab: int, dtype: torch.dtype = torch.float32) -> tuple[Projected, Projected]:
    """Two models of different width over one vocabulary, some nats apart."""
    generator = torch.Generator().manual_seed(count)
    sizes = ((count, 12), (vocab, 12), (count, 7), (vocab, 7))
    a, b, c, d = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return Projected(a, b), Projected(c, d)


def doubled(model: Projected) -> Projected:
    return Projected(model.hidden.double(), model.weight.double())


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("count", "vocab"), [(1, 7), (9, 131), (0, 5)])
def test_matches_fp64_as_well_as_whole_logits_do(count: int, vocab: int, impl) -> None:
    policy, reference = a_case(count, vocab)
    expected = definition(doubled(policy), doubled(reference), temperature=0.7)
    plain = full_kl(policy.hidden @ policy.weight.T, reference.hidden @ reference.weight.T, temperature=0.7)
    got = linear_kl(policy, reference, temperature=0.7, impl=impl)
    assert (got.shape, got.dtype) == ((count,), torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
    assert count == 0 or (expected > 0.1).any()


def test_chunks_of_rows_are_all_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = a_case(11, 50)
    whole = linear_kl(policy, reference)
    chunks: list[int] = []

    def counted(logits: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        chunks.append(len(logits))
        return full_kl(logits, *args, **options)

    monkeypatch.setattr(_projection, "CPU_ELEMENTS", 150)
    monkeypatch.setattr(importlib.import_module("megarlhf_kernels.linear_kl"), "full_kl", counted)
    torch.testing.assert_close(linear_kl(policy, reference), whole, rtol=1e-6, atol=1e-6)
    assert sorted(chunks) == [2, 3, 3, 3]


def test_it_is_of_the_policy_to_the_reference_and_zero_to_itself() -> None:
    policy, reference = a_case(6, 20)
    there, back = linear_kl(policy, reference), linear_kl(reference, policy)
    assert (there - back).abs().max() > 0.1
    assert linear_kl(policy, policy).tolist() == [0.0] * 6
    assert not linear_kl(Projected(policy.hidden.requires_grad_(), policy.weight), reference).requires_grad


def test_halves_become_fp32_logits() -> None:
    """Logits rounded to bf16 would be off by up to 2^-9 of themselves, which is more than this."""
    policy, reference = a_case(9, 131, torch.bfloat16)
    expected = definition(doubled(policy), doubled(reference))
    torch.testing.assert_close(linear_kl(policy, reference).double(), expected, rtol=1e-5, atol=1e-5)


def test_other_tokens_are_refused() -> None:
    policy, reference = a_case(6, 20)
    with pytest.raises(ValueError, match=r"policy has 6 states and 20 columns, reference 5 and 20"):
        linear_kl(policy, Projected(reference.hidden[:5], reference.weight))


def split_on_this_rank() -> torch.Tensor:
    """This rank's half of a vocabulary of 131, padded to 132."""
    dist.init_process_group("gloo")
    start = 66 * dist.get_rank()
    own = [
        Projected(model.hidden, torch.nn.functional.pad(model.weight, (0, 0, 0, 1), value=1e4)[start : start + 66])
        for model in a_case(9, 131)
    ]
    return linear_kl(own[0], own[1], vocab_start=start, vocab_size=131, group=dist.group.WORLD)


def test_a_split_vocabulary_equals_the_whole() -> None:
    first, second = run_ranks(split_on_this_rank, 2)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, linear_kl(*a_case(9, 131)), rtol=1e-5, atol=1e-5)
