"""What a PPO iteration reports, each by its formula in observe/metrics.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.data.prompts import PromptSet
from megarlhf.data.texts import response_texts
from megarlhf.data.tokenizer import Tokenizer
from megarlhf.judges.rules import Verifier, verify
from megarlhf.models.role import Update
from megarlhf.observe.metrics import Metrics
from megarlhf.ops.advantages import Advantages
from megarlhf.ops.kl import kl_k1, kl_k3
from megarlhf.ops.masked import masked_mean, masked_sum, masked_var
from megarlhf.trainers.ppo_estimate import Scored


def experience_metrics(scored: Scored, estimate: Advantages, *, kl_coef: float) -> Metrics:
    """Of the global batch, before the optimiser has moved anything."""
    rollout, scores, mask = scored.rollout, scored.scores, scored.rollout.response_mask
    kl = kl_k1(scored.logprobs, scored.ref_logprobs)
    gap = (rollout.sampler_logprobs - scored.logprobs).abs()
    lengths = rollout.response_lengths.float()
    rows = len(rollout)
    reference_kl = float(masked_sum(kl, mask)) / rows
    residual = masked_var(estimate.returns - scored.values, mask)
    spread = masked_var(estimate.returns, mask)
    return {
        "rollout/score_mean": float(scores.mean()),
        "rollout/score_std": float(scores.std(correction=0)),
        "rollout/score_min": float(scores.min()),
        "rollout/score_max": float(scores.max()),
        "rollout/reward_mean": float(masked_sum(estimate.token_level_rewards, mask)) / rows,
        "rollout/response_length_mean": float(lengths.mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/prompt_length_mean": float(rollout.prompt_lengths.float().mean()),
        "rollout/truncated_fraction": float((~rollout.terminated).float().mean()),
        "rollout/sampler_gap_max": float(gap.masked_fill(~mask, 0.0).max()),
        "rollout/sampler_gap_mean": float(masked_mean(gap, mask)),
        "rollout/tokens": float(mask.sum()),
        "kl/reference_mean": reference_kl,
        "kl/reference_k3_mean": float(masked_sum(kl_k3(scored.logprobs, scored.ref_logprobs), mask)) / rows,
        "kl/reference_per_token": float(masked_mean(kl, mask)),
        "kl/penalty_mean": kl_coef * reference_kl,
        "kl/coef": kl_coef,
        "policy/advantage_std": float(masked_var(estimate.advantages, mask)) ** 0.5,
        "value/mean": float(masked_mean(scored.values, mask)),
        "value/return_mean": float(masked_mean(estimate.returns, mask)),
        "value/explained_variance": 1.0 - float(residual) / max(float(spread), 1e-12),
    }


def learner_metrics(actor: Sequence[Update], critic: Sequence[Update]) -> Metrics:
    """Means over the optimiser steps of an iteration; the first step apart, where the ratio must be 1."""
    metrics: Metrics = {
        "value/loss": _mean([update.means.loss for update in critic]),
        "value/clip_fraction": _mean([update.means.metrics["clip_fraction"] for update in critic]),
        "value/grad_norm": _mean([update.grad_norm for update in critic]),
        "value/learning_rate": critic[-1].learning_rate,
    }
    if actor:
        of = {name: [update.means.metrics[name] for update in actor] for name in actor[0].means.metrics}
        metrics |= {
            "policy/loss": _mean([update.means.loss for update in actor]),
            "policy/clip_fraction": _mean(of["clip_fraction"]),
            "policy/approx_kl": _mean(of["approx_kl"]),
            "policy/ratio_mean": _mean(of["ratio"]),
            "policy/entropy_mean": _mean(of["entropy"]),
            "policy/first_clip_fraction": of["clip_fraction"][0],
            "policy/first_ratio_gap": abs(of["ratio"][0] - 1.0),
            "policy/grad_norm": _mean([update.grad_norm for update in actor]),
            "policy/learning_rate": actor[-1].learning_rate,
        }
    return metrics


def judged_rollouts(
    rollout: Rollout, scores: Tensor, tokenizer: Tokenizer, verifier: Verifier | None, prompts: PromptSet
) -> list[dict[str, Any]]:
    """Every rollout as text with its score, and the verdict where there are a verifier and an answer (else None).

    A prompt is shown as `prompts` have it, text or a conversation.
    """
    columns = zip(
        prompts.said_in(rollout.prompt_ids),
        response_texts(rollout, tokenizer),
        rollout.answers,
        scores.tolist(),
        strict=True,
    )
    return [
        {
            "prompt": prompt,
            "response": response,
            "answer": answer,
            "score": score,
            "correct": verify(response, answer, verifier) if answer and verifier else None,
        }
        for prompt, response, answer, score in columns
    ]


def accuracy_metric(judged: Sequence[Mapping[str, object]]) -> Metrics:
    """How many rollouts were verified, and which share of them is right; nothing where there are no verdicts."""
    verdicts = [row["correct"] for row in judged if row["correct"] is not None]
    if not verdicts:
        return {}
    return {"rollout/accuracy": verdicts.count(True) / len(verdicts), "rollout/verified": len(verdicts)}


def _mean(values: Sequence[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).mean())
