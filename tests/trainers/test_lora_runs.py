"""Runs whose learners are adapters: PPO and GRPO end to end, stopped and gone on with, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megarlhf.checkpoint.model_directory import describe_model
from megarlhf.errors import ConfigError
from megarlhf.models.readings import LabelLogprobs
from megarlhf.models.role import FrozenRole
from megarlhf.models.unadapted import UnadaptedRole
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.trainers import dpo, grpo, ppo, reward, sft
from tests.helpers.models import frozen, policy_and_judge, ragged_rollout, whole_weights
from tests.helpers.ranks import run_ranks
from tests.runs.test_resume import CLOCKED, ITERATIONS, final_weights, ppo_settings
from tests.trainers.worlds import ppo_cast

TENSOR = ParallelLayout(tensor=2, sequence_parallel=True)
LORA = {"rank": 4, "alpha": 8, "targets": ["qkv", "proj", "fc1", "fc2"]}
OPTIM = {"lr": 1e-2, "schedule": "constant"}
ROWS = ragged_rollout(8, vocab=160)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    found: Path = tmp_path_factory.mktemp("lora")
    policy_and_judge(found)
    return str(found)


def settings_of(where: str, layout: ParallelLayout, folder: str, **changes: Any) -> ppo.PPOConfig:
    learners = {
        "actor": {"init": f"{folder}/actor", "optim": OPTIM, "lora": LORA},
        "critic": {"optim": OPTIM, "lora": LORA},
    }
    return ppo_settings(Path(where), layout, folder, **learners, value_warmup_iterations=1, **changes)


def run_ppo(layout: ParallelLayout, stop: int | None, where: str, folder: str) -> dict[str, Tensor]:
    """Start the run, or go on with it: the final model, as who knows nothing of adapters reads it."""
    mesh = start(layout, seed=1)
    return final_weights(settings_of(where, layout, folder), stop, mesh)


def logged(where: str) -> list[dict[str, float]]:
    """What depends on the run alone."""
    rows = [json.loads(line) for line in (Path(where) / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(CLOCKED)} for row in rows]


def test_a_stopped_ppo_run_goes_on_to_the_bit_and_learns(folder: str, tmp_path: Path) -> None:
    straight, stopped = str(tmp_path / "straight"), str(tmp_path / "stopped")
    whole = run_ranks(run_ppo, 2, TENSOR, None, straight, folder)[0]
    run_ranks(run_ppo, 2, TENSOR, 2, stopped, folder)
    again = run_ranks(run_ppo, 2, TENSOR, None, stopped, folder)[0]
    assert all(torch.equal(again[name], weight) for name, weight in whole.items())
    first, second = (load_file(f"{where}/model/adapter/adapter_model.safetensors") for where in (straight, stopped))
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    rows = logged(straight)
    assert rows == logged(stopped)
    assert len(rows) == ITERATIONS
    assert rows[0]["kl/reference_mean"] == rows[1]["kl/reference_mean"] == 0.0  # nothing has learnt before the third
    assert rows[3]["kl/reference_mean"] != 0.0
    assert describe_model(f"{straight}/model").lora is not None
    # The last state is a model too, the same one.
    state = run_ranks(weights_of, 1, f"{straight}/checkpoints/step_{ITERATIONS:08d}/actor")[0]
    assert all(torch.equal(state[name], weight) for name, weight in whole.items())


def weights_of(directory: str) -> dict[str, Tensor]:
    return whole_weights(frozen(directory, LabelLogprobs(1.0), start(ParallelLayout(), seed=1)))


def cast_of(folder: str, where: str, reference: str) -> tuple[bool, int, int, float]:
    """Whether the reference is a view, bytes of actor and reference, and how far the reference is from the start."""
    mesh = start(ParallelLayout(), seed=1)
    cfg = settings_of(where, ParallelLayout(), folder, reference={"init": reference})
    cast = ppo_cast(cfg, mesh)
    at_start = frozen(f"{folder}/actor", LabelLogprobs(1.0), mesh).score(ROWS)
    gap = float((cast.reference.score(ROWS) - at_start).abs().max())
    assert isinstance(cast.reference, FrozenRole)
    return isinstance(cast.reference, UnadaptedRole), cast.actor.planned.weights, cast.reference.planned.weights, gap


def test_the_reference_is_the_actor_without_its_adapters(folder: str, tmp_path: Path) -> None:
    view, actor, reference, gap = run_ranks(cast_of, 1, folder, str(tmp_path), "")[0]
    assert (view, reference) == (True, 0)
    assert gap < 1e-5  # sums in another order: weights that were away lie elsewhere in memory
    assert actor > 0
    view, _, _, gap = run_ranks(cast_of, 1, folder, str(tmp_path), f"{folder}/actor")[0]
    assert view
    assert gap < 1e-5


def test_another_reference_is_a_model_of_its_own(folder: str, tmp_path: Path) -> None:
    view, _, reference, _ = run_ranks(cast_of, 1, folder, str(tmp_path), "tiny-xs")[0]
    assert not view
    assert reference > 0


def run_grpo(where: str, folder: str) -> None:
    cfg = grpo.GRPOConfig.model_validate(
        {
            "run_dir": where,
            "actor": {"init": f"{folder}/actor", "optim": OPTIM, "lora": {"rank": 4, "targets": ["qkv", "fc2"]}},
            "reward": {"init": f"{folder}/judge"},
            "tokenizer": "arithmetic",
            "prompts": {
                "source": "arithmetic",
                "template": "plain",
                "max_tokens": 64,
                "arithmetic": {"level": 1, "rows": 20, "seed": 4},
            },
            "sampling": {"max_new_tokens": 8},
            "iterations": 2,
            "rollout_batch": 16,
            "group_size": 4,
            "global_batch": 8,
            "micro_batch_tokens": 128,
            "kl_coef": 0.1,
            "exact_kl_every": 1,
            "tensorboard": False,
        }
    )
    grpo.TRAINER.run(cfg, grpo.TRAINER.prepare(cfg), [], start(cfg.layout, seed=1))


def test_grpo_learns_adapters_of_some_matrices(folder: str, tmp_path: Path) -> None:
    where = str(tmp_path / "grpo")
    run_ranks(run_grpo, 1, where, folder)
    first, second = logged(where)
    assert first["kl/reference_mean"] == 0.0
    assert first["kl/reference_exact"] == pytest.approx(0.0, abs=1e-6)
    assert second["kl/reference_exact"] > 1e-4  # of the adapters: never negative, and 0 if the view read them too
    names = load_file(f"{where}/model/adapter/adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "k_proj", "v_proj", "down_proj"}


def test_a_rank_that_the_model_does_not_have_is_refused_before_it_is_built(folder: str, tmp_path: Path) -> None:
    cfg = settings_of(str(tmp_path / "no"), ParallelLayout(), folder)
    wide = cfg.critic.model_copy(update={"lora": cfg.critic.lora.model_copy(update={"rank": 40})})  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"critic\.lora\.rank=40 .* at most 32"):
        ppo.TRAINER.prepare(cfg.model_copy(update={"critic": wide}))


def supervised(folder: str, where: str) -> dict[str, Any]:
    """DPO, SFT and a reward model by adapters: the first loss of DPO, and the tensors of each that PEFT would load."""
    data = {"source": "arithmetic", "template": "plain", "arithmetic": {"rows": 16, "seed": 4}}
    shared = {"tokenizer": "arithmetic", "micro_batch": 2, "tensorboard": False, "lora": LORA, "optim": OPTIM}
    start_at = {**shared, "model": f"{folder}/actor"}
    runs = {
        "dpo": (dpo, dpo.DPOConfig, {"pairs": data, "global_batch": 8}),
        "sft": (sft, sft.SftConfig, {"data": data, "global_batch": 8}),
        "reward": (reward, reward.RewardConfig, {"pairs": data, "pairs_batch": 8}),
    }
    found, mesh = {}, start(ParallelLayout(), seed=1)
    for name, (module, config, rest) in runs.items():
        cfg = config.model_validate({**start_at, **rest, "run_dir": f"{where}/{name}"})
        module.TRAINER.run(cfg, module.TRAINER.prepare(cfg), [], mesh)
        found[name] = load_file(f"{where}/{name}/model/adapter/adapter_model.safetensors")
    return found


def test_supervised_trainers_learn_adapters_too(folder: str, tmp_path: Path) -> None:
    found = run_ranks(supervised, 1, folder, str(tmp_path))[0]
    for name, tensors in found.items():
        heads = {"base_model.model.score.weight"} if name == "reward" else set()
        assert len(tensors) == 4 * 7 * 2 + len(heads), name
        assert all(bool(t.abs().max() > 0) for key, t in tensors.items() if ".lora_B." in key or key in heads), name
    assert logged(str(tmp_path / "dpo"))[0]["dpo/loss"] == pytest.approx(math.log(2), abs=1e-7)
