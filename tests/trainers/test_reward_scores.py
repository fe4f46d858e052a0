"""What a reward model's directory says of its scores, and that PPO heeds it for responses that were cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.batch.supervised import LabelledResponses
from megarlhf.checkpoint.model_directory import ModelDescription, describe_model
from megarlhf.data.rows import pad_right
from megarlhf.models.readings import SequenceScores
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers import reward
from megarlhf.trainers.judged import JudgedInputs
from megarlhf.trainers.policy_loop import cut_score_remark
from megarlhf.trainers.ppo import PPOConfig
from megarlhf.trainers.reward import RewardConfig
from tests.helpers.models import frozen
from tests.helpers.ranks import run_ranks
from tests.trainers.worlds import ppo_cast, ppo_config

DATA = {"template": "plain", "arithmetic": {"level": 1, "rows": 40}}
CASES: dict[str, dict[str, Any]] = {
    "pairs, centre": {"pairs": DATA},
    "pairs, none": {"pairs": DATA, "normalise": "none"},
    "judged, standardise": {"labelled": DATA, "normalise": "standardise"},
    "both, standardise": {"pairs": DATA, "labelled": DATA, "normalise": "standardise"},
    "held out, standardise": {"pairs": DATA, "heldout": {**DATA, "split": "heldout"}, "normalise": "standardise"},
}
Trained = tuple[Tensor, Tensor, ModelDescription, float]


def measured(inputs: JudgedInputs) -> tuple[LabelledResponses, Tensor]:
    """What normalising measures, put together another way: (rows, which of them are right)."""
    tokens: list[Any] = []
    right: list[bool] = []
    for judged in (inputs.heldout, None if inputs.heldout else inputs.labelled):
        if judged is not None:
            tokens += judged.tokens
            right += [correct > 0.5 for correct in judged.correct]
    if inputs.heldout is None and inputs.pairs is not None:
        tokens += [*inputs.pairs.chosen, *inputs.pairs.rejected]
        right += [True] * len(inputs.pairs) + [False] * len(inputs.pairs)
    padded, lengths = pad_right(tokens, 0)
    judged = torch.tensor(right)
    return LabelledResponses(padded, lengths, judged.float(), judged.float()), judged


def trained(where: str) -> dict[str, Trained]:
    """Every case: its directory's scores, which responses are right, its description, what PPO takes wrong ones for."""
    mesh = start(ParallelLayout(), seed=1)
    found = {}
    for name, case in CASES.items():
        cfg = RewardConfig.model_validate(
            {
                "run_dir": Path(where, name),
                "model": "tiny-xs",
                "tokenizer": "arithmetic",
                "pairs_batch": 8,
                "labelled_batch": 16,
                "save_every": 0,
                "tensorboard": False,
                "optim": {"lr": 1e-3, "warmup_steps": 0},
                "epochs": 0.5,
                **case,
            }
        )
        inputs = reward.prepare(cfg)
        reward.TRAINER.run(cfg, inputs, [], mesh)
        described = describe_model(str(cfg.model_dir))
        judge = frozen(str(cfg.model_dir), SequenceScores(described.score_offset, described.score_scale), mesh)
        rows, right = measured(inputs)
        cast = ppo_cast(ppo_config(Path(where), mesh.layout, "tiny-xs", str(cfg.model_dir)), mesh)
        found[name] = (judge.score(rows), right, described, cast.panel.wrong_score)
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    return run_ranks(trained, 1, str(tmp_path_factory.mktemp("reward")))[0]


@pytest.mark.parametrize("name", CASES)
def test_scores_are_normalised_and_what_wrong_ones_score_is_known(name: str, models: dict[str, Trained]) -> None:
    scores, right, described, wrong_score = models[name]
    assert 0 < int(right.sum()) < len(right)
    if "none" in name:
        assert (described.score_offset, described.score_scale) == (0.0, 1.0)
    else:
        assert float(scores.mean()) == pytest.approx(0.0, abs=1e-5)
    if "standardise" in name:
        assert float(scores.std()) == pytest.approx(1.0, abs=1e-5)
    assert described.score_wrong == pytest.approx(float(scores[~right].mean()), abs=1e-5)
    assert wrong_score == described.score_wrong


def test_a_cut_score_above_wrong_ones_is_said() -> None:
    def remark(wrong: float = -2.1, **shaping: Any) -> str:
        cfg = PPOConfig.model_validate({"run_dir": "run", "reward": {"init": "x"}, "shaping": shaping})
        return cut_score_remark(cfg, wrong)

    assert "shaping.missing_eos=-1 is more than -2.10" in remark(missing_eos=-1.0)
    assert remark() == remark(missing_eos=None) == remark(missing_eos=-2.5) == ""
    assert remark(math.inf, missing_eos=-1.0) == ""
