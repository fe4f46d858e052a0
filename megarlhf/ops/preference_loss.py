"""What a reward model learns from: pairs, and single judgements."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, weight: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over pairs.

        loss = -weight * log sigmoid(chosen - rejected)

    Shapes:   chosen_scores, rejected_scores, weight [P] fp32. Returns scalars (sum, metrics).
    Units:    nats. Metrics are weighted sums: `accuracy` (chosen above rejected; a tie is half), `score_gap`.
    Raises:   ValueError if shapes differ.
    Source:   Bradley and Terry 1952; Hou et al. 2024, the pairwise term of the reward model's loss.
    """
    _check_equal(chosen_scores=chosen_scores, rejected_scores=rejected_scores, weight=weight)
    gap = chosen_scores - rejected_scores
    seen = gap.detach()
    metrics = {"accuracy": (weight * (0.5 + 0.5 * seen.sign())).sum(), "score_gap": (weight * seen).sum()}
    return (-weight * F.logsigmoid(gap)).sum(), metrics


def pointwise_loss(scores: Tensor, correct: Tensor, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over responses.

        loss = -weight * (correct * log sigmoid(score) + (1 - correct) * log sigmoid(-score))

    Shapes:   scores, correct (0..1, soft labels allowed), weight [B] fp32. Returns scalars (sum, metrics).
    Units:    nats. Metrics are weighted sums: `accuracy` (score > 0 as correct > 0.5), `score`.
    Raises:   ValueError if shapes differ.
    Source:   Hou et al. 2024, the binary correctness term of the reward model's loss.
    """
    _check_equal(scores=scores, correct=correct, weight=weight)
    seen = scores.detach()
    agree = ((seen > 0) == (correct > 0.5)).to(weight.dtype)
    loss = F.binary_cross_entropy_with_logits(scores, correct, weight=weight, reduction="sum")
    return loss, {"accuracy": (weight * agree).sum(), "score": (weight * seen).sum()}


def _check_equal(**tensors: Tensor) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len({tuple(shape) for shape in shapes.values()}) > 1:
        raise ValueError(f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())}; shapes must be equal.")
