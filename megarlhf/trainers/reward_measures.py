"""What a reward model is worth on pairs and on judged responses, by its raw scores."""

from __future__ import annotations

import scipy.stats
import torch

from megarlhf.batch.supervised import LabelledResponses
from megarlhf.data.preferences import PreferenceSet
from megarlhf.eval.intervals import auc_error, effective
from megarlhf.models.role import Role
from megarlhf.observe.metrics import Metrics
from megarlhf.ops.preference_loss import bradley_terry_loss, calibration_error
from megarlhf.runs.measuring import PART_ROWS


def measure_pairs(role: Role, pairs: PreferenceSet) -> Metrics:
    """Loss, order, margin and calibration, by raw scores: those of training. Collective; equal on every rank."""
    parts = [pairs.batch(part) for part in torch.arange(len(pairs)).split(PART_ROWS // 2)]
    scores = torch.cat([role.score(part).cpu() for part in parts]).double()
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
    scores = torch.cat([role.score(responses.rows(part)).cpu() for part in parts])
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
