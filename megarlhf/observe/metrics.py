"""The glossary of metrics: logging a name that is not listed here is an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import NamedTuple

from megarlhf.observe.work import CONVENTION, PHASES, WORKED

Metrics = dict[str, float]


class Metric(NamedTuple):
    """Meaning of one metric: unit, formula, and how the ranks' and micro-batches' contributions become one number."""

    unit: str
    formula: str
    reduction: str


class UnknownMetricError(KeyError):
    """A metric without an entry in the glossary was logged."""

    def __str__(self) -> str:
        """Return the message without KeyError's quotes."""
        return str(self.args[0])


_ROLLOUTS = "mean over the rollouts of the iteration"
_LEARNT = "mean over the rollouts that the iteration learns from"
"""All of them, but in dapo, which draws more than it keeps."""
_LEARNT_TOKENS = "mean over the response tokens that the iteration learns from"
_TOKENS = "sum over response tokens / their global count; mean over the optimiser steps of the iteration"
_TOKENS_ONCE = "sum over response tokens / their global count"
_STEPS = "mean over the optimiser steps of the iteration"
_PEAK = "max over ranks"
_LAST = "value at the last optimiser step"

_ROLLOUT = {
    "rollout/score_mean": Metric("reward", "scores, before any penalty", _ROLLOUTS),
    "rollout/score_std": Metric("reward", "sqrt(mean((scores - mean)^2))", "over the rollouts of the iteration"),
    "rollout/score_min": Metric("reward", "min(scores)", "over the rollouts of the iteration"),
    "rollout/score_max": Metric("reward", "max(scores)", "over the rollouts of the iteration"),
    "rollout/accuracy": Metric("fraction", "[response verified as correct]", _ROLLOUTS),
    "rollout/verified": Metric("rollouts", "rollouts whose prompt has an answer", "count over the iteration"),
    "rollout/reward_mean": Metric("reward", "sum over t of token_level_rewards", _LEARNT),
    "rollout/response_length_mean": Metric("tokens", "response tokens, EOS included", _ROLLOUTS),
    "rollout/response_length_max": Metric("tokens", "longest response", "over the rollouts of the iteration"),
    "rollout/prompt_length_mean": Metric("tokens", "prompt tokens", _ROLLOUTS),
    "rollout/truncated_fraction": Metric("fraction", "[response ended without EOS]", _ROLLOUTS),
    "rollout/sampler_gap_max": Metric(
        "nats", "max over response tokens of |sampler_logprobs - logprobs|", "over the rollouts learnt from"
    ),
    "rollout/sampler_gap_mean": Metric("nats", "|sampler_logprobs - logprobs|", _LEARNT_TOKENS),
    "rollout/token_mult_prob_error": Metric(
        "1", "exp(|logprobs - sampler_logprobs|): 1 where both agree", _LEARNT_TOKENS
    ),
    "rollout/tokens": Metric("tokens", "response tokens", "sum over the rollouts of the iteration"),
}

GAPS = {"rollout/sampler_gap_max", "rollout/sampler_gap_mean", "rollout/token_mult_prob_error"}
"""How far sampler and trainer are apart; unknown with old_logprobs=sampler."""

_FP8 = {
    "fp8/shadow_gap_mean": Metric(
        "nats", "|logprobs in FP8 - logprobs in bfloat16|, both after the iteration's steps", _LEARNT_TOKENS
    ),
    "fp8/shadow_gap_max": Metric("nats", "max over response tokens of the same", "over the rollouts learnt from"),
}

_SAMPLER = {
    "sampler/changed_fraction": Metric(
        "fraction", "[sampler_correction changed or dropped the token's weight]", _LEARNT_TOKENS
    ),
    "sampler/effective_sample_fraction": Metric(
        "fraction", "(sum w)^2 / (N sum w^2) of the weights w of sampler_correction", "response tokens learnt from"
    ),
}

_GROUP = {
    "group/equal_fraction": Metric("fraction", "[all scores of the group are equal]", "mean over the groups drawn"),
    "group/score_std_mean": Metric("reward", "sqrt(mean((score - mean)^2)) in a group", "mean over the groups drawn"),
}

_DRAWS = {
    "draws/count": Metric("draws", "times that prompts were rolled out", "sum over the iteration"),
    "draws/kept_fraction": Metric("fraction", "[scores of the group differ]", "mean over the groups drawn"),
    "draws/filled_groups": Metric("groups", "groups of equal scores that fill the batch", "sum over the iteration"),
    "draws/discarded_tokens": Metric("tokens", "response tokens that nothing is learnt from", "sum over the iteration"),
}

