"""What adapters take, from sizes alone: as the models that are built have it, and of Llama 3 70B by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarlhf.commands.plan import job_of, settings_of
from megarlhf.config import load_config
from megarlhf.errors import ConfigError
from megarlhf.models.activations import Arithmetic
from megarlhf.models.gpus import gpu_named
from megarlhf.models.lora import LoraConfig, sizes
from megarlhf.models.memory_plan import Held
from megarlhf.models.phases import elsewhere, phases_of, role_bytes
from megarlhf.models.spec import preset
from megarlhf.models.step_time import model_flops, seconds_of
from megarlhf.models.workload import Job, RoleWork, Split, Workload
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.parallel.micro_batches import InRows
from megarlhf.trainers import ppo
from megarlhf.trainers.grpo import GRPOConfig
from megarlhf.trainers.policy_work import policy_workload
from megarlhf.trainers.ppo import PPOConfig
from megarlhf.trainers.sft import workload
from tests.helpers.ranks import run_ranks
from tests.trainers.test_workload import POLICY

B70, LORA = preset("llama3-70b"), LoraConfig(rank=16)
LAYOUT = ParallelLayout(tensor=4, pipeline=4, data=2)
ACTOR = RoleWork("actor", "actor.init", "llama3-70b", "language", learns=True, scores=1, lora=LORA)
REFERENCE = RoleWork("reference", "reference.init", "llama3-70b", "language", scores=1, beside="actor")


def job(*roles: RoleWork, offload: bool = True) -> Job:
    work = Workload(roles, 256, 256, rows=64, step_rows=64, step_setting="global_batch")
    split = Split(LAYOUT, InRows(1), recompute="none", offload=offload)
    return Job(work, {role.name: B70 for role in roles}, split, Arithmetic(2, engine=True, recompute="none"))


def test_the_adapters_of_a_layer_by_hand() -> None:
    # Over 4 ranks: A whole and B cut of qkv and fc1, A cut and B whole of proj and fc2.
    assert sizes(LORA, B70, 4) == [
        *(16 * 8192, 16 * 80 * 128 // 4),
        *(16 * 8192 // 4, 16 * 8192),
        *(16 * 8192, 16 * 2 * 28_672 // 4),
        *(16 * 28_672 // 4, 16 * 8192),
    ]


def test_only_adapters_have_gradients_and_moments() -> None:
    learnt = 20 * sum(sizes(LORA, B70, 4))  # 20 of 80 layers
    plain = role_bytes(job(replace(ACTOR, lora=None)), replace(ACTOR, lora=None), 1)
    of = role_bytes(job(ACTOR), ACTOR, 1)
    assert of.weights == plain.weights + 2 * learnt
    assert (of.gradients, of.masters, of.moments) == (4 * learnt, 2 * learnt, 4 * learnt)
    assert of.all < 0.3 * plain.all


def test_a_critics_head_learns_beside_its_adapters() -> None:
    critic = replace(ACTOR, name="critic", head="scalar")
    first, last = (role_bytes(job(critic), critic, rank).gradients for rank in (0, 3))
    assert last - first == 4 * 8192


def test_the_reference_is_where_the_actor_is() -> None:
    own = replace(REFERENCE, beside="")
    assert role_bytes(job(ACTOR, REFERENCE), REFERENCE, 0).all == 0
    view, copy = (job(ACTOR, role) for role in (REFERENCE, own))
    assert elsewhere(view).away < 0.6 * elsewhere(copy).away
    phases = {phase.name: phase for phase in phases_of(view, 10**11)}
    assert phases["score reference"].weights == phases["score actor"].weights > 0
    stay = {phase.name: phase for phase in phases_of(job(ACTOR, REFERENCE, offload=False), 10**11)}
    assert stay["score reference"].weights == phases["score actor"].weights  # once, and not twice


def test_a_step_of_adapters_takes_two_thirds_of_the_products() -> None:
    whole, some = (job(replace(ACTOR, lora=lora, scores=0)) for lora in (None, LORA))
    assert 3 * model_flops(some) == 2 * model_flops(whole)
    gpu = gpu_named("h100-80gb")
    assert seconds_of(some, gpu, 10**11).learn < 0.9 * seconds_of(whole, gpu, 10**11).learn


@pytest.mark.parametrize("reference", ["", "llama3-8b", "llama3.1-8b"])
def test_settings_say_it(reference: str) -> None:
    settings = {
        "run_dir": "unused",
        "actor": {"init": "llama3-8b", "lora": {"rank": 8}},
        "critic": {"init": "llama3-8b", "lora": {"rank": 4}},
        "reference": {"init": reference},
    }
    cfg = PPOConfig.model_validate(settings)
    roles = {role.name: role for role in policy_workload(cfg, ("actor", "critic")).roles}
    assert roles["actor"].lora == LoraConfig(rank=8)
    assert roles["critic"].lora == LoraConfig(rank=4)
    assert roles["reference"].beside == ("" if reference == "llama3.1-8b" else "actor")
    del settings["critic"]
    whole = GRPOConfig.model_validate({**settings, "actor": {"init": "llama3-8b"}})
    assert all(not role.beside for role in policy_workload(whole, ("actor",)).roles)


def test_a_rank_that_no_model_has_is_not_planned() -> None:
    cfg: Any = settings_of("ppo").model_validate(
        {
            "actor": {"init": "tiny-s", "lora": {"rank": 128}},
            "critic": {"init": "tiny-xs", "lora": {"rank": 100}},
        }
    )
    with pytest.raises(ConfigError, match=r"critic\.lora\.rank=100 is more than 64"):
        job_of(policy_workload(cfg, ("actor", "critic")), cfg)
    sft: Any = settings_of("sft").model_validate({"model": "tiny-xs", "lora": {"rank": 65}})
    with pytest.raises(ConfigError, match=r"^lora\.rank=65 .* at most 64"):
        job_of(workload(sft), sft)


def built(folder: str) -> dict[str, tuple[Held, Held]]:
    """What each role of PPO by adapters keeps on this rank, and what the plan says of it."""
    more = ["actor.lora.rank=4", "critic.lora.rank=5", "critic.lora.targets=[qkv,fc2]", "layout.tensor=2"]
    cfg: Any = load_config(settings_of("ppo"), None, [f"run_dir={folder}", *POLICY, *more, "compute.dtype=float32"])
    models = ppo.TRAINER.models(cfg, ppo.TRAINER.prepare(cfg), start(cfg.layout, seed=1))
    work = ppo.TRAINER.workload(cfg)
    job, roles = job_of(work, cfg), {role.name: role for role in work.roles}
    return {role.name: (role.planned, role_bytes(job, roles[role.name], 0)) for role in models.every}


def test_the_plan_is_of_the_roles_that_are_built(tmp_path: Path) -> None:
    for rank in run_ranks(built, 2, str(tmp_path / "run")):
        assert set(rank) == {"actor", "reference", "critic", "reward"}
        assert rank["reference"][0].all == 0
        for name, (there, planned) in rank.items():
            assert there == planned, name
