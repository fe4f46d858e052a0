"""The first iterations of an FP8 run in bfloat16 too: how far FP8 moves log-probs, and an end where it is too far."""

from __future__ import annotations

from megarlhf.batch.rollouts import Rollout
from megarlhf.errors import TrainingError
from megarlhf.models.compute import ComputeConfig
from megarlhf.models.fp8 import without_fp8
from megarlhf.models.role import Role
from megarlhf.observe.metrics import Metrics
from megarlhf.ops.masked import masked_mean


def shadow_metrics(actor: Role, rollout: Rollout, cfg: ComputeConfig, number: int) -> Metrics:
    """Distance of the actor's log-probs of a rollout with FP8 and without, on the weights that it has now; nothing
    where it has no FP8 or iteration `number`, from 0, is none of the first.

    Ranks:    collective over the mesh; equal on every rank. Two forward passes over the rollout.
    Raises:   TrainingError where the mean is beyond `fp8_shadow_bound`, or no number.
    """
    if actor.settings.compute.fp8 is None or number >= cfg.fp8_shadow_iterations:
        return {}
    rounded = actor.score(rollout)
    with without_fp8(actor.chunks):
        exact = actor.score(rollout)
    mask = rollout.response_mask
    gap = (rounded - exact).abs()
    mean, largest = float(masked_mean(gap, mask)), float(gap.masked_fill(~mask, 0.0).max())
    if not mean <= cfg.fp8_shadow_bound:
        raise TrainingError(
            f"compute.fp8={cfg.fp8} with compute.fp8_recipe={cfg.fp8_recipe} moves log-probs by {mean:.3g} nats a "
            f"token (at most {largest:.3g}) from those in bfloat16 in iteration {number}, more than "
            f"compute.fp8_shadow_bound={cfg.fp8_shadow_bound:g}; set compute.fp8=off, or another recipe, or a bound of "
            f"more than {mean:.3g} to learn from such log-probs all the same."
        )
    return {"fp8/shadow_gap_mean": mean, "fp8/shadow_gap_max": largest}
