"""What a policy is measured by while it learns is what `megarlhf eval` says of it, and learning does not notice."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.commands import evaluate
from megarlhf.commands.evaluate import EvalConfig
from megarlhf.errors import JudgeError
from megarlhf.eval.accuracy import roll_out
from megarlhf.judges.panel import Panel
from megarlhf.judges.texts import Reader
from megarlhf.models.readings import LabelLogprobs
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers import ppo
from megarlhf.trainers.heldout import PROMPTS
from megarlhf.trainers.ppo import PPOConfig
from tests.helpers.models import frozen, name_of, policy_and_judge, whole_weights, worst
from tests.helpers.ranks import run_ranks
from tests.helpers.refusal import DPO, PPO, REWARD, SFT, assert_matches
from tests.runs.test_resume import ITERATIONS, logged_lines, ppo_settings, stopped_after

LAYOUTS = [ParallelLayout(data=2), ParallelLayout(tensor=2), ParallelLayout(pipeline=2)]
HELDOUT = {"source": "arithmetic", "template": "plain", "arithmetic": {"level": 1, "rows": 129}}
"""129 prompts: two data ranks draw 65 and 64."""


def config(run_dir: Path, layout: ParallelLayout, folder: str, **changes: Any) -> PPOConfig:
    """Random weights seldom end in the right number: a verifier that takes any last number finds some of 129."""
    optim = {"lr": 1e-2, "schedule": "constant"}
    given = {
        "verifier": "gsm8k",
        "heldout": HELDOUT,
        "eval_every": 2,
        "value_warmup_iterations": 0,
        "sampling": {"temperature": 0.9, "top_k": 60, "top_p": 0.95, "max_new_tokens": 8},
        "actor": {"init": f"{folder}/actor", "optim": optim},
    }
    return ppo_settings(run_dir, layout, folder, **{**given, **changes})


def trained(stops: list[int | None], cfg: PPOConfig) -> tuple[dict[str, Tensor], str]:
    """Run, and where `stops` say so stop after an iteration and go on: the weights, and what was said."""
    mesh, said = start(cfg.layout, seed=1), io.StringIO()
    for stop in stops:
        with stopped_after(stop) if stop is not None else nullcontext(), redirect_stderr(said):
            ppo.TRAINER.run(cfg, ppo.TRAINER.prepare(cfg), ["ppo"], mesh)
    return whole_weights(frozen(str(cfg.model_dir), LabelLogprobs(1.0), mesh)), said.getvalue()


def run(cfg: PPOConfig, *stops: int | None) -> tuple[dict[str, Tensor], str]:
    return run_ranks(trained, cfg.layout.world_size, [*stops, None], cfg)[0]


def measured(run_dir: Path) -> dict[int, dict[str, float]]:
    """What was measured, by iteration."""
    rows = [(row["step"], {k: v for k, v in row.items() if k.startswith("eval/")}) for row in logged_lines(run_dir)]
    return {int(step): found for step, found in rows if found}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("measuring")
    policy_and_judge(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[PPOConfig, dict[str, Tensor]]:
    cfg = config(tmp_path_factory.mktemp("whole") / "run", ParallelLayout(), folder)
    return cfg, run(cfg)[0]


def evaluated(cfg: EvalConfig) -> None:
    """`megarlhf eval`."""
    with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        evaluate._run("megarlhf eval", cfg, evaluate.prepare(cfg), start(cfg.layout, seed=cfg.seed))


def separately(cfg: PPOConfig, model: str, output: Path) -> list[dict[str, Any]]:
    """The sampled responses of `megarlhf eval`, judged."""
    given = {"sampling": cfg.sampling, "seed": cfg.seed, "micro_batch": cfg.micro_batch, "prompts": HELDOUT}
    asked = {"model": model, "reward": cfg.reward.init, "tokenizer": "arithmetic", "verifier": "gsm8k"}
    run_ranks(evaluated, 1, EvalConfig.model_validate({**given, **asked, "output": output}))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    return [row for row in rows if row["decoding"] == "sampled"]


def test_accuracy_and_score_are_those_of_eval(whole: tuple[PPOConfig, dict[str, Tensor]], tmp_path: Path) -> None:
    cfg, _ = whole
    found = measured(cfg.run_dir)
    assert sorted(found) == [0, 2, 4]
    for step, model in ((0, cfg.actor.init), (ITERATIONS, str(cfg.model_dir))):
        said = separately(cfg, model, tmp_path / f"{step}.jsonl")
        assert found[step]["eval/accuracy"] == sum(row["correct"] for row in said) / len(said)
        assert found[step]["eval/score_mean"] == pytest.approx(sum(row["score"] for row in said) / len(said), rel=1e-6)
    assert found[0]["eval/accuracy"] > 0
    assert found[0]["eval/score_mean"] != found[4]["eval/score_mean"]


def distance(cfg: PPOConfig, model: str) -> tuple[float, float, float]:
    """Mean nats a response from the actor's start, by k1 and k3; mean length: of the model's own responses."""
    mesh = start(cfg.layout, seed=cfg.seed)
    inputs = ppo.TRAINER.prepare(cfg.model_copy(update={"run_dir": Path(f"{cfg.run_dir}_not_used")}))
    assert inputs.heldout is not None
    policy, reference = (
        frozen(init, LabelLogprobs(cfg.sampling.temperature), mesh) for init in (model, cfg.actor.init)
    )
    reader = Reader(inputs.heldout.prompts, inputs.tokenizer, mesh, cfg.timeout_s)
    (drawn,) = roll_out(policy, reader, cfg.sampling, seed=cfg.seed)
    gap = (policy.score(drawn) - reference.score(drawn)).double()
    k3 = torch.expm1(-gap) + gap
    mask = drawn.response_mask
    return float(gap[mask].sum()) / len(drawn), float(k3[mask].sum()) / len(drawn), float(mask.sum()) / len(drawn)


def test_the_kl_is_that_of_the_models_log_probs(whole: tuple[PPOConfig, dict[str, Tensor]]) -> None:
    cfg, _ = whole
    (said,) = run_ranks(distance, 1, cfg, str(cfg.model_dir))
    last = measured(cfg.run_dir)[ITERATIONS]
    names = ("eval/kl_mean", "eval/kl_k3_mean", "eval/response_length_mean")
    assert [last[name] for name in names] == pytest.approx(said, rel=1e-5)
    assert last["eval/kl_mean"] > 0.01
    assert [measured(cfg.run_dir)[0][name] for name in names[:2]] == pytest.approx([0.0, 0.0], abs=1e-6)


def test_learning_does_not_notice(whole: tuple[PPOConfig, dict[str, Tensor]], folder: str, tmp_path: Path) -> None:
    """All other metrics and all weights are those of a run without, to the bit."""
    cfg, found = whole
    without = config(tmp_path / "run", ParallelLayout(), folder, eval_every=0, heldout=None)
    weights, _ = run(without)
    assert worst(found, weights) == 0.0
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in logged_lines(place) if row["step"]]
        for place in (cfg.run_dir, without.run_dir)
    ]
    assert rows[0] == rows[1]
    assert measured(without.run_dir) == {}


def test_a_stopped_run_measures_what_the_whole_one_did(
    whole: tuple[PPOConfig, dict[str, Tensor]], folder: str, tmp_path: Path
) -> None:
    cfg, found = whole
    again = config(tmp_path / "run", ParallelLayout(), folder)
    pieces, _ = run(again, 1, 3)
    assert worst(found, pieces) == 0.0
    assert logged_lines(again.run_dir) == logged_lines(cfg.run_dir)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_no_layout_changes_it(
    layout: ParallelLayout, whole: tuple[PPOConfig, dict[str, Tensor]], folder: str, tmp_path: Path
) -> None:
    cfg = config(tmp_path / "run", layout, folder)
    run(cfg)
    ours, theirs = measured(cfg.run_dir), measured(whole[0].run_dir)
    assert ours.keys() == theirs.keys()
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4, abs=1e-5)
    assert ours[4] == pytest.approx(theirs[4], rel=2e-2, abs=2e-3)


def test_what_was_warned_of_before_a_stop_is_not_said_again(folder: str, tmp_path: Path) -> None:
    """The row of step 0 is of no iteration."""
    _, said = run(config(tmp_path / "run", ParallelLayout(), folder, kl_bound=1e-9, iterations=3), 2)
    assert said.count("warning, iteration 2: the KL to the reference is") == 1
    assert said.count("over kl_bound=1e-09") == 1


def test_what_ends_a_run_early_is_measured_last(folder: str, tmp_path: Path) -> None:
    """As after the last iteration, whatever eval_every says."""
    ending = {"kl_bound": 1e-9, "stop_when_over_optimised": True, "eval_every": 100, "iterations": 12}
    cfg = config(tmp_path / "run", ParallelLayout(), folder, **ending)
    run(cfg)
    steps = int(logged_lines(cfg.run_dir)[-1]["step"])
    assert steps < 12
    assert sorted(measured(cfg.run_dir)) == [0, steps]


def silent(cfg: PPOConfig) -> str:
    """A judge that answers training, but not the measurements; what the run said."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:

        def reading(panel: Panel, reader: Reader) -> Panel:
            return replace(panel, judges=(Silent(),), verifier=None)

        patch.setattr(Panel, "reading", reading)
        ppo.TRAINER.run(cfg, ppo.TRAINER.prepare(cfg), ["ppo"], start(cfg.layout, seed=1))
    return said.getvalue()


