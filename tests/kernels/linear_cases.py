"""What the tests of `linear_logprob` and `linear_ppo` share: cases, oracles in fp64, and vocabularies cut in shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megarlhf_kernels import Anchor, Clip, PolicyTerms, linear_logprob, linear_ppo
from megarlhf_kernels.linear_ppo import Estimator, definition


class Case(NamedTuple):
    """Inputs and upstream gradients; fp32, random."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    d_logprobs: Tensor
    d_entropy: Tensor


def a_case(count: int, vocab: int, width: int = 16, *, scale: float = 1.0, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    return Case(
        torch.randn(count, width, generator=generator),
        scale * torch.randn(vocab, width, generator=generator) / width**0.5,
        torch.randint(0, vocab, (count,), generator=generator),
        torch.randn(count, generator=generator),
        torch.randn(count, generator=generator),
    )


def leaves(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies of hidden and weight that want gradients."""
    return case.hidden.to(dtype, copy=True).requires_grad_(), case.weight.to(dtype, copy=True).requires_grad_()


def shard_of(weight: Tensor, rank: int, columns: int) -> Tensor:
    """Rows rank * columns.. of a vocabulary padded with rows whose logits would drown all others."""
    missing = max(0, (rank + 1) * columns - len(weight))
    return torch.nn.functional.pad(weight, (0, 0, 0, missing), value=1e4)[rank * columns : (rank + 1) * columns]


def worst(got, expected) -> float:
    """Largest absolute difference between two lists of tensors."""
    pairs = zip(got, expected, strict=True)
    return max((a.double() - b.double()).abs().max().item() if a.numel() else 0.0 for a, b in pairs)


def some_terms(case: Case, *, full: bool, temperature: float = 0.6) -> PolicyTerms:
    """Old log-probs scattered around the new ones, so that about half of the ratios are clipped, on both sides."""
    generator = torch.Generator().manual_seed(5)
    count = len(case.labels)
    old, _ = linear_logprob(case.hidden, case.weight, case.labels, temperature=temperature)
    noise = torch.randn(3, count, generator=generator).to(old.device)
    terms = PolicyTerms(old + noise[0], noise[1], clip=Clip(0.2, 0.2), temperature=temperature)
    weights = torch.rand(count, generator=generator).to(old.device)
    anchor = Anchor(old - noise[0] / 3, old + noise[2], 0.2, "k2")
    return replace(terms, entropy_coef=0.3, anchor=anchor, weights=weights) if full else terms


def other_terms(case: Case, *, estimator: Estimator = "k2", **changes: Any) -> PolicyTerms:
    """A loss with everything, some of it otherwise than in `some_terms`."""
    terms = some_terms(case, full=True)
    assert terms.anchor is not None
    return replace(terms, anchor=replace(terms.anchor, estimator=estimator), **changes)


LOSSES: dict[str, Callable[[Case], PolicyTerms]] = {
    "clip": partial(some_terms, full=False),
    "clip, k2": partial(some_terms, full=True),
    "dual clip, k1": partial(other_terms, clip=Clip(0.1, 0.4, 1.3), estimator="k1"),
    "dual clip, k3": partial(other_terms, clip=Clip(0.3, 0.2, 3.0), estimator="k3"),
    "cispo, k2": partial(other_terms, surrogate="cispo", clip=Clip(1.0, 0.3)),
    "cispo, k3": partial(other_terms, surrogate="cispo", estimator="k3"),
}
"""What a loss can be; all but the first have weights, an entropy bonus, and a KL to a reference."""


def of_each(terms: PolicyTerms, change: Callable[[Tensor], Tensor]) -> PolicyTerms:
    """The terms with every tensor changed."""
    tensors = {name: change(x) for name, x in vars(terms).items() if isinstance(x, Tensor)}
    if terms.anchor is not None:
        anchor = replace(
            terms.anchor, logprobs=change(terms.anchor.logprobs), ref_logprobs=change(terms.anchor.ref_logprobs)
        )
        terms = replace(terms, anchor=anchor)
    return replace(terms, **tensors)


def exact(case: Case, terms: PolicyTerms, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Loss and its gradients by the definition."""
    hidden, weight = leaves(case, dtype)
    loss = definition(hidden, weight, case.labels, of_each(terms, Tensor.double) if dtype == torch.float64 else terms)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def ours(case: Case, terms: PolicyTerms, **options) -> list[Tensor]:
    hidden, weight = leaves(case, torch.float32)
    loss, *_ = linear_ppo(hidden, weight, case.labels, terms, **options)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


def assert_as_good_as_torch(case: Case, terms: PolicyTerms, **options: Any) -> None:
    """Loss and each gradient are as near to fp64 as plain torch's are, but for a factor of 2 and a rounding of sums."""
    expected, plain = exact(case, terms), exact(case, terms, torch.float32)
    for got, theirs, want in zip(ours(case, terms, **options), plain, expected, strict=True):
        rounding = 1e-6 * max(10.0, float(want.abs().max())) if want.numel() else 0.0
        assert worst([got], [want]) <= 2 * worst([theirs], [want]) + rounding
