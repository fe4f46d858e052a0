"""What a reward model is worth: on pairs, on judged responses, and on responses whose steps are judged.

A model says of each step of a response how probably it is right, sigmoid of its head's number before any normalisation;
one that judges outcomes says so of the response, as of its only step. Ways to take the steps of a response together are
those of ops/step_scores.py. Numbers with an interval are over what is independent: prompts, or solutions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megarlhf.batch.supervised import SteppedResponses
from megarlhf.data.rows import pad_right
from megarlhf.eval.best_of import best_of
from megarlhf.eval.intervals import (
    Interval,
    auc_error,
    auc_of,
    harmonic_error,
    harmonic_of,
    mean,
    ratio_error,
    share,
    share_of,
    within,
)
from megarlhf.models.readings import StepScores
from megarlhf.models.role import Role
from megarlhf.observe.progress import Progress
from megarlhf.ops.calibration import Calibration, calibration
from megarlhf.ops.first_error import first_errors, labelled_up_to
from megarlhf.ops.step_scores import Aggregate, aggregated

PART_ROWS = 512
"""Responses read between two signs of progress."""
UNKNOWN = Interval(float("nan"), float("nan"), float("nan"))
"""Of what there is nothing to measure on."""


@dataclass(frozen=True)
class Reading:
    """What a model says of some responses."""

    values: Tensor
    """[N, S] fp64: of each step the number of its head."""
    ends: Tensor
    """[N, S] bool: which steps there are."""

    @property
    def probabilities(self) -> Tensor:
        """[N, S]: that a step is right."""
        return self.values.sigmoid()

    def taken(self, way: Aggregate) -> Tensor:
        """[N]: what responses are worth by the probabilities of their steps."""
        return aggregated(self.probabilities, self.ends, way)

    def rows(self, which: Tensor | slice) -> Reading:
        """Of some of them."""
        return Reading(self.values[which], self.ends[which])


def read(role: Role, tokens: Sequence[Sequence[int]], ends: Sequence[Sequence[int]], name: str = "") -> Reading:
    """Ask a model with a scalar head, in order of length, so that little of what it reads is padding.

    tokens: prompt and response with EOS; ends: in them, the last token of each step; name: for the progress bar, which
    "" leaves out.
    Ranks:    collective; equal on every rank.
    """
    order = sorted(range(len(tokens)), key=lambda row: len(tokens[row]))
    values = torch.zeros(len(tokens), max(map(len, ends)), dtype=torch.float64)
    there = torch.zeros(values.shape, dtype=torch.bool)
    with Progress(len(tokens), f"read {name}", enabled=bool(name) and role.mesh.is_main) as bar:
        for first in range(0, len(order), PART_ROWS):
            part = order[first : first + PART_ROWS]
            padded, lengths = pad_right([tokens[row] for row in part], 0)  # no mask reads padding
            mask = torch.zeros(padded.shape, dtype=torch.bool)
            for at, row in enumerate(part):
                mask[at, list(ends[row])] = True
            scores = role.read(SteppedResponses(padded, lengths, mask), StepScores()).cpu()
            for at, row in enumerate(part):
                found = scores[at][[end - 1 for end in ends[row]]]  # index t is about token t + 1
                values[row, : len(found)], there[row, : len(found)] = found.double(), True
            bar.advance(len(part))
    return Reading(values, there)


class OfLength(NamedTuple):
    """How well responses are told apart among those of like length."""

    said: str
    """Which."""
    count: int
    found: float
    """Pairs in order, or the area under the curve; NaN where there is nothing to tell apart."""


@dataclass(frozen=True)
class OfPairs:
    """How often the chosen response is worth more; a tie is half."""

    accuracy: Interval
    by_length: Sequence[OfLength]


def of_pairs(chosen: Tensor, rejected: Tensor, lengths: Tensor, prompts: int) -> OfPairs:
    """Of pairs.

    Shapes:   chosen, rejected [P], what they are worth; lengths [P, 2], their tokens. prompts: distinct ones, which are
              what is independent.
    """
    right = 0.5 + 0.5 * (chosen - rejected).sign()
    longer = (lengths[:, 0] - lengths[:, 1]).sign()
    parts = {"chosen is shorter": longer < 0, "as long": longer == 0, "chosen is longer": longer > 0}
    by_length = [OfLength(said, int(which.sum()), float(right[which].mean())) for said, which in parts.items()]
    return OfPairs(share_of(float(right.mean()), prompts), by_length)


@dataclass(frozen=True)
class OfJudged:
    """How well right responses are told from wrong ones."""

    auc: Interval
    """That a right one is worth more than a wrong one."""
    accuracy: Interval
    """That it is worth 1/2 or more if, and only if, it is right."""
    calibration: Calibration
    by_length: Sequence[OfLength]
    """The area under the curve in each third of the responses by their tokens."""
    best_of: Mapping[int, Interval]
    """How right the best of n responses to one prompt is, on average over prompts that have so many."""


def of_judged(worth: Tensor, right: Tensor, lengths: Tensor, prompts: Sequence[Any]) -> OfJudged:
    """Of judged responses.

    Shapes:   worth [N] in 0..1; right [N], from 0 to 1 (above 1/2 is right); lengths [N] int64, tokens of responses.
    prompts:  of each, anything that tells prompts apart.
    """
    found = right > 0.5
    thirds = torch.tensor(np.quantile(lengths.numpy(), [1 / 3, 2 / 3]))
    part = (lengths[:, None] > thirds).sum(1)
    by_length = []
    for third in range(3):
        which = part == third
        if which.any():
            low, high = int(lengths[which].min()), int(lengths[which].max())
            area = auc_of(worth[which], found[which])
            by_length.append(OfLength(f"{low} to {high} tokens", int(which.sum()), area))
    agreed = ((worth >= 0.5) == found).double().mean()
    rights, wrongs, area = int(found.sum()), int((~found).sum()), auc_of(worth, found)
    auc = within(area, auc_error(area, rights, wrongs), 0.0, 1.0) if rights and wrongs else UNKNOWN
    accuracy = share_of(float(agreed), len(set(prompts)))
    return OfJudged(auc, accuracy, calibration(worth, right), by_length, _best_of(worth, right, prompts))


def _best_of(worth: Tensor, right: Tensor, prompts: Sequence[Any]) -> dict[int, Interval]:
    """For n = 1, 4, 16, 64, ...: of the prompts that have n responses, if they are two or more."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        groups[prompt].append(row)
    found: dict[int, Interval] = {}
    size = 1
    while len(large := [rows for rows in groups.values() if len(rows) >= size]) > 1:
        values = [best_of(worth[rows].numpy(), right[rows].double().numpy(), [size])[0] for rows in large]
        found[size] = mean(torch.tensor(values))
        size *= 4
    return found


