"""DAPO's draws: until the batch is full, what each number is of, and prompts that come again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.observe.metrics import GLOSSARY
from megarlhf.parallel.layout import ParallelLayout
from tests.helpers.models import language_model, name_of, policy_and_judge, worst
from tests.helpers.ranks import run_ranks
from tests.trainers.test_critic_free import EVENNESS, PLAIN, by_prompt, by_row, config, iterate, metrics_of, rows_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = tmp_path_factory.mktemp("dapo")
    policy_and_judge(found)
    language_model(found / "other", seed=7, vocab_size=160, max_position_embeddings=128)
    (found / "own.py").write_text(EVENNESS)
    return str(found)


def first_draws(rollout: Rollout) -> Tensor:
    """Of groups 0, 1, 2, ... only every third says something."""
    return torch.where(rollout.prompt_ids // 4 % 3 == 2, by_row(rollout), 1.0)


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(data=2)], ids=name_of)
def test_dynamic_sampling_draws_until_the_batch_is_full(layout: ParallelLayout, folder: str, tmp_path: Path) -> None:
    changes = {"max_draws": 5, "rollout_batch": 12, "global_batch": 4, "batch_unit": "rollouts"}
    cfg = config("dapo", folder, tmp_path, layout, **changes)
    for done in run_ranks(iterate, layout.world_size, "dapo", cfg, rows_of(80), first_draws):
        # 3 groups, of which 1 is kept; a third of the next 1.25 * 2 / (1/3) -> 3 at most; then 1 is missing: 3 more.
        assert done["asked"] == [3, 3]
        assert (done["drawn"], done["judged"]) == (36, 36)
        metrics = done["metrics"]
        assert (metrics["draws/count"], metrics["draws/filled_groups"]) == (3.0, 0.0)
        assert metrics["draws/kept_fraction"] == pytest.approx(1 / 3)
        rows = rows_of(80)
        tokens = rows.response_lengths.view(-1, 4).sum(1)
        assert metrics["draws/discarded_tokens"] == float(tokens[[0, 1, 3, 4, 6, 7]].sum())
        assert metrics["rollout/score_mean"] == pytest.approx((6 * 1.0 + 3 * 1.5) / 9)
        assert metrics["policy/grad_norm"] > 0


def test_after_the_last_draw_groups_of_equal_scores_fill_the_batch(folder: str, tmp_path: Path) -> None:
    changes = {"max_draws": 2, "rollout_batch": 12, "global_batch": 12, "batch_unit": "rollouts", "shaping": PLAIN}
    cfg = config("dapo", folder, tmp_path, ParallelLayout(), **changes)
    (done,) = run_ranks(iterate, 1, "dapo", cfg, rows_of(80), by_prompt)
    assert done["asked"] == [3]
    assert done["metrics"]["draws/filled_groups"] == 3.0
    assert worst(done["after"], done["before"]) == 0.0


@pytest.mark.parametrize("normalise", ["none", "batch", "running"])
def test_what_is_learnt_from_is_measured_and_normalised_by_itself(normalise: str, folder: str, tmp_path: Path) -> None:
    """Scores and lengths are of all 36 rollouts; what needs the models, and what is learnt from, of the 12 kept."""
    changes = {"max_draws": 5, "rollout_batch": 12, "global_batch": 4, "batch_unit": "rollouts", "kl_coef": 0.1}
    shaping, reference = {**PLAIN, "normalise": normalise}, {"init": f"{folder}/other"}
    cfg = config("dapo", folder, tmp_path, ParallelLayout(), shaping=shaping, reference=reference, **changes)
    (done,) = run_ranks(iterate, 1, "dapo", cfg, rows_of(80), first_draws)
    rows, rewards, metrics = done["rows"], done["rewards"].sum(1), done["metrics"]
    kept, everything = rows.rollout, rows_of(80).rows(torch.arange(36))
    assert (kept.prompt_ids // 4).unique().tolist() == [2, 5, 8]
    # A kept group scores 0, 1, 2, 3, whose variance is 5 / 4; the others 1 four times.
    expected = by_row(kept) if normalise == "none" else (by_row(kept) - 1.5) / (math.sqrt(5 / 4) + 1e-6)
    torch.testing.assert_close(rewards, expected)
    mask = kept.response_mask
    gap, moved = (kept.sampler_logprobs - rows.logprobs).abs()[mask], (rows.logprobs - rows.ref_logprobs)[mask]
    learnt = {
        "rollout/reward_mean": expected.mean(),
        "rollout/sampler_gap_max": gap.max(),
        "rollout/sampler_gap_mean": gap.mean(),
        "rollout/token_mult_prob_error": gap.exp().mean(),
        "kl/reference_mean": moved.sum() / 12,
        "kl/reference_per_token": moved.mean(),
    }
    drawn = {
        "rollout/score_mean": first_draws(everything).mean(),
        "rollout/score_std": first_draws(everything).std(correction=0),
        "rollout/response_length_mean": everything.response_lengths.float().mean(),
        "rollout/tokens": everything.response_lengths.sum(),
        "judge/said_mean": first_draws(everything).mean(),
        "group/equal_fraction": 6 / 9,
    }
    assert abs(float(moved.sum())) > 1
    for name, value in {**learnt, **drawn}.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    for name in [name for name in (*learnt, *drawn) if name in GLOSSARY]:
        assert ("learn" in GLOSSARY[name].reduction) == (name in learnt), name


def test_a_prompt_that_comes_again_gets_other_responses(folder: str, tmp_path: Path) -> None:
    """Four prompts, and three draws of four groups: each prompt three times, since nothing tells responses apart."""
    prompts = {"source": "arithmetic", "template": "plain", "arithmetic": {"level": 1, "rows": 4}}
    judge = {"kind": "rule", "rule": "length", "least": 0}
    changes = {"iterations": 1, "samples": 99, "gates": "off", "prompts": prompts, "judges": {"any": judge}}
    ((row,),) = run_ranks(metrics_of, 1, "dapo", folder, str(tmp_path), changes)
    assert (row["draws/count"], row["draws/kept_fraction"], row["draws/filled_groups"]) == (3, 0, 4)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    groups = [samples[start : start + 4] for start in range(0, 48, 4)]
    for prompt in {sample["prompt"] for sample in samples}:
        drawn = [tuple(each["response"] for each in group) for group in groups if group[0]["prompt"] == prompt]
        assert (len(drawn), len(set(drawn))) == (3, 3)