class Silent:
    """A service that is down."""

    name, weight, wrong_score = "silent", 1.0, 0.0

    def judge(self, rollout: Any) -> Any:
        raise JudgeError("judges.silent does not answer; start it.")


def test_a_judge_that_is_silent_at_a_measurement_costs_no_step(
    whole: tuple[PPOConfig, dict[str, Tensor]], folder: str, tmp_path: Path
) -> None:
    """The step is done: saved as the one before, as when a judge is silent in a step, it would be taken twice."""
    cfg = config(tmp_path / "run", ParallelLayout(), folder)
    (said,) = run_ranks(silent, 1, cfg)
    assert said.count("judges.silent does not answer") == 3
    assert measured(cfg.run_dir) == {}
    rows = [{k: v for k, v in row.items() if "eval/" not in k} for row in logged_lines(whole[0].run_dir)]
    assert logged_lines(cfg.run_dir)[1:] == rows[1:]


def held_out(cfg: PPOConfig) -> tuple[str, str, int, Any]:
    inputs = ppo.TRAINER.prepare(cfg)
    assert inputs.heldout is not None
    data = inputs.heldout.data
    return data.source, data.split, len(inputs.heldout.prompts), data.arithmetic.seed


def test_generated_prompts_have_some_held_out(folder: str, tmp_path: Path) -> None:
    """eval_every alone is enough, and what is measured is not all that could be generated."""
    few = config(tmp_path / "run", ParallelLayout(), folder, heldout=None)
    assert held_out(few) == ("arithmetic", "heldout", 20, 4)  # as many as are learnt from, where those are fewer
    more = {**dict(few.prompts), "arithmetic": {"level": 1, "rows": 1000, "seed": 4}}
    many = config(tmp_path / "run", ParallelLayout(), folder, heldout=None, prompts=more)
    assert held_out(many) == ("arithmetic", "heldout", PROMPTS, 4)


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (SFT, ["eval_every=5"], "eval_every=5: nothing is held out to measure; set heldout.source to demonstrations"),
        (
            REWARD,
            ["eval_every=5"],
            "eval_every=5: nothing is held out to measure; set heldout_pairs.source, or",
        ),
        (DPO, ["eval_every=5"], "eval_every=5: nothing is held out to measure; set heldout.source to pairs"),
        (
            PPO,
            ["eval_every=5", "prompts.source=mine.jsonl"],
            "eval_every=5: nothing is held out of prompts.source=mine.jsonl; set heldout.source to prompts",
        ),
        (
            PPO,
            ["eval_every=5", "prompts.split=heldout"],
            "heldout: all its 32 rows are among those of prompts, which are learnt from; name others, by",
        ),
        (
            SFT,
            ["heldout.source=arithmetic", "heldout.template=plain", "heldout.split=train", "heldout.arithmetic.rows=9"],
            "heldout: all its 9 rows are among those of data, which are learnt from; name others, by heldout.source",
        ),
        (
            REWARD,
            ["heldout.source=arithmetic", "heldout.template=plain", "heldout.split=train", "heldout.arithmetic.rows=9"],
            "heldout: all its 9 rows are among those of labelled, which are learnt from; name others, by",
        ),
        (
            DPO,
            ["heldout.source=arithmetic", "heldout.template=plain", "heldout.split=train", "heldout.arithmetic.rows=9"],
            "heldout: all its .* rows are among those of pairs, which are learnt from; name others, by",
        ),
        (
            PPO,
            ["eval_every=5", "save_every=7", "keep_best=eval/accuracy"],
            (
                "keep_best=eval/accuracy is measured every eval_every=5 steps, but states are saved every "
                "save_every=7, where .*; make save_every a multiple of eval_every"
            ),
        ),
        (
            SFT,
            ["heldout.source=arithmetic", "keep_best=-sft/heldout_loss"],
            (
                "keep_best=-sft/heldout_loss is measured after the last step alone (eval_every=0), and states are "
                "saved every save_every=100 steps; set eval_every, of which save_every is a multiple"
            ),
        ),
        (
            PPO,
            ["eval_every=5", "keep_best=eval/acuracy"],
            "keep_best=eval/acuracy is not logged by this run; choose one of eval/accuracy, eval/kl_k3_mean, ",
        ),
        (
            PPO,
            ["eval_every=5", "patience=2", "keep_best=rollout/score_mean"],
            (
                "patience=2 counts measurements, and keep_best=rollout/score_mean names none of them; set keep_best to "
                "one of eval/accuracy, .*, or patience=0"
            ),
        ),
        (
            SFT,
            ["patience=2"],
            "patience=2 counts measurements, and keep_best= names none of them; set heldout.source .*, or patience=0",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    command: tuple[str, ...], overrides: list[str], message: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    rows = ({"prompt": f"Tom has {n} apples.", "answer": f"{n + 1}"} for n in range(32))
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_matches(refused(command, *overrides), message)
