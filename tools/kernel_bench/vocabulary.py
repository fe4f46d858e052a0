"""Cases of the kernels over a vocabulary: from logits, and from hidden states."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megarlhf_kernels import Anchor, Clip, PolicyTerms, full_kl, linear_logprob, linear_ppo, token_logprob
from megarlhf_kernels.dispatch import Impl
from megarlhf_kernels.full_kl import definition as kl_definition
from megarlhf_kernels.token_logprob import definition as logprob_definition
from tools.kernel_bench.base import SUM_UPSTREAM, Case, Inputs, Maker, Outputs, Provider, Run, size_in_bytes

CLIP, ENTROPY_COEF, KL_COEF = 0.2, 0.01, 0.05


def token_logprob_cases(maker: Maker) -> Iterator[Case]:
    """Log-prob and entropy from logits."""
    tokens, vocab = maker.sizes.logits
    logits = maker.normal(tokens, vocab, seed=1, dtype=maker.dtype, scale=2.0)
    inputs = {"logits": logits, **_labels(maker, tokens, vocab)}

    def ours(impl: Impl) -> Run:
        return lambda x: _named(*token_logprob(x["logits"], x["labels"], impl=impl))

    def plain(x: Inputs) -> Outputs:
        return _named(*logprob_definition(x["logits"], x["labels"]))

    def lean(x: Inputs) -> Outputs:
        return {"logprobs": torch.log_softmax(x["logits"], dim=1).gather(1, x["labels"][:, None])[:, 0]}

    providers = [*maker.providers("token_logprob", ours, plain), Provider("torch lean", lean, lacks="no entropy")]
    common = ("token_logprob", f"N {tokens} V {vocab}", inputs, plain, providers)
    yield Case(*common, work=size_in_bytes(logits))
    yield Case(*common, work=3 * size_in_bytes(logits), leaves=("logits",))


def full_kl_cases(maker: Maker) -> Iterator[Case]:
    """KL of every token from two models' logits; the reference wants no gradient."""
    tokens, vocab = maker.sizes.logits
    logits = maker.normal(tokens, vocab, seed=1, dtype=maker.dtype, scale=2.0)
    ref_logits = logits + maker.normal(tokens, vocab, seed=2, dtype=maker.dtype, scale=0.5)
    inputs = {"logits": logits, "ref_logits": ref_logits, "d_kl": maker.normal(tokens, seed=3)}

    def ours(impl: Impl) -> Run:
        return lambda x: {"kl": full_kl(x["logits"], x["ref_logits"], impl=impl)}

    def plain(x: Inputs) -> Outputs:
        return {"kl": kl_definition(x["logits"], x["ref_logits"])}

    common = ("full_kl", f"N {tokens} V {vocab}", inputs, plain, maker.providers("full_kl", ours, plain))
    yield Case(*common, work=2 * size_in_bytes(logits))
    yield Case(*common, work=5 * size_in_bytes(logits), leaves=("logits",))


def linear_logprob_cases(maker: Maker) -> Iterator[Case]:
    """Log-prob and entropy from hidden states: 2TVH FLOP forward, 6TVH with backward, whatever a provider repeats."""

    def ours(impl: Impl) -> Run:
        return lambda x: _named(*linear_logprob(x["hidden"], x["weight"], x["labels"], impl=impl))

    def ours_lean(x: Inputs) -> Outputs:
        logprobs, _ = linear_logprob(x["hidden"], x["weight"], x["labels"], with_entropy=False)
        return {"logprobs": logprobs}

    def lean(x: Inputs) -> Outputs:
        logits = x["hidden"] @ x["weight"].t()
        return {"logprobs": torch.log_softmax(logits, dim=1).gather(1, x["labels"][:, None])[:, 0]}

    def definition(x: Inputs) -> Outputs:
        outputs = _from_logits(x)
        return {**outputs, "nll_sum": -outputs["logprobs"].sum()}

    providers = maker.providers("linear_logprob", ours, _from_logits)
    providers.append(Provider("ours lean", ours_lean, providers[0].implementation, "no entropy", is_peer=False))
    providers.append(Provider("torch lean", lean, lacks="no entropy"))
    for tokens, hidden in maker.sizes.linear:
        inputs, flop = _projection(maker, tokens, hidden), 2.0 * tokens * maker.sizes.vocab * hidden
        common = ("linear_logprob", _shape(maker, tokens, hidden), inputs, definition, providers)
        yield Case(*common, flop, "matmul", shared=("weight",))
        yield Case(*common, 3 * flop, "matmul", leaves=("hidden", "weight"), shared=("weight",))


