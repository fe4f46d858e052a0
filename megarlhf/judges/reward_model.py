"""A judge that is a model with a scalar head, resident while it judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megarlhf.batch.rollouts import Rollout
from megarlhf.judges.judge import UNKNOWN, JudgeConfig, Verdict, outcome
from megarlhf.models.role import FrozenRole
from megarlhf.parallel.mesh import Mesh
from megarlhf.runtime.checks import Model
from megarlhf.runtime.roles import away, frozen
from megarlhf.runtime.settings import RanksConfig


class ScalarModelConfig(JudgeConfig):
    """A judge that is a model with a scalar head."""

    init: str
    """Its weights: a Hugging Face or megarlhf directory, or a preset drawn from `seed`."""


class ModelJudgeConfig(ScalarModelConfig):
    """A reward model."""

    kind: Literal["model"]
    """`model`: a model directory with a scalar head, as `megarlhf reward` trains it."""


@dataclass(frozen=True)
class ModelJudge:
    """The role that scores, and what is known of its scores."""

    name: str
    weight: float
    wrong_score: float
    role: FrozenRole

    def judge(self, rollout: Rollout) -> Verdict:
        """Judge every row by one forward pass. Collective."""
        return Verdict(outcome(self.role.score(rollout), rollout))


def model_judge(name: str, weight: float, model: Model, cfg: RanksConfig, mesh: Mesh) -> ModelJudge:
    """Load it, and move it off the device until it is wanted. Collective."""
    known = model.description
    role = away(frozen(name, model, known.scores(), cfg, mesh))
    return ModelJudge(name, weight, UNKNOWN if known.score_wrong is None else known.score_wrong, role)
