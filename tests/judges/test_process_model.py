"""A judge of steps: each is read where it ends and earns what the settings say, in every layout; one is an outcome."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megarlhf.batch.rollouts import Rollout
from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.data.arithmetic import STEP_SEPARATOR, words
from megarlhf.data.prompts import PromptSet
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import ConfigError
from megarlhf.judges.judge import Verdict, joined_verdicts
from megarlhf.judges.panel import Court, build_panel
from megarlhf.judges.process_model import ProcessJudgeConfig
from megarlhf.judges.texts import Reader
from megarlhf.models.readings import LabelLogprobs, SequenceScores
from megarlhf.observe.clock import Clock
from megarlhf.observe.writers import read_metrics
from megarlhf.ops.masked import last_true
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.runs.guard import StepGuard
from megarlhf.runtime.checks import Model
from megarlhf.trainers import ppo, reinforce
from megarlhf.trainers.policy_loop import Turn
from tests.helpers.models import frozen, name_of, policy_and_judge, whole_weights
from tests.helpers.ranks import run_ranks
from tests.judges.test_panel import rollout_of, settings
from tests.runs.test_resume import CLOCKED, ppo_settings
from tests.trainers.test_critic_free import SMALL
from tests.trainers.worlds import no_more

RESPONSES = (
    "6 - 6 = 0. 0 + 7 = 7. The answer is 7.",
    "The answer is 7.",
    "1 + 1 = 2. The answer is 2.",
    "7. 7. 7. 7. 7.",
)
STEPS = (3, 1, 2, 5)
"""Of each response."""
CUT = {"missing_eos": -1.0}
OFFSET, SCALE = 0.25, 2.0


def process_model(folder: Path, **said: Any) -> None:
    """`folder`/judge becomes a model that says this of itself."""
    config = folder / "judge" / "config.json"
    ours = {"score_offset": OFFSET, "score_scale": SCALE, **said}
    config.write_text(json.dumps({**json.loads(config.read_text()), "megarlhf": ours}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = tmp_path_factory.mktemp("steps")
    policy_and_judge(found)
    process_model(found, step_separator=STEP_SEPARATOR)
    return str(found)


def drawn() -> tuple[PromptSet, Rollout]:
    tokenizer = build_tiny_tokenizer(words())
    prompts = [tokenizer.encode_prompt(f"How many? {number}", "plain") for number in range(len(RESPONSES))]
    columns = [{"prompt": f"How many? {number}"} for number in range(len(RESPONSES))]
    found = PromptSet(prompts, [""] * len(prompts), range(len(prompts)), tokenizer.pad_id, dropped=0, columns=columns)
    rows = [ids + tokenizer.encode_response(said) for ids, said in zip(prompts, RESPONSES, strict=True)]
    return found, rollout_of(found, rows)


def judged(layout: ParallelLayout, folder: str, judges: dict[str, dict[str, Any]]) -> dict[str, Verdict]:
    """What each says of the responses."""
    mesh = start(layout, seed=1)
    cfg = settings(layout, f"{folder}/nowhere", judges)
    models = {name: Model(f"judges.{name}.init", init, describe_model(init)) for name, init in inits(cfg).items()}
    prompts, rollout = drawn()
    reader = Reader(prompts, build_tiny_tokenizer(words()), mesh, 60.0)
    return dict(build_panel(cfg.panel, None, Court(models, reader, cfg)).judge(rollout).verdicts)


def inits(cfg: ppo.PPOConfig) -> dict[str, str]:
    return {name: init for name, init in cfg.inits.items() if name in cfg.judges}


def judge_of(folder: str, **changes: Any) -> dict[str, Any]:
    return {"kind": "process", "init": f"{folder}/judge", **changes}


LAYOUTS = [ParallelLayout(), ParallelLayout(data=2), ParallelLayout(tensor=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
def test_a_step_is_worth_what_the_model_says_of_the_text_that_ends_with_it(layout: ParallelLayout, folder: str) -> None:
    """Every text up to the end of a step was scored by itself, as an outcome."""
    expected = run_ranks(prefix_scores, 1, folder)[0]
    judges = {"logit": judge_of(folder, value="logit"), "sure": judge_of(folder)}
    for said in run_ranks(judged, layout.world_size, layout, folder, judges):
        assert tuple(map(len, said["logit"].steps)) == STEPS
        for logits, chances, by_hand in zip(said["logit"].steps, said["sure"].steps, expected, strict=True):
            assert logits == pytest.approx(by_hand, abs=2e-5)
            # A score that is shifted and scaled is no logit: chances are of what the head says.
            raw = [SCALE * score + OFFSET for score in by_hand]
            assert chances == pytest.approx([1 / (1 + math.exp(-logit)) for logit in raw], abs=1e-5)


def prefix_scores(folder: str) -> list[list[float]]:
    """By hand: a token "." that others than EOS follow ends a step, and so does EOS."""
    mesh = start(ParallelLayout(), seed=1)
    role = frozen(f"{folder}/judge", SequenceScores(OFFSET, SCALE), mesh)
    dot, rollout = build_tiny_tokenizer(words()).encode_response(".")[0], drawn()[1]
    found = []
    for tokens, first, length in zip(rollout.tokens, rollout.prompt_lengths, rollout.lengths, strict=True):
        ids = tokens[: int(length)].tolist()
        ends = [at for at in range(int(first), len(ids) - 2) if ids[at] == dot] + [len(ids) - 1]
        width = max(ends) + 1
        rows = torch.stack([torch.nn.functional.pad(tokens[: end + 1], (0, width - end - 1)) for end in ends])
        lengths = torch.tensor(ends) + 1
        none = torch.zeros(len(ends), width - 1)
        ended = torch.ones(len(ends), dtype=torch.bool)
        one = torch.ones_like(lengths)
        found.append(role.score(Rollout(rows, one, lengths, ended, none, one, ("",) * len(ends))).tolist())
    return found


def test_what_is_earned_by_hand(folder: str) -> None:
    ways = ("sum", "soft_min", "min", "product", "mean", "last")
    judges = {f"by_{how}": judge_of(folder, reward=how) for how in ways}
    (said,) = run_ranks(judged, 1, ParallelLayout(), folder, judges)
    rollout = drawn()[1]
    for row, values in enumerate(said["by_sum"].steps):
        least = [math.exp(-10 * value) for value in values]
        by_hand = {
            "sum": values,
            "soft_min": [value * weight / sum(least) for value, weight in zip(values, least, strict=True)],
            **{
                how: [*[0.0] * (len(values) - 1), score]
                for how, score in {
                    "min": min(values),
                    "product": math.prod(values),
                    "mean": sum(values) / len(values),
                    "last": values[-1],
                }.items()
            },
        }
        ends = said["by_sum"].token_scores[row].nonzero().flatten()
        assert len(ends) == len(values)
        assert int(ends[-1]) == int(rollout.lengths[row]) - 2  # which is about the token after
        for how, earned in by_hand.items():
            got = said[f"by_{how}"].token_scores[row]
            assert got[ends].tolist() == pytest.approx(earned, rel=1e-4, abs=1e-7), how
            assert got.sum().item() == pytest.approx(sum(earned), rel=1e-4)
            own = earned if how in ("sum", "soft_min") else values
            assert said[f"by_{how}"].earned[row] == pytest.approx(own, rel=1e-4, abs=1e-7), how


def test_no_product_of_numbers_below_0() -> None:
    """Two steps of which the model thinks badly would make a good response."""
    for reward in ("sum", "soft_min", "min", "mean", "last"):
        ProcessJudgeConfig(kind="process", init="x", value="logit", reward=reward)
    ProcessJudgeConfig(kind="process", init="x", reward="product")
    with pytest.raises(ValueError, match="reward=product with value=logit: two steps below 0 would make a good"):
        ProcessJudgeConfig(kind="process", init="x", value="logit", reward="product")


def test_verdicts_are_joined_and_chosen_with_their_steps() -> None:
    first, second = (
        Verdict(torch.ones(2, 3) * at, steps=[[at], [at, 2.0]], earned=[[-at], [1.0, -at]]) for at in (0.5, 0.7)
    )
    both = joined_verdicts([first, second])
    assert both.steps == [[0.5], [0.5, 2.0], [0.7], [0.7, 2.0]]
    assert both.earned == [[-0.5], [1.0, -0.5], [-0.7], [1.0, -0.7]]
    assert both.rows([3, 0]).steps == [[0.7, 2.0], [0.5]]
    assert both.rows([3, 0]).earned == [[1.0, -0.7], [-0.5]]


def learnt_from(name: str, where: str, folder: str) -> dict[str, Tensor]:
    """Of one iteration whose judge rewards every word, a cut response costs 1, and a KL nothing."""
    mesh, trainer = start(ParallelLayout(), seed=1), TRAINERS[name]
    cfg = config_of(name, where, folder, judge_of(folder, reward="sum", separator=" "), kl_coef=0.0, shaping=CUT)
    inputs = trainer.prepare(cfg)
    turn = Turn(0, cfg.seed, Clock(mesh.device), StepGuard(cfg.run_dir, 0, mesh), no_more)
    prompts = inputs.prompts.batch(torch.arange(cfg.prompts_per_iteration))
    cast: Any = trainer.models(cfg, inputs, mesh)
    done: Any = (ppo.ppo_iteration if name == "ppo" else reinforce.reinforce_iteration)(cast, prompts, cfg, turn)
    rewards = done.estimate.token_level_rewards if name == "ppo" else done.token_level_rewards
    return {
        "rewards": rewards,
        "said": done.judgement.token_scores,
        "ended": done.rollout.terminated,
        "last": last_true(done.rollout.response_mask),
    }


@pytest.mark.parametrize("name", ["ppo", "reinforce"])
def test_what_is_learnt_from_stands_where_it_was_earned(name: str, folder: str, tmp_path: Path) -> None:
    (found,) = run_ranks(learnt_from, 1, name, str(tmp_path), folder)
    last, said, rewards, ended = found["last"], found["said"], found["rewards"], found["ended"]
    assert torch.equal(rewards[~last], said[~last])
    assert (said[~last] != 0).sum() > len(ended)  # of steps before the last
    assert not ended.all()
    whole = torch.where(ended, said.sum(1), -1.0)  # a cut one's last token pays for all of it
    torch.testing.assert_close(rewards.sum(1), whole, atol=1e-5, rtol=1e-5)


TRAINERS = {"ppo": ppo.TRAINER, "reinforce": reinforce.TRAINER}


def config_of(name: str, where: str, folder: str, judge: dict[str, Any], **changes: Any) -> Any:
    """Two iterations with the one judge."""
    brief: dict[str, Any] = {"iterations": 2, "save_every": 0, "gates": "off"}
    settings: dict[str, Any] = {**brief, "judges": {"taste": judge}, **changes}
    if name == "ppo":
        none: dict[str, Any] = {"reward": {"init": ""}, "value_warmup_iterations": 0}
        return ppo_settings(Path(where), ParallelLayout(), folder, **none, **settings)
    actor = {"init": f"{folder}/actor", "optim": {"lr": 1e-2}}
    own = {"baseline": "token", "run_dir": where, "actor": actor}
    return reinforce.ReinforceConfig.model_validate({**SMALL, **own, **settings})


def trained(name: str, where: str, folder: str, judge: dict[str, Any]) -> dict[str, Tensor]:
    """Of the whole run: the final weights."""
    mesh, trainer = start(ParallelLayout(), seed=1), TRAINERS[name]
    cfg = config_of(name, where, folder, judge)
    trainer.run(cfg, trainer.prepare(cfg), [], mesh)
    return whole_weights(frozen(f"{where}/model", LabelLogprobs(1.0), mesh))


@pytest.mark.parametrize(("name", "how"), [("ppo", "sum"), ("reinforce", "soft_min")])
def test_of_one_step_it_is_the_outcome_to_the_bit(name: str, how: str, folder: str, tmp_path: Path) -> None:
    """Invariant 13: whole iterations. And of more steps it is not."""
    judges = {
        "outcome": {"kind": "model", "init": f"{folder}/judge"},
        "one": judge_of(folder, value="logit", reward=how, separator="no such word"),
        "many": judge_of(folder, value="logit", reward=how, separator=" "),
    }
    weights, rows = {}, {}
    for kind, judge in judges.items():
        (weights[kind],) = run_ranks(trained, 1, name, str(tmp_path / kind), folder, judge)
        rows[kind] = [
            {key: value for key, value in row.items() if not key.startswith((*CLOCKED, "steps/"))}
            for row in read_metrics(tmp_path / kind).rows
        ]
    assert len(rows["one"]) == 2
    assert rows["one"] == rows["outcome"]
    assert all(torch.equal(weights["one"][key], weight) for key, weight in weights["outcome"].items())
    assert not all(torch.equal(weights["many"][key], weight) for key, weight in weights["outcome"].items())
    of_steps = [
        {key: row[key] for key in row if key.startswith("steps/")} for row in read_metrics(tmp_path / "one").rows
    ]
    lengths = [row["rollout/response_length_mean"] for row in rows["one"]]
    for row, length in zip(of_steps, lengths, strict=True):
        assert row.pop("steps/taste_tokens") == pytest.approx(length)
        assert row.pop("steps/taste_per_response") == row.pop("steps/taste_share_1") == 1.0
        assert set(row.values()) == {0.0}


def test_a_separator_comes_from_the_setting_or_the_model_and_must_come_from_one(folder: str, tmp_path: Path) -> None:
    model = Model("judges.steps.init", f"{folder}/judge", describe_model(f"{folder}/judge"))
    outcome = Model(model.setting, model.init, model.description.model_copy(update={"step_separator": None}))
    own, other = (ProcessJudgeConfig(kind="process", init="x", separator=said) for said in (None, "\n"))
    assert own.separator_of("judges.steps", model) == STEP_SEPARATOR
    assert other.separator_of("judges.steps", model) == other.separator_of("judges.steps", outcome) == "\n"
    with pytest.raises(ConfigError) as error:
        own.separator_of("judges.steps", outcome)
    with pytest.raises(ConfigError, match=r"judges.taste.separator is null, and judges.taste.init=tiny-xs says no"):
        ppo.TRAINER.prepare(config_of("ppo", str(tmp_path), folder, judge_of(folder, init="tiny-xs")))
    assert f"judges.steps.separator is null, and judges.steps.init={folder}/judge says no separator" in str(error.value)
    assert """on a command line judges.steps.separator='"\\n\\n"' for empty lines.""" in str(error.value)