def linear_ppo_cases(maker: Maker) -> Iterator[Case]:
    """PPO's loss, with an entropy bonus and a KL term, from hidden states; peers' log-probs get the loss in torch."""

    def ours(impl: Impl) -> Run:
        def run(x: Inputs) -> Outputs:
            factors = x["hidden"], x["weight"], x["labels"]
            loss, *_ = linear_ppo(*factors, _terms(x), loss_scale=SUM_UPSTREAM, impl=impl)
            return {"loss": loss}

        return run

    def definition(x: Inputs) -> Outputs:
        outputs = _from_logits(x)
        logprobs = outputs["logprobs"]
        sums = {"surrogate": _surrogate(x, logprobs), "nll_sum": -logprobs.sum()}
        return {**_loss(x, outputs), **_loss(x, {"logprobs": logprobs}), **sums}

    providers = maker.providers("linear_ppo", ours, _with_loss(_from_logits))
    for tokens, hidden in maker.sizes.linear:
        inputs, flop = _projection(maker, tokens, hidden), 6.0 * tokens * maker.sizes.vocab * hidden
        inputs |= _rollout(maker, inputs)
        common = ("linear_ppo", _shape(maker, tokens, hidden), inputs, definition, providers, flop, "matmul")
        yield Case(*common, leaves=("hidden", "weight"), shared=("weight",), adapt=_with_loss)


def _shape(maker: Maker, tokens: int, hidden: int) -> str:
    return f"N {tokens} V {maker.sizes.vocab} H {hidden}"


def _projection(maker: Maker, tokens: int, hidden: int) -> Inputs:
    vocab = maker.sizes.vocab
    factors = {
        "hidden": maker.normal(tokens, hidden, seed=7, dtype=maker.dtype),
        "weight": maker.normal(vocab, hidden, seed=8, dtype=maker.dtype, scale=2.0 * hidden**-0.5),
    }
    return {**factors, **_labels(maker, tokens, vocab)}


def _labels(maker: Maker, tokens: int, vocab: int) -> Inputs:
    upstream = {"d_logprobs": maker.normal(tokens, seed=4), "d_entropy": maker.normal(tokens, seed=5)}
    return {"labels": maker.whole(0, vocab, tokens, seed=6), **upstream}


def _rollout(maker: Maker, x: Inputs) -> Inputs:
    tokens = len(x["hidden"])
    with torch.no_grad():
        now, _ = linear_logprob(x["hidden"], x["weight"], x["labels"])
    ref = now + 0.1 * maker.normal(tokens, seed=11)
    return {"old": now - maker.step(tokens, seed=9), "ref": ref, "advantages": maker.normal(tokens, seed=12)}


def _named(logprobs: Tensor, entropy: Tensor) -> Outputs:
    return {"logprobs": logprobs, "entropy": entropy}


def _from_logits(x: Inputs) -> Outputs:
    return _named(*logprob_definition(x["hidden"] @ x["weight"].t(), x["labels"]))


def _terms(x: Inputs) -> PolicyTerms:
    anchor = Anchor(x["old"], x["ref"], KL_COEF, "k2")
    return PolicyTerms(x["old"], x["advantages"], Clip(CLIP, CLIP), entropy_coef=ENTROPY_COEF, anchor=anchor)


def _surrogate(x: Inputs, logprobs: Tensor) -> Tensor:
    ratio, advantages = (logprobs - x["old"]).exp(), x["advantages"]
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).sum()


def _loss(x: Inputs, outputs: Outputs) -> Outputs:
    logprobs = outputs["logprobs"].to(x["old"].dtype)
    ratio = (logprobs - x["old"]).exp().detach()
    loss = _surrogate(x, logprobs) + 0.5 * KL_COEF * (ratio * (logprobs - x["ref"]) ** 2).sum()
    if "entropy" in outputs:
        return {"loss": loss - ENTROPY_COEF * outputs["entropy"].sum()}
    return {"loss_without_entropy": loss}


def _with_loss(run: Run) -> Run:
    """The loss behind log-probs, and entropy if there is any; what is a sum already stays as it is."""

    def composed(x: Inputs) -> Outputs:
        outputs = run(x)
        return _loss(x, outputs) if "logprobs" in outputs else outputs

    return composed
