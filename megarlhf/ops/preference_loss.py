"""What is learnt from pairs, by a reward model or by a policy itself, and from single judgements."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.ops.calibration import BINS, calibration


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


def calibration_error(gap: Tensor, weight: Tensor) -> float:
    """How far the confidence in which response is better is from how often that is right: its expected error.

        confidence = sigmoid(|gap|), from 1/2 to 1       right = [gap > 0], ties 1/2       in BINS bins b, 0.05 wide
        error = sum over b of (weight in b / weight) * |mean of right in b - mean of confidence in b|

    Shapes:   gap (chosen - rejected), weight [P]. Returns a number.
    Units:    gap in nats, as the logarithm of the odds that Bradley and Terry give; the error is a fraction.
    Source:   Guo et al. 2017 (arXiv 1706.04599), eq. 3, for two classes, whose confidence is at least 1/2.
    """
    _check_equal(gap=gap, weight=weight)
    # From 1/2 to 1, which is half of the bins.
    return calibration(gap.abs().sigmoid(), 0.5 + 0.5 * gap.sign(), weight, bins=2 * BINS).error


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, row: Tensor, sequences: int, *, beta: float) -> Tensor:
    """What a policy's distance from its reference says that responses are worth.

        reward_i = beta * sum over the response tokens t of i of (logprobs_t - ref_logprobs_t)

    Shapes:   logprobs, ref_logprobs [n] fp32, of response tokens; row [n] int64: whose token each is, of `sequences`.
              Returns [sequences] fp64, for a sum over a long response is far larger than what tells two apart.
    Units:    logprobs in nats, beta in reward/nat.
    Raises:   ValueError if shapes differ.
    Source:   DPO (Rafailov et al. 2023, arXiv 2305.18290), section 5; the term that depends on the prompt alone, which
              no difference of two responses shows, is left out.
    """
    _check_equal(logprobs=logprobs, ref_logprobs=ref_logprobs, row=row)
    gap = logprobs.double() - ref_logprobs.double()
    return beta * gap.new_zeros(sequences).index_add(0, row, gap)


def dpo_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, weight: Tensor, *, label_smoothing: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed over pairs.

        margin = chosen - rejected
        loss = -weight * ((1 - label_smoothing) * log sigmoid(margin) + label_smoothing * log sigmoid(-margin))

    Shapes:   chosen_rewards, rejected_rewards, weight [P], of `implicit_rewards`. Returns scalars (sum, metrics).
    Units:    loss in nats. label_smoothing: the share of pairs whose labels are taken to be the wrong way round.
              Metrics are weighted sums: `accuracy` (chosen above rejected; a tie is half), `margin_mean`,
              `chosen_reward_mean`, `rejected_reward_mean`.
    Raises:   ValueError if shapes differ.
    Source:   DPO (Rafailov et al. 2023, arXiv 2305.18290), eq. 7; with label_smoothing conservative DPO (Mitchell 2023,
              "A note on DPO with noisy preferences").
    """
    _check_equal(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards, weight=weight)
    margin = chosen_rewards - rejected_rewards
    said, denied = F.logsigmoid(margin), F.logsigmoid(-margin)
    with torch.no_grad():
        metrics = {
            "accuracy": (weight * (0.5 + 0.5 * margin.sign())).sum(),
            "margin_mean": (weight * margin).sum(),
            "chosen_reward_mean": (weight * chosen_rewards).sum(),
            "rejected_reward_mean": (weight * rejected_rewards).sum(),
        }
    return -(weight * ((1 - label_smoothing) * said + label_smoothing * denied)).sum(), metrics


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