_KL = {
    "kl/reference_mean": Metric("nats", "sum over t of k1 = logprobs - ref_logprobs", _LEARNT),
    "kl/reference_k3_mean": Metric("nats", "sum over t of k3 = exp(-k1) - 1 + k1 (never negative)", _LEARNT),
    "kl/reference_per_token": Metric("nats/token", "k1", _LEARNT_TOKENS),
    "kl/reference_exact": Metric(
        "nats", "sum over t and v of p(v) (log p(v) - log ref_p(v)), every exact_kl_every iterations", _LEARNT
    ),
    "kl/penalty_mean": Metric("reward", "kl_coef * sum over t of the estimator that is paid", _LEARNT),
    "kl/coef": Metric("reward/nat", "kl_coef in force", _LAST),
}

_POLICY = {
    "policy/loss": Metric(
        "1",
        "max(-A * ratio, -A * clip(ratio, 1 - clip_range, 1 + clip_range_high)), at most -dual_clip * A where A < 0 "
        "(cispo: -A * clip(ratio) * new_logprobs) - entropy_coef * entropy + kl_coef * the KL in the loss",
        "as loss_mean says, over the global batch; mean over the optimiser steps of the iteration",
    ),
    "policy/clip_fraction": Metric(
        "fraction",
        "[the clipped branch is the larger, or the dual clip holds]; cispo: [the ratio was clipped]",
        _TOKENS,
    ),
    "policy/approx_kl": Metric("nats", "(ratio - 1) - log_ratio, the k3 estimate of KL(old || new)", _TOKENS),
    "policy/entropy_mean": Metric("nats", "entropy of the temperature-scaled next-token distribution", _TOKENS),
    "policy/ratio_mean": Metric("1", "exp(new_logprobs - logprobs); gspo: of the response", _TOKENS),
    "policy/first_ratio_gap": Metric("1", "|ratio - 1| of the mean ratio in the first optimiser step", _TOKENS_ONCE),
    "policy/first_clip_fraction": Metric("fraction", "policy/clip_fraction of the first optimiser step", "as there"),
    "policy/advantage_std": Metric(
        "1", "standard deviation of the advantages, before whitening over the batch", "response tokens learnt from"
    ),
    "policy/grad_norm": Metric("1", "2-norm of the gradient before clipping", _STEPS),
    "policy/learning_rate": Metric("1", "the schedule's value", _LAST),
}

_VALUE = {
    "value/loss": Metric(
        "reward^2", "0.5 * max((V - R)^2, (clip(V, V_old - value_clip_range, V_old + value_clip_range) - R)^2)", _TOKENS
    ),
    "value/clip_fraction": Metric("fraction", "[the clipped branch is the larger]", _TOKENS),
    "value/explained_variance": Metric("fraction", "1 - var(returns - values) / var(returns)", "response tokens"),
    "value/mean": Metric("reward", "values when the rollout was made", "mean over the response tokens"),
    "value/return_mean": Metric("reward", "returns", "mean over the response tokens"),
    "value/grad_norm": Metric("1", "2-norm of the gradient before clipping", _STEPS),
    "value/learning_rate": Metric("1", "the schedule's value", _LAST),
}

_SFT = {
    "sft/loss": Metric("nats/token", "-logprobs on supervised tokens", "sum / global count of supervised tokens"),
    "sft/heldout_loss": Metric("nats/token", "as sft/loss", "sum / count of supervised tokens, of held-out rows"),
    "sft/heldout_loss_stderr": Metric("nats/token", "standard error of sft/heldout_loss", "over held-out rows"),
    "sft/grad_norm": Metric("1", "2-norm of the gradient before clipping", "of the step"),
    "sft/learning_rate": Metric("1", "the schedule's value", "of the step"),
    "sft/tokens": Metric("tokens", "supervised tokens", "sum over the global batch"),
}

_HELDOUT_PAIRS = "weighted mean over the held-out pairs"
_HELDOUT_STEPS = "mean over the held-out labelled steps"
_EFFECTIVE = "(sum of weights)^2 / sum of their squares: pairs, where all weigh alike"

