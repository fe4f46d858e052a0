"""Which curves a page draws, and which of them share a chart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megarlhf.observe.metrics import OF_STEPS, meaning
from megarlhf.observe.work import PHASES, WORKED
from megarlhf.observe.writers import logged


class Panel(NamedTuple):
    """One chart: a title and the metrics it draws, all of one unit."""

    title: str
    metrics: tuple[str, ...]

    @property
    def unit(self) -> str:
        """Of the axis."""
        return meaning(self.metrics[0]).unit


def _of_learners(quantity: str) -> tuple[str, ...]:
    return tuple(f"{family}/{quantity}" for family in ("policy", "value", "sft", "reward", "dpo"))


LEARNING = (
    Panel("Score", ("rollout/score_mean", "rollout/reward_mean", "eval/score_mean")),
    Panel("Accuracy", ("rollout/accuracy", "eval/accuracy")),
    Panel("Groups of equal scores", ("group/equal_fraction",)),
    Panel("Groups that are kept", ("draws/kept_fraction",)),
    Panel("KL to the reference", ("kl/reference_mean", "kl/reference_exact", "eval/kl_mean")),
    Panel("Price of the KL", ("kl/coef",)),
    Panel(
        "Response length", ("rollout/response_length_mean", "rollout/response_length_max", "eval/response_length_mean")
    ),
    Panel("Truncated responses", ("rollout/truncated_fraction", "eval/truncated_fraction")),
    Panel("Entropy", ("policy/entropy_mean",)),
    Panel("SFT loss", ("sft/loss", "sft/heldout_loss")),
    Panel(
        "Reward-model loss",
        (
            *("reward/loss", "reward/pairwise_loss", "reward/pointwise_loss", "reward/heldout_pairwise_loss"),
            *("reward/step_loss", "reward/heldout_step_loss"),
        ),
    ),
    Panel(
        "Reward-model accuracy",
        (
            *("reward/pair_accuracy", "reward/accuracy", "reward/auc", "reward/heldout_pair_accuracy"),
            *("reward/step_accuracy", "reward/heldout_step_accuracy"),
        ),
    ),
    Panel(
        "First errors found",
        ("reward/heldout_first_error_f1", "reward/heldout_error_accuracy", "reward/heldout_correct_accuracy"),
    ),
    Panel("Reward-model margin", ("reward/margin_mean", "reward/heldout_margin_mean")),
    Panel("Calibration error", ("reward/heldout_calibration_error", "reward/heldout_step_calibration_error")),
    Panel("DPO loss", ("dpo/loss", "dpo/heldout_loss")),
    Panel("Pairs in the right order", ("dpo/accuracy", "dpo/heldout_accuracy")),
    Panel("Implicit rewards", ("dpo/chosen_reward_mean", "dpo/rejected_reward_mean", "dpo/margin_mean")),
    Panel("Margin of implicit rewards, held out", ("dpo/heldout_margin_mean",)),
)
OPTIMISATION = (
    Panel("Learning rate", _of_learners("learning_rate")),
    Panel("Gradient norm", _of_learners("grad_norm")),
    Panel("Policy loss", ("policy/loss",)),
    Panel("Value loss", ("value/loss",)),
    Panel("Explained variance", ("value/explained_variance",)),
    Panel("Clip fraction", ("policy/clip_fraction", "value/clip_fraction")),
    Panel("Sampler against trainer", ("rollout/sampler_gap_max", "rollout/sampler_gap_mean")),
    Panel("Sampler correction", ("sampler/changed_fraction", "sampler/effective_sample_fraction")),
    Panel("Skipped steps", ("train/skipped_steps",)),
)
MACHINE = (
    Panel("Throughput", tuple(f"throughput/{phase}_tokens_per_s" for phase in WORKED)),
    Panel("Share of the device's peak", tuple(f"mfu/{phase}" for phase in WORKED)),
    Panel("Peak memory", ("memory/peak_bytes",)),
    Panel("Time of a step", ("time/iteration_s", *(f"time/{phase}_s" for phase in PHASES))),
    Panel("Seconds of moving weights to rollout.layout", ("refit/seconds",)),
    Panel("Speed of moving weights, GB/s", ("refit/gb_per_s",)),
)
SECTIONS = {"What is learnt": LEARNING, "How it is learnt": OPTIMISATION, "Speed and memory": MACHINE}
"""What a page draws, in this order; a panel none of whose metrics was logged is left out."""
SAID_WHERE_THEY_CHANGE = ("kl/coef", "train/skipped_steps")
"""A line that never moves says nothing that the table of settings, or a warning, does not."""
TOGETHER = 6
"""Curves of a chart, as many as there are colours."""
KEY = (
    *("eval/accuracy", "rollout/accuracy", "rollout/score_mean", "kl/reference_mean", "rollout/response_length_mean"),
    *("dpo/heldout_accuracy", "dpo/accuracy", "dpo/margin_mean", "dpo/loss", "sft/heldout_loss", "sft/loss"),
    *("reward/heldout_pair_accuracy", "reward/auc", "reward/pair_accuracy", "reward/loss"),
    *("throughput/rollout_tokens_per_s", "throughput/train_tokens_per_s", "memory/peak_bytes", "time/iteration_s"),
)
"""What a reader wants to know of a run before anything else; its page begins with the first four that were logged."""


def panels_of(rows: Sequence[Mapping[str, float]]) -> dict[str, list[Panel]]:
    """By section, the panels of what was logged, with what was logged of each; several judges have theirs."""
    every = logged(rows)
    there = set(every)
    there -= {name for name in SAID_WHERE_THEY_CHANGE if len({row[name] for row in rows if name in row}) == 1}
    names = tuple(name for name in every if re.fullmatch(r"judge/\w+_mean", name))
    starts = range(0, len(names) if len(names) > 1 else 0, TOGETHER)
    judges = [Panel(f"Judges from {at + 1}" if at else "Judges", names[at:][:TOGETHER]) for at in starts]
    sections = {**SECTIONS, "What is learnt": (LEARNING[0], *judges, *_of_steps(every), *LEARNING[1:])}
    found = {
        title: [Panel(panel.title, tuple(name for name in panel.metrics if name in there)) for panel in panels]
        for title, panels in sections.items()
    }
    return {title: [panel for panel in panels if panel.metrics] for title, panels in found.items()}


def _of_steps(names: Sequence[str]) -> list[Panel]:
    """What judges of steps say: how many and how long they are, and, a judge a chart, where their scores stand."""
    judges = [found[1] for name in names if (found := re.fullmatch(r"steps/(\w+)_per_response", name))][:TOGETHER]
    counts = {"Steps of a response": "per_response", "Tokens of a step": "tokens"}
    shares = [
        Panel(
            f"Where the scores of {judge} stand",
            tuple(f"steps/{judge}_{name}" for name in OF_STEPS if name.startswith("share")),
        )
        for judge in judges
    ]
    numbers = [Panel(title, tuple(f"steps/{judge}_{name}" for judge in judges)) for title, name in counts.items()]
    return [*numbers, *shares]


def labels(names: Sequence[str]) -> list[str]:
    """What tells the metrics of a chart apart: their words without those that all begin, or all end, with."""
    words = [re.split(r"[/_]", name) for name in names]
    if len(words) == 1:
        return [" ".join(words[0])]
    head = _alike(words)
    tail = _alike([list(reversed(each)) for each in words])
    if any(len(each) <= head + tail for each in words):
        tail = 0
    return [" ".join(each[head : len(each) - tail]) or " ".join(each) for each in words]


def _alike(words: Sequence[Sequence[str]]) -> int:
    """How many words all begin with."""
    return next((at for at, each in enumerate(zip(*words, strict=False)) if len(set(each)) > 1), min(map(len, words)))
