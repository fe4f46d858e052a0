"""PPO's warnings of over-optimisation: when they come, how often, and what they do to a run."""

from __future__ import annotations

import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.checkpoint.training_state import latest_state
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers import ppo
from megarlhf.trainers.ppo import PPOConfig
from megarlhf.trainers.watch import KL_OVER_BOUND, OVER_OPTIMISED, Watch
from tests.helpers.models import policy_and_judge
from tests.helpers.ranks import run_ranks
from tests.runs.test_resume import ppo_settings


def rows(accuracies: list[float], verified: int = 256) -> list[dict[str, float]]:
    """A score that rises by a standard deviation an iteration, and a KL by a nat."""
    return [
        {
            "rollout/score_mean": float(i),
            "rollout/score_std": 1.0,
            "rollout/accuracy": accuracy,
            "rollout/verified": verified,
            "kl/reference_mean": float(i),
        }
        for i, accuracy in enumerate(accuracies)
    ]


def watch(**settings: Any) -> Watch:
    return Watch(PPOConfig(run_dir=Path("run"), rollout_batch=256, **settings))


def test_each_warning_is_said_once_and_logged_while_it_holds() -> None:
    looked = watch(kl_bound=2.5).look
    flags, said = zip(*map(looked, rows([0.5, 0.45, 0.2, 0.2, 0.5])), strict=True)
    assert [row[OVER_OPTIMISED] for row in flags] == [0, 0, 1, 1, 0]
    assert [row[KL_OVER_BOUND] for row in flags] == [0, 0, 0, 1, 1]
    assert [len(lines) for lines in said] == [0, 0, 1, 1, 0]
    assert said[2][0].startswith(
        "warning, iteration 3: the score rose from 0.00 to 2.00 while accuracy fell from 0.500 to 0.200"
    )
    (far,) = said[3]
    assert far.startswith("warning, iteration 4: the KL to the reference is 3.0 nats, over kl_bound=2.5; stop earlier")


def test_rollouts_of_one_prompt_count_once() -> None:
    grouped = watch(group_size=4)
    found = [grouped.look(row)[0][OVER_OPTIMISED] for row in rows([0.5, 0.45, 0.2, 0.2])]
    assert found == [0, 0, 0, 0]  # four iterations of 64 prompts make the first block


def test_without_answers_only_the_kl_is_watched() -> None:
    silent = [
        {name: value for name, value in row.items() if "acc" not in name and "veri" not in name}
        for row in rows([0.5] * 3)
    ]
    assert [watch(kl_bound=None).look(row)[0] for row in silent] == [{OVER_OPTIMISED: 0, KL_OVER_BOUND: 0}] * 3


def test_after_a_stop_it_knows_what_it_knew() -> None:
    history = rows([0.5, 0.45, 0.2, 0.2])
    whole, again = watch(), watch()
    before = [whole.look(row) for row in history]
    again.restore(history[:3])
    assert again.look(history[3]) == before[3]
    assert before[3][1] == []


def run(where: str, folder: str) -> str:
    """A run that meets a bound it cannot keep; what it said."""
    mesh = start(ParallelLayout(), seed=1)
    changes = {"kl_bound": 1e-9, "stop_when_over_optimised": True, "save_every": 0, "iterations": 12}
    cfg = ppo_settings(Path(where), mesh.layout, folder, **changes)
    with redirect_stderr(StringIO()) as said:
        ppo.TRAINER.run(cfg, ppo.TRAINER.prepare(cfg), [], mesh)
    return said.getvalue()


def test_a_run_can_end_itself_with_its_state_and_its_model(tmp_path: Path) -> None:
    policy_and_judge(tmp_path)
    (said,) = run_ranks(run, 1, str(tmp_path / "run"), str(tmp_path))
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Two iterations warm the critic up, the third moves the actor, and one after that finds it beyond the bound.
    assert 4 <= len(logged) < 12
    assert [row[KL_OVER_BOUND] for row in logged] == [0.0] * (len(logged) - 1) + [1.0]
    state = latest_state(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert state.name.endswith(f"{len(logged):08d}")
    assert describe_model(str(tmp_path / "run" / "model")).head == "language"
    assert said.count("over kl_bound=1e-09") == 1
    assert f"ended after iteration {len(logged)} of 12" in said