_REWARD = {
    "reward/loss": Metric(
        "nats",
        "pairwise + pointwise_weight * pointwise + step_weight * of steps, as far as there are such rows",
        "each weighted sum / global weight",
    ),
    "reward/pairwise_loss": Metric("nats", "-log sigmoid(chosen - rejected)", "weighted sum / global weight"),
    "reward/pointwise_loss": Metric("nats", "binary cross-entropy of sigmoid(score)", "weighted sum / global weight"),
    "reward/pair_accuracy": Metric("fraction", "[chosen > rejected], ties 1/2", "mean over pairs"),
    "reward/accuracy": Metric("fraction", "[(score > 0) = correct]", "mean over labelled responses"),
    "reward/step_loss": Metric("nats", "as reward/pointwise_loss, at the steps' ends", "mean over labelled steps"),
    "reward/step_accuracy": Metric("fraction", "[(score >= 0) = (label >= 1/2)]", "mean over labelled steps"),
    "reward/auc": Metric("fraction", "P(score of a right response > of a wrong one), ties 1/2", "held-out responses"),
    "reward/auc_stderr": Metric("fraction", "standard error of reward/auc (Hanley, McNeil 1982)", "held-out responses"),
    "reward/margin_mean": Metric("reward", "chosen - rejected", "mean over pairs"),
    "reward/heldout_pairs": Metric("pairs", _EFFECTIVE, "of the held-out pairs"),
    "reward/heldout_pairwise_loss": Metric("nats", "as reward/pairwise_loss", _HELDOUT_PAIRS),
    "reward/heldout_pair_accuracy": Metric("fraction", "as reward/pair_accuracy", _HELDOUT_PAIRS),
    "reward/heldout_margin_mean": Metric("reward", "as reward/margin_mean", _HELDOUT_PAIRS),
    "reward/heldout_calibration_error": Metric(
        "fraction",
        "sum over bins of (pairs in it / pairs) * |mean [chosen > rejected] - mean confidence|; confidence = "
        "sigmoid(|chosen - rejected|), in 10 bins of equal width from 1/2 to 1",
        "over the held-out pairs, by weight",
    ),
    "reward/heldout_labelled_steps": Metric("steps", "steps that have a label", "of the held-out rows"),
    "reward/heldout_step_loss": Metric("nats", "as reward/step_loss", _HELDOUT_STEPS),
    "reward/heldout_step_accuracy": Metric("fraction", "as reward/step_accuracy", _HELDOUT_STEPS),
    "reward/heldout_step_accuracy_stderr": Metric(
        "fraction", "standard error of reward/heldout_step_accuracy (Cochran 1977, 2.46)", "rows are independent"
    ),
    "reward/heldout_step_calibration_error": Metric(
        "fraction",
        "sum over bins of (steps in it / steps) * |mean label - mean sigmoid(score)|; 10 bins of equal width, 0 to 1",
        _HELDOUT_STEPS,
    ),
    "reward/heldout_wrong_solutions": Metric("rows", "with a wrong step, and labels up to it", "held-out rows"),
    "reward/heldout_correct_solutions": Metric("rows", "whose steps are all labelled, and none wrong", "held-out rows"),
    "reward/heldout_error_accuracy": Metric(
        "fraction", "[the first step with sigmoid(score) < 1/2 is the first wrong one]", "mean over wrong solutions"
    ),
    "reward/heldout_correct_accuracy": Metric(
        "fraction", "[no step has sigmoid(score) < 1/2]", "mean over correct solutions"
    ),
    "reward/heldout_first_error_f1": Metric(
        "fraction", "2 e c / (e + c) of error_accuracy e and correct_accuracy c (ProcessBench)", "held-out rows"
    ),
    "reward/heldout_first_error_f1_stderr": Metric(
        "fraction", "standard error of reward/heldout_first_error_f1, to first order", "rows are independent"
    ),
    "reward/score_mean": Metric("reward", "scores", "mean over held-out, else training responses"),
    "reward/score_std": Metric("reward", "standard deviation of scores", "as reward/score_mean"),
    "reward/score_right_mean": Metric("reward", "scores of right responses", "held-out, else training responses"),
    "reward/score_wrong_mean": Metric("reward", "scores of wrong responses", "held-out, else training responses"),
    "reward/centre": Metric("reward", "constant subtracted so that references score 0 on average", "of the model"),
    "reward/grad_norm": Metric("1", "2-norm of the gradient before clipping", "of the step"),
    "reward/learning_rate": Metric("1", "the schedule's value", "of the step"),
}

