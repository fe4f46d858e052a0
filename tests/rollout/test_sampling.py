"""The sampler draws from the right distribution, with random numbers that depend on nothing but their place."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megarlhf.rollout.sampling import sample, stream_ids, uniforms


def chi2_limit(freedom: int) -> float:
    """99.9 % quantile of chi-square with `freedom` degrees of freedom (Wilson and Hilferty 1931; good to 1 %)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


def draws(count: int, seed: int = 11) -> Tensor:
    return uniforms(seed, torch.zeros(count, dtype=torch.int64), torch.arange(count))


def chi_square(counts: Tensor, p: Tensor) -> float:
    expected = p * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def kept_by_loop(logits: list[float], top_k: int, top_p: float) -> list[int]:
    """The kept tokens of one row, in plain Python: top-k, then top-p over what is left."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    weights = [math.exp(logits[i]) for i in order]
    kept, mass = [], 0.0
    for i, weight in zip(order, weights, strict=True):
        if mass >= top_p * sum(weights):
            break
        kept.append(i)
        mass += weight
    return sorted(kept)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    logits = torch.randn(8, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(logits.expand(20_000, 8), draws(20_000), temperature=temperature)
    p = (logits / temperature).softmax(0)
    assert chi_square(tokens.bincount(minlength=8).double(), p.double()) < chi2_limit(7)
    torch.testing.assert_close(logprobs, p.log()[tokens])


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.6), (9, 0.8), (1, 1.0), (40, 0.05)])
def test_only_kept_tokens_are_drawn_in_their_proportions(top_k: int, top_p: float) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    tokens, logprobs = sample(logits.expand(20_000, 40), draws(20_000), temperature=1.0, top_k=top_k, top_p=top_p)
    kept = torch.tensor(kept_by_loop(logits.tolist(), top_k, top_p))
    counts = tokens.bincount(minlength=40)
    assert counts.nonzero()[:, 0].tolist() == kept.tolist()
    p = logits[kept].double().softmax(0)
    if len(kept) > 1:
        assert chi_square(counts[kept].double(), p) < chi2_limit(len(kept) - 1)
    # What the trainer recomputes is the whole softmax, whatever was cut.
    torch.testing.assert_close(logprobs, logits.log_softmax(0)[tokens])


def test_many_random_rows_keep_what_the_loop_keeps() -> None:
    logits = torch.randn(64, 13, generator=torch.Generator().manual_seed(9)) * 3
    for top_k, top_p in ((3, 1.0), (0, 0.5), (6, 0.7), (0, 0.999), (13, 1.0)):
        repeated = logits.repeat_interleave(2000, 0)
        tokens, _ = sample(repeated, draws(len(repeated)), temperature=1.0, top_k=top_k, top_p=top_p)
        for row, drawn in enumerate(tokens.view(64, 2000)):
            allowed = set(kept_by_loop(logits[row].tolist(), top_k, top_p))
            assert set(drawn.tolist()) <= allowed


def test_the_draw_is_the_inverse_of_the_distribution_function() -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    u = torch.tensor([1e-7, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-24])
    tokens, _ = sample(p.log().expand(6, 6), u, temperature=1.0)
    assert tokens.tolist() == [1, 1, 3, 3, 4, 4]


def test_ties_at_the_edge_are_kept() -> None:
    logits = torch.tensor([1.0, 2.0, 1.0, 0.0]).log()
    for top_k, top_p in ((2, 1.0), (0, 0.6)):
        tokens, _ = sample(logits.expand(500, 4), draws(500), temperature=1.0, top_k=top_k, top_p=top_p)
        assert set(tokens.tolist()) == {0, 1, 2}


def test_temperature_zero_is_greedy() -> None:
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(1))
    tokens, logprobs = sample(logits, draws(50), temperature=0.0, top_p=0.3)
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).max(-1).values)


def test_bf16_logits_become_fp32_before_the_softmax() -> None:
    logits = (torch.randn(4, 1000, generator=torch.Generator().manual_seed(1)) * 4).bfloat16()
    tokens, logprobs = sample(logits, draws(4), temperature=0.7)
    expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    # fp32's error over a sum of 1000 terms; bf16's would be 1e-2.
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=0)


def test_nan_logits_give_nan_logprobs_and_a_valid_token() -> None:
    tokens, logprobs = sample(torch.full((1, 7), float("nan")), draws(1), temperature=1.0)
    assert 0 <= int(tokens) < 7
    assert logprobs.isnan().all()


def splitmix64(x: int) -> int:
    """The published finaliser, on Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1, -5])
def test_uniforms_are_splitmix64_of_seed_stream_and_position(seed: int) -> None:
    streams, positions = torch.tensor([0, 7, -3, 2**62]), torch.tensor([0, 1, 1000, 2])
    for got, stream, position in zip(
        uniforms(seed, streams, positions), streams.tolist(), positions.tolist(), strict=True
    ):
        bits = splitmix64(splitmix64(splitmix64(seed % 2**64) ^ stream % 2**64) ^ position % 2**64)
        assert float(got) == ((bits >> 41) + 0.5) / 2**23


def test_splitmix64_matches_its_published_output() -> None:
    # First outputs of the generator with state 0, Vigna's splitmix64.c.
    assert [splitmix64(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    grid = uniforms(5, stream_ids(torch.arange(200), torch.zeros(200, dtype=torch.int64))[:, None], torch.arange(200))
    assert ((grid > 0) & (grid < 1)).all()
    flat = grid.flatten().double()
    assert chi_square(
        (flat * 32).long().bincount(minlength=32).double(), torch.full((32,), 1 / 32).double()
    ) < chi2_limit(31)
    for other in (grid.roll(1, 0), grid.roll(1, 1), uniforms(6, torch.arange(200)[:, None], torch.arange(200))):
        # 40 000 pairs: the correlation of independent numbers has standard deviation 1 / 200.
        assert abs(float(torch.corrcoef(torch.stack([flat, other.flatten().double()]))[0, 1])) < 4 / 200


def test_streams_differ_by_prompt_and_sample() -> None:
    prompts, samples = torch.arange(100).repeat_interleave(50), torch.arange(50).repeat(100)
    assert len(stream_ids(prompts, samples).unique()) == 5000
