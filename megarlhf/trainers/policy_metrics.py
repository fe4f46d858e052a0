"""What an iteration reports of its rollouts and its learners, each by its formula in observe/metrics.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.data.prompts import PromptSet
from megarlhf.data.texts import response_texts
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.judges.panel import Judgement
from megarlhf.models.exact_kl import exact_kl
from megarlhf.models.role import Role, Update
from megarlhf.observe.metrics import FIRST_STEPS, Metrics
from megarlhf.ops.kl import kl_estimate
from megarlhf.ops.masked import masked_mean, masked_sum, masked_var
from megarlhf.ops.sampler_correction import token_mult_prob_error
from megarlhf_kernels.linear_ppo import Estimator


def rollout_metrics(rollout: Rollout, logprobs: Tensor, scores: Tensor, token_level_rewards: Tensor) -> Metrics:
    """Of the global batch, before the optimiser has moved anything.

    Shapes:   logprobs that the ratio starts from, and token_level_rewards [B, T]; scores [B], before any penalty.
    """
    return {
        **score_metrics(scores),
        "rollout/reward_mean": float(masked_sum(token_level_rewards, rollout.response_mask)) / len(rollout),
        **length_metrics(rollout),
        **(gap_metrics(rollout, logprobs) if logprobs is not rollout.sampler_logprobs else {}),
    }


def gap_metrics(rollout: Rollout, logprobs: Tensor) -> Metrics:
    """How far the sampler is from the trainer, whose log-probs are [B, T]."""
    mask = rollout.response_mask
    gap = (rollout.sampler_logprobs - logprobs).abs()
    return {
        "rollout/sampler_gap_max": float(gap.masked_fill(~mask, 0.0).max()),
        "rollout/sampler_gap_mean": float(masked_mean(gap, mask)),
        "rollout/token_mult_prob_error": float(token_mult_prob_error(logprobs, rollout.sampler_logprobs, mask)),
    }


def score_metrics(scores: Tensor) -> Metrics:
    """Of scores [B], before any penalty."""
    return {
        "rollout/score_mean": float(scores.mean()),
        "rollout/score_std": float(scores.std(correction=0)),
        "rollout/score_min": float(scores.min()),
        "rollout/score_max": float(scores.max()),
    }


def length_metrics(rollout: Rollout) -> Metrics:
    """Of prompts and responses."""
    lengths = rollout.response_lengths.float()
    return {
        "rollout/response_length_mean": float(lengths.mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/prompt_length_mean": float(rollout.prompt_lengths.float().mean()),
        "rollout/truncated_fraction": float((~rollout.terminated).float().mean()),
        "rollout/tokens": float(rollout.response_lengths.sum()),
    }


def step_metrics(judgement: Judgement, rollout: Rollout) -> Metrics:
    """Of each judge of steps: how many and how long they are, and which of them earn.

    A policy that is rewarded by steps may make more of them, or fewer and longer ones, rather than better ones.
    """
    metrics: Metrics = {}
    for name, verdict in judgement.verdicts.items():
        if not verdict.steps:
            continue
        sizes = [[abs(value) for value in earned] for earned in verdict.earned]
        count, total = sum(map(len, sizes)), sum(map(sum, sizes))
        shares = {f"share_{at + 1}": sum(each[at] for each in sizes if len(each) > at) for at in range(FIRST_STEPS)}
        shares["share_later"] = sum(sum(each[FIRST_STEPS:]) for each in sizes)
        metrics |= {
            f"steps/{name}_per_response": count / len(rollout),
            f"steps/{name}_tokens": float(rollout.response_lengths.sum()) / count,
            **{f"steps/{name}_{share}": value / total if total else 0.0 for share, value in shares.items()},
        }
    return metrics


def reference_metrics(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, kl_coef: float, estimator: Estimator = "k1"
) -> Metrics:
    """How far the policy is from its reference, [B, T] each, and what `kl_coef` a nat of the estimator takes for it."""
    names: set[Estimator] = {"k1", "k3", estimator}
    sums = {name: float(masked_sum(kl_estimate(logprobs, ref_logprobs, name), mask)) for name in names}
    rows, tokens = len(mask), int(mask.sum())
    return {
        "kl/reference_mean": sums["k1"] / rows,
        "kl/reference_k3_mean": sums["k3"] / rows,
        "kl/reference_per_token": sums["k1"] / max(tokens, 1),
        "kl/penalty_mean": kl_coef * sums[estimator] / rows,
        "kl/coef": kl_coef,
    }


def exact_metrics(actor: Role, reference: Role, rollout: Rollout, temperature: float) -> Metrics:
    """The same distance over the whole vocabulary. Collective: a forward pass of both."""
    kl = exact_kl(actor, reference, rollout, temperature=temperature)
    return {"kl/reference_exact": float(masked_sum(kl, rollout.response_mask)) / len(rollout)}


def advantage_metrics(advantages: Tensor, mask: Tensor) -> Metrics:
    """Of advantages [B, T] as they were estimated, before they are whitened over the batch or corrected."""
    return {"policy/advantage_std": float(masked_var(advantages, mask)) ** 0.5}


def value_metrics(values: Tensor, returns: Tensor, mask: Tensor) -> Metrics:
    """What a critic foresaw, and what came, [B, T] each."""
    residual, spread = masked_var(returns - values, mask), masked_var(returns, mask)
    return {
        "value/mean": float(masked_mean(values, mask)),
        "value/return_mean": float(masked_mean(returns, mask)),
        "value/explained_variance": 1.0 - float(residual) / max(float(spread), 1e-12),
    }


def policy_metrics(updates: Sequence[Update]) -> Metrics:
    """Means over the actor's optimiser steps of an iteration; the first apart, where the ratio must be 1."""
    if not updates:
        return {}
    of = {name: [update.means.metrics[name] for update in updates] for name in updates[0].means.metrics}
    return {
        "policy/loss": _mean([update.means.loss for update in updates]),
        "policy/clip_fraction": _mean(of["clip_fraction"]),
        "policy/approx_kl": _mean(of["approx_kl"]),
        "policy/ratio_mean": _mean(of["ratio"]),
        "policy/entropy_mean": _mean(of["entropy"]),
        "policy/first_clip_fraction": of["clip_fraction"][0],
        "policy/first_ratio_gap": abs(of["ratio"][0] - 1.0),
        "policy/grad_norm": _mean([update.grad_norm for update in updates]),
        "policy/learning_rate": updates[-1].learning_rate,
    }