_PAIRS = "weighted mean over the pairs of the step"
_IMPLICIT = "beta * sum over response tokens of (logprobs - ref_logprobs)"
_DPO = {
    "dpo/loss": Metric(
        "nats", "-(1 - label_smoothing) log sigmoid(margin) - label_smoothing log sigmoid(-margin)", _PAIRS
    ),
    "dpo/accuracy": Metric("fraction", "[margin > 0], ties 1/2", _PAIRS),
    "dpo/margin_mean": Metric("reward", "implicit reward of the chosen response - of the rejected one", _PAIRS),
    "dpo/chosen_reward_mean": Metric("reward", f"{_IMPLICIT}, chosen", _PAIRS),
    "dpo/rejected_reward_mean": Metric("reward", f"{_IMPLICIT}, rejected", _PAIRS),
    "dpo/grad_norm": Metric("1", "2-norm of the gradient before clipping", "of the step"),
    "dpo/learning_rate": Metric("1", "the schedule's value", "of the step"),
    "dpo/heldout_pairs": Metric("pairs", _EFFECTIVE, "of the held-out pairs"),
    "dpo/heldout_loss": Metric("nats", "as dpo/loss", _HELDOUT_PAIRS),
    "dpo/heldout_accuracy": Metric("fraction", "as dpo/accuracy", _HELDOUT_PAIRS),
    "dpo/heldout_margin_mean": Metric("reward", "as dpo/margin_mean", _HELDOUT_PAIRS),
    "dpo/heldout_chosen_reward_mean": Metric("reward", "as dpo/chosen_reward_mean", _HELDOUT_PAIRS),
    "dpo/heldout_rejected_reward_mean": Metric("reward", "as dpo/rejected_reward_mean", _HELDOUT_PAIRS),
}

_TRAIN = {
    "train/epoch": Metric("epochs", "rows seen / rows in the data set", "over all data ranks"),
    "train/skipped_steps": Metric("steps", "optimiser steps skipped: non-finite loss or gradient", "sum since start"),
}

_HELDOUT = "mean over the responses to the held-out prompts, drawn with the same random numbers each time"
_EVAL = {
    "eval/accuracy": Metric("fraction", "[response verified as correct], where its prompt has an answer", _HELDOUT),
    "eval/score_mean": Metric("reward", "scores, before any penalty", _HELDOUT),
    "eval/score_std": Metric("reward", "standard deviation of the scores", "over the responses of eval/score_mean"),
    "eval/prompts": Metric("prompts", "held-out prompts, each with one response", "in all"),
    "eval/verified": Metric("responses", "responses that were verified", "in all"),
    "eval/kl_mean": Metric("nats", "as kl/reference_mean (k1)", _HELDOUT),
    "eval/kl_k3_mean": Metric("nats", "as kl/reference_k3_mean (k3)", _HELDOUT),
    "eval/response_length_mean": Metric("tokens", "response tokens, EOS included", _HELDOUT),
    "eval/truncated_fraction": Metric("fraction", "[response ended without EOS]", _HELDOUT),
}

_POSITIONS = "positions of rows up to the last one that is read, supervised or not"
_TOKENS_OF = {
    "rollout": "response tokens",
    "score": f"{_POSITIONS}, once for each model that scores",
    "optimise": f"{_POSITIONS}, once for each pass of each model that learns",
    "train": _POSITIONS,
}
"""What counts as a token, in the phases that have any."""

_WARNING = {
    "warning/over_optimised": Metric(
        "1",
        "[score above, accuracy below the best 256 verified prompts so far, each beyond its interval]",
        "256 prompts",
    ),
    "warning/kl_over_bound": Metric("1", "[kl/reference_mean > kl_bound]", "of the iteration"),
}

_RESOURCES = {
    "time/iteration_s": Metric("s", "wall time since the clock was last read", "rank 0"),
    "memory/peak_bytes": Metric(
        "bytes", "GPU: peak of torch's allocator since the clock was last read; CPU: peak resident set size", _PEAK
    ),
    **{f"time/{phase}_s": Metric("s", f"wall time inside the {phase} phase", "rank 0") for phase in PHASES},
    **{
        f"throughput/{phase}_tokens_per_s": Metric("tokens/s", f"{tokens} / seconds", "all ranks")
        for phase, tokens in _TOKENS_OF.items()
    },
    **{
        f"throughput/{phase}_flops_per_s": Metric(
            "FLOP/s", f"model FLOPs of the {phase} phase / its seconds: {CONVENTION}", "per device"
        )
        for phase in WORKED
    },
    **{
        f"mfu/{phase}": Metric(
            "fraction",
            f"throughput/{phase}_flops_per_s / the device's peak FLOP/s in dense bf16: {CONVENTION}",
            "per device",
        )
        for phase in WORKED
    },
}

