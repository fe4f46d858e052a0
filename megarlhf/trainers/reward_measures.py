"""What a reward model is worth on pairs, on judged responses and on judged steps, by its raw scores."""

from __future__ import annotations

import torch

from megarlhf.batch.supervised import LabelledResponses
from megarlhf.data.judged_steps import StepSet
from megarlhf.data.preferences import PreferenceSet
from megarlhf.eval.intervals import auc_error, auc_of, effective
from megarlhf.eval.reward_model import of_steps, read
from megarlhf.models.readings import SequenceScores
from megarlhf.models.role import Role
from megarlhf.observe.metrics import Metrics
from megarlhf.ops.preference_loss import bradley_terry_loss, calibration_error
from megarlhf.runs.measuring import PART_ROWS

OF_PAIRS = (
    *("reward/heldout_pairs", "reward/heldout_pairwise_loss", "reward/heldout_pair_accuracy"),
    *("reward/heldout_margin_mean", "reward/heldout_calibration_error"),
)
"""What `measure_pairs` finds."""


def measure_pairs(role: Role, pairs: PreferenceSet) -> Metrics:
    """Loss, order, margin and calibration, by raw scores: those of training. Collective; equal on every rank."""
    parts = [pairs.batch(part) for part in torch.arange(len(pairs)).split(PART_ROWS // 2)]
    scores = torch.cat([role.read(part, SequenceScores()).cpu() for part in parts]).double()
    weight = torch.cat([part.weight for part in parts]).double()
    loss, seen = bradley_terry_loss(scores[0::2], scores[1::2], weight)
    whole = float(weight.sum())
    return {
        "reward/heldout_pairs": effective(weight),
        "reward/heldout_pairwise_loss": float(loss) / whole,
        "reward/heldout_pair_accuracy": float(seen["accuracy"]) / whole,
        "reward/heldout_margin_mean": float(seen["score_gap"]) / whole,
        "reward/heldout_calibration_error": calibration_error(scores[0::2] - scores[1::2], weight),
    }


def measure_scores(role: Role, responses: LabelledResponses, *, heldout: bool) -> Metrics:
    """The mean score to centre on, the spread, and the mean scores of right and wrong; AUC where `heldout`.

    Ranks:    collective; equal on every rank. Source of the centring: Huang et al. 2024, SFT references score 0.
    """
    parts = torch.arange(len(responses)).split(PART_ROWS)
    scores = torch.cat([role.read(responses.rows(part), SequenceScores()).cpu() for part in parts])
    right = responses.correct > 0.5
    metrics = {"reward/score_mean": float(scores.mean()), "reward/score_std": float(scores.std())}
    if 0 < int(right.sum()) < len(right):
        metrics["reward/score_right_mean"] = float(scores[right].mean())
        metrics["reward/score_wrong_mean"] = float(scores[~right].mean())
        if heldout:
            metrics["reward/auc"] = auc_of(scores, right)
            metrics["reward/auc_stderr"] = auc_error(metrics["reward/auc"], int(right.sum()), int((~right).sum()))
    return {**metrics, "reward/centre": metrics["reward/score_mean"]}


OF_FIRST_ERRORS = ("reward/heldout_error_accuracy", "reward/heldout_correct_accuracy", "reward/heldout_first_error_f1")
"""What `measure_steps` finds where there are solutions with an error that is known, and such without one."""
OF_STEPS = (
    *("reward/heldout_labelled_steps", "reward/heldout_step_loss", "reward/heldout_step_accuracy"),
    *("reward/heldout_step_calibration_error", "reward/heldout_wrong_solutions", "reward/heldout_correct_solutions"),
    *OF_FIRST_ERRORS,
)
"""What `measure_steps` finds, beside standard errors."""


def measure_steps(role: Role, steps: StepSet) -> Metrics:
    """Loss, accuracy and calibration over labelled steps, and how often the first error is found, by raw scores.

    The latter is left out where no solution has an error that is known, or all have.
    Ranks:    collective; equal on every rank. Source of the latter: ProcessBench (arXiv 2412.06559).
    """
    of = of_steps(read(role, steps.tokens, steps.ends), steps.labels)
    metrics = {
        "reward/heldout_labelled_steps": float(of.steps),
        "reward/heldout_step_loss": of.loss,
        "reward/heldout_step_accuracy": of.accuracy.mean,
        "reward/heldout_step_accuracy_stderr": of.accuracy_error,
        "reward/heldout_step_calibration_error": of.calibration.error,
        "reward/heldout_wrong_solutions": float(of.wrong),
        "reward/heldout_correct_solutions": float(of.right),
    }
    if not of.wrong or not of.right:
        return metrics
    return {
        **metrics,
        "reward/heldout_error_accuracy": of.wrong_found.mean,
        "reward/heldout_correct_accuracy": of.right_passed.mean,
        "reward/heldout_first_error_f1": of.f1.mean,
        "reward/heldout_first_error_f1_stderr": of.f1_error,
    }