def critic_metrics(updates: Sequence[Update]) -> Metrics:
    """Means over the critic's optimiser steps of an iteration."""
    return {
        "value/loss": _mean([update.means.loss for update in updates]),
        "value/clip_fraction": _mean([update.means.metrics["clip_fraction"] for update in updates]),
        "value/grad_norm": _mean([update.grad_norm for update in updates]),
        "value/learning_rate": updates[-1].learning_rate,
    }


def sample_rows(
    rollout: Rollout, judgement: Judgement, count: int, tokenizer: Tokenizer, prompts: PromptSet
) -> list[dict[str, Any]]:
    """The first `count` rollouts as text, with what was said of them.

    A prompt is shown as `prompts` have it, text or a conversation.
    """
    rows = rollout.to("cpu").rows(torch.arange(min(count, len(rollout))))
    texts = response_texts(rows, tokenizer)
    each = {name: verdict.scores.tolist() for name, verdict in judgement.verdicts.items()}
    steps = {name: verdict.steps for name, verdict in judgement.verdicts.items() if verdict.steps}
    return [
        {
            "prompt": columns["prompt"],
            "response": texts[row],
            "answer": rows.answers[row],
            "score": float(judgement.scores[row]),
            **({"scores": {name: scores[row] for name, scores in each.items()}} if len(each) > 1 else {}),
            **({"steps": {name: [*of[row]] for name, of in steps.items()}} if steps else {}),
            "correct": judgement.correct[row],
        }
        for row, columns in enumerate(prompts.columns_in(rows.prompt_ids))
    ]


def accuracy_metric(correct: Sequence[bool | None]) -> Metrics:
    """How many rollouts were verified, and which share of them is right; nothing where there are no verdicts."""
    verdicts = [right for right in correct if right is not None]
    if not verdicts:
        return {}
    return {"rollout/accuracy": verdicts.count(True) / len(verdicts), "rollout/verified": len(verdicts)}


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
