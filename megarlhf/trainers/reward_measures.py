"""What a reward model is worth on pairs, on judged responses and on judged steps, by its raw scores."""

from __future__ import annotations

import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.batch.supervised import LabelledResponses
from megarlhf.data.judged_steps import StepSet
from megarlhf.data.preferences import PreferenceSet
from megarlhf.eval.intervals import auc_error, effective, harmonic_error, ratio_error
from megarlhf.models.readings import SequenceScores, StepScores
from megarlhf.models.role import Role
from megarlhf.observe.metrics import Metrics
from megarlhf.ops.first_error import first_errors, harmonic, labelled_up_to
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
        "reward/heldout_calibration_error": float(calibration_error(scores[0::2] - scores[1::2], weight)),
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
            # AUC is the Mann-Whitney statistic over all right-wrong couples.
            statistic = scipy.stats.mannwhitneyu(scores[right].numpy(), scores[~right].numpy()).statistic
            rights, wrongs = int(right.sum()), int((~right).sum())
            metrics["reward/auc"] = float(statistic) / (rights * wrongs)
            metrics["reward/auc_stderr"] = auc_error(metrics["reward/auc"], rights, wrongs)
    return {**metrics, "reward/centre": metrics["reward/score_mean"]}


OF_STEPS = (
    *("reward/heldout_labelled_steps", "reward/heldout_step_loss", "reward/heldout_step_accuracy"),
    *("reward/heldout_step_calibration_error", "reward/heldout_error_accuracy", "reward/heldout_correct_accuracy"),
    *("reward/heldout_first_error_f1", "reward/heldout_wrong_solutions", "reward/heldout_correct_solutions"),
)
"""What `measure_steps` finds, beside standard errors."""


def measure_steps(role: Role, steps: StepSet) -> Metrics:
    """Loss, accuracy and calibration over labelled steps, and how often the first error is found, by raw scores.

    Ranks:    collective; equal on every rank. Source of the latter: ProcessBench (arXiv 2412.06559).
    """
    parts = [steps.batch(part) for part in torch.arange(len(steps)).split(PART_ROWS)]
    scores = [role.read(part, StepScores()).cpu().double() for part in parts]
    known = [(part.step_weight[:, 1:] > 0, part.step_labels[:, 1:].double()) for part in parts]
    # Over the labelled steps alone, and then over rows.
    logits = torch.cat([score[mask] for score, (mask, _) in zip(scores, known, strict=True)])
    labels = torch.cat([label[mask] for mask, label in known])
    right = [((score > 0) == (label > 0.5)) & mask for score, (mask, label) in zip(scores, known, strict=True)]
    hits, counts = torch.cat([each.sum(1) for each in right]), torch.cat([mask.sum(1) for mask, _ in known])
    metrics = {
        "reward/heldout_labelled_steps": float(len(labels)),
        "reward/heldout_step_loss": float(F.binary_cross_entropy_with_logits(logits, labels)),
        "reward/heldout_step_accuracy": float(hits.sum()) / len(labels),
        "reward/heldout_step_accuracy_stderr": ratio_error(hits, counts),
        "reward/heldout_step_calibration_error": float(
            calibration_error(torch.where(labels > 0.5, logits, -logits), torch.ones_like(logits))
        ),
    }
    found = torch.cat(
        [first_errors(score.sigmoid(), part.step_ends[:, 1:]) for score, part in zip(scores, parts, strict=True)]
    )
    wanted = [first_errors(label, mask) for mask, label in known]
    whole = [
        labelled_up_to(part.step_ends[:, 1:], mask, first)
        for part, (mask, _), first in zip(parts, known, wanted, strict=True)
    ]
    return {**metrics, **_first_errors(found, torch.cat(wanted), torch.cat(whole))}


def _first_errors(found: Tensor, wanted: Tensor, known: Tensor) -> Metrics:
    """Of the solutions whose first error is known; nothing where all of them are wrong, or none is."""
    found, wanted = found[known], wanted[known]
    wrong = wanted >= 0
    metrics = {
        "reward/heldout_wrong_solutions": float(wrong.sum()),
        "reward/heldout_correct_solutions": float((~wrong).sum()),
    }
    if not bool(wrong.any()) or bool(wrong.all()):
        return metrics
    error, correct = (float((found == wanted)[of].double().mean()) for of in (wrong, ~wrong))
    return {
        **metrics,
        "reward/heldout_error_accuracy": error,
        "reward/heldout_correct_accuracy": correct,
        "reward/heldout_first_error_f1": harmonic(error, correct),
        "reward/heldout_first_error_f1_stderr": harmonic_error(error, correct, int(wrong.sum()), int((~wrong).sum())),
    }