_REFIT = {
    "refit/count": Metric("refits", "times that weights were moved to rollout.layout", "sum over the iteration"),
    "refit/seconds": Metric(
        "s", "wall time in which weights were moved to rollout.layout and compared", "sum over the iteration, rank 0"
    ),
    "refit/gb_per_s": Metric(
        "GB/s", "1e-9 * bytes of weights that came from another rank / refit/seconds", "sum over ranks"
    ),
}

_COMPUTE = {
    "compute/flops": Metric("FLOP", f"model FLOPs of all phases: {CONVENTION}", "sum over ranks, since the run began"),
    **{
        f"compute/{phase}_flops": Metric(
            "FLOP", f"model FLOPs of the {phase} phase: {CONVENTION}", "sum over ranks, since the run began"
        )
        for phase in WORKED
    },
}

_OF_A_JUDGE = {
    "mean": Metric("reward", "the judge's scores, unweighted", _ROLLOUTS),
    "std": Metric("reward", "sqrt(mean((score - mean)^2)) of the judge's scores", "over the rollouts of the iteration"),
    "weight": Metric("1", "what the judge's scores are multiplied by in the sum", "constant"),
    "failures": Metric(
        "rollouts", "rollouts that the judge could not judge as meant: it took too long, or was asked again", "count"
    ),
}
"""Of each judge, as judge/NAME_mean."""
_JUDGING = Metric("s", "wall time in which the judge was waited for", "rank 0")
"""Of each judge, as time/judge_NAME_s."""

FIRST_STEPS = 4
"""So many have a share of their own."""
_EARNED = "r what a step earned, by sum or soft_min; by other rewards, what it is worth"
_SHARE = "over the steps of all rollouts learnt from"
OF_STEPS = {
    "per_response": Metric("steps", "steps of a response", _LEARNT),
    "tokens": Metric("tokens", "response tokens / steps", "each summed over the rollouts learnt from"),
    **{
        f"share_{at + 1}": Metric(
            "fraction", f"sum of |r| of steps {at + 1} / sum of |r| of all steps, {_EARNED}", _SHARE
        )
        for at in range(FIRST_STEPS)
    },
    "share_later": Metric(
        "fraction", f"sum of |r| of the steps after {FIRST_STEPS} / sum of |r| of all steps, {_EARNED}", _SHARE
    ),
}
"""Of each judge of steps, as steps/NAME_per_response."""

GLOSSARY: dict[str, Metric] = {
    **_ROLLOUT,
    **_FP8,
    **_SAMPLER,
    **_GROUP,
    **_DRAWS,
    **_KL,
    **_POLICY,
    **_VALUE,
    **_SFT,
    **_REWARD,
    **_DPO,
    **_EVAL,
    **_TRAIN,
    **_WARNING,
    **_RESOURCES,
    **_REFIT,
    **_COMPUTE,
}


def meaning(name: str) -> Metric:
    """The entry of a metric.

    Raises:   UnknownMetricError, with the nearest listed name, where it has none.
    """
    family, _, quantity = name.partition("/")
    found = GLOSSARY.get(name)
    if family == "judge":
        found = _OF_A_JUDGE.get(quantity.rpartition("_")[2])
    elif re.fullmatch(r"time/judge_\w+_s", name):
        found = _JUDGING
    elif of_steps := re.fullmatch(rf"steps/\w+?_({'|'.join(OF_STEPS)})", name):
        found = OF_STEPS[of_steps[1]]
    if found is None:
        close = difflib.get_close_matches(name, GLOSSARY, n=1)
        remedy = f"did you mean {close[0]}?" if close else "give it unit, formula and reduction in GLOSSARY."
        raise UnknownMetricError(f"metric {name}: not in megarlhf/observe/metrics.py; {remedy}")
    return found


def names_of(*families: str) -> set[str]:
    """Every name of these families."""
    return {name for name in GLOSSARY if name.partition("/")[0] in families}


def check(metrics: Iterable[str]) -> None:
    """Raise UnknownMetricError if any name is not in the glossary."""
    for name in metrics:
        meaning(name)