@dataclass(frozen=True)
class Truth:
    """What is known of the steps of some solutions."""

    labels: Tensor
    """[N, S] fp64: of each step, 0 where there is none."""
    labelled: Tensor
    """[N, S] bool: which steps have one."""
    first: Tensor
    """[N] int64: the first step whose label is below 1/2; -1 where none is."""
    sure: Tensor
    """[N] bool: whether it is known to be the first, since each step up to it has a label, or each where it is -1."""

    @classmethod
    def of(cls, given: Sequence[Sequence[float | None]]) -> Truth:
        """Of solutions, whose steps have those labels."""
        labels = torch.zeros(len(given), max(map(len, given)), dtype=torch.float64)
        labelled, there = (torch.zeros(labels.shape, dtype=torch.bool) for _ in range(2))
        for row, each in enumerate(given):
            there[row, : len(each)] = True
            for step, label in enumerate(each):
                if label is not None:
                    labels[row, step], labelled[row, step] = label, True
        first = first_errors(labels, labelled)
        return cls(labels, labelled, first, labelled_up_to(there, labelled, first))

    @property
    def wrong(self) -> int:
        """Solutions whose first error is known."""
        return int((self.first >= 0)[self.sure].sum())

    @property
    def right(self) -> int:
        """Solutions of which it is known that they have none."""
        return int((self.first < 0)[self.sure].sum())


@dataclass(frozen=True)
class OfSteps:
    """How well steps are told apart, and the first wrong one of solutions is found, as ProcessBench counts.

    A solution counts where its first error is known: each step up to it has a label, or each where there is none.
    """

    wrong: int
    """Solutions with an error."""
    right: int
    """Solutions without one."""
    wrong_found: Interval
    """Of solutions with an error, those whose first wrong step is the first that is called wrong; NaN without any."""
    right_passed: Interval
    """Of solutions without one, those of which no step is; NaN without any."""
    f1: Interval
    """The harmonic mean of the two."""
    f1_error: float
    """Its standard error."""
    steps: int
    """That have a label, of all solutions."""
    loss: float
    """Binary cross-entropy, nats a labelled step."""
    accuracy: Interval
    """Of labelled steps, those that are called what they are; 1/2 is right. Over solutions, which are independent."""
    accuracy_error: float
    """Its standard error, by how solutions differ."""
    calibration: Calibration
    """Of labelled steps."""


def of_steps(reading: Reading, labels: Sequence[Sequence[float | None]]) -> OfSteps:
    """Of solutions, whose steps have those labels."""
    truth = Truth.of(labels)
    agreed = (first_errors(reading.probabilities, reading.ends) == truth.first)[truth.sure]
    erring = (truth.first >= 0)[truth.sure]
    wrong, right = truth.wrong, truth.right
    found, passed = _share(agreed[erring]), _share(agreed[~erring])
    both = bool(wrong and right)
    hits = ((reading.probabilities >= 0.5) == (truth.labels >= 0.5)) & truth.labelled
    called, spread = float(hits.sum() / truth.labelled.sum()), ratio_error(hits.sum(1), truth.labelled.sum(1))
    logits, known = reading.values[truth.labelled], truth.labels[truth.labelled]
    return OfSteps(
        wrong=wrong,
        right=right,
        wrong_found=found,
        right_passed=passed,
        f1=harmonic_of(found, passed) if both else UNKNOWN,
        f1_error=harmonic_error(found.mean, passed.mean, wrong, right) if both else float("nan"),
        steps=len(known),
        loss=float(F.binary_cross_entropy_with_logits(logits, known)),
        accuracy=share_of(called, len(labels)),
        accuracy_error=spread,
        calibration=calibration(logits.sigmoid(), known),
    )


def _share(which: Tensor) -> Interval:
    return share(which) if len(which) else UNKNOWN
