"""What a run says when it optimises the reward model rather than the task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megarlhf.observe.metrics import Metrics
from megarlhf.ops.over_optimisation import Fall, Seen, accuracy_fall
from megarlhf.trainers.policy_config import PolicyConfig

OVER_OPTIMISED = "warning/over_optimised"
KL_OVER_BOUND = "warning/kl_over_bound"
WARNINGS = (OVER_OPTIMISED, KL_OVER_BOUND)


class Watch:
    """Reads every iteration's metrics, which are the same on every rank; so are its answers."""

    def __init__(self, cfg: PolicyConfig) -> None:
        self._cfg = cfg
        self._history: list[Seen] = []
        self._said: set[str] = set()
        self._now = False
        """Whether a warning is in force."""

    def restore(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Take up what the iterations before a stop had logged; what was said then is not said again."""
        for row in rows:
            self.look(row)

    def look(self, metrics: Mapping[str, float]) -> tuple[Metrics, list[str]]:
        """The warnings in force after one more iteration, as metrics, and in words those that are new."""
        self._history.append(self._seen(metrics))
        fall, kl, bound = accuracy_fall(self._history), metrics.get("kl/reference_mean", math.nan), self._cfg.kl_bound
        words = {
            OVER_OPTIMISED: _fall_in_words(fall) if fall else "",
            KL_OVER_BOUND: f"the KL to the reference is {kl:.1f} nats, over kl_bound={bound:g}"
            if bound is not None and kl > bound
            else "",
        }
        self._now = any(words.values())
        new = {name: text for name, text in words.items() if text and name not in self._said}
        self._said |= new.keys()
        remedy = "stop earlier, lower actor.optim.lr, or weigh the KL more in a run of its own"
        said = [f"warning, iteration {len(self._history)}: {text}; {remedy}." for text in new.values()]
        return {name: float(bool(text)) for name, text in words.items()}, said

    def ends(self) -> bool:
        """Whether the run is to end after the last iteration that was looked at."""
        return self._cfg.stop_when_over_optimised and self._now

    def conclusion(self) -> str:
        """What is said when it ends so."""
        cfg = self._cfg
        return (
            f"ended after iteration {len(self._history)} of {cfg.iterations} (stop_when_over_optimised=true); its "
            f"state is in {cfg.states_dir}, the actor as it is now in {cfg.model_dir}."
        )

    def _seen(self, metrics: Mapping[str, float]) -> Seen:
        cfg = self._cfg
        return Seen(
            score=metrics.get("rollout/score_mean", math.nan),
            score_std=metrics.get("rollout/score_std", math.nan),
            prompts=cfg.prompts_per_iteration,
            accuracy=metrics.get("rollout/accuracy", math.nan),
            verified=int(metrics.get("rollout/verified", 0)) // cfg.group_size,
        )


def _fall_in_words(fall: Fall) -> str:
    best, now = fall.best, fall.now
    return (
        f"the score rose from {best.score:.2f} to {now.score:.2f} while accuracy fell from {best.accuracy:.3f} to "
        f"{now.accuracy:.3f} (difference {fall.low:+.3f} to {fall.high:+.3f}): the reward model is being "
        "over-optimised"
    )
