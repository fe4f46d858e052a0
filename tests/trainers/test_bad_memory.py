"""Settings of memory and overlap that cannot work together stop a run before a model is built, and say what would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megarlhf.errors import ConfigError
from megarlhf.models import compute as compute_module
from megarlhf.models import optim as optim_module
from megarlhf.models.compute import ATTENTION_VARIABLES, ComputeConfig, resolve
from megarlhf.models.optim import FORMATS, OptimConfig
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.runtime import learning
from megarlhf.runtime.learning import check_overlap, check_state
from megarlhf.runtime.settings import RanksConfig
from tests.helpers.refusal import DPO, PPO, REWARD, SFT, assert_matches


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        (
            SFT,
            ["compute.recompute=5"],
            "compute.recompute=5 layers, but a stage of model has 4 of its 4 .*; set compute.recompute to at most",
        ),
        (
            REWARD,
            ["compute.recompute=3", "layout.pipeline=2", "layout.data=1"],
            "compute.recompute=3 layers, but a stage of model has 2 of its 4",
        ),
        (
            DPO,
            ["compute.overlap_grad_reduce=true"],
            "compute.overlap_grad_reduce=true overlaps what travels between data ranks, but layout.data=1; set",
        ),
        (
            PPO,
            ["compute.overlap_param_gather=true", "layout.data=2"],
            "compute.overlap_param_gather=true gathers by the buckets of compute.overlap_grad_reduce, which is false",
        ),
        (
            PPO,
            [
                "compute.overlap_grad_reduce=true",
                "compute.overlap_param_gather=true",
                "layout.data=2",
                "critic.optim.distributed=false",
            ],
            "compute.overlap_param_gather=true, but critic.optim.distributed=false leaves .* set critic.optim.distr",
        ),
        (PPO, ["actor.optim.offload_fraction=0.5"], "actor.optim.offload_fraction=0.5 with offload=host, which takes"),
        (
            SFT,
            ["optim.offload_fraction=0.5", "offload=none"],
            "optim.offload_fraction=0.5 needs a GPU and Transformer Engine, .*; set optim.offload_fraction=0.",
        ),
        (SFT, ["optim.precision_aware=true"], "optim.precision_aware=true needs a GPU and Transformer Engine, .*; set"),
        (
            REWARD,
            ["optim.exp_avg_dtype=bfloat16"],
            "optim.exp_avg_dtype=bfloat16 needs the precision-aware optimiser; set optim.precision_aware=true or",
        ),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="what is refused where there is no GPU")
def test_runs(command: tuple[str, ...], overrides: list[str], message: str, refused: Callable[..., str]) -> None:
    assert_matches(refused(command, *overrides), message)


def test_overlap_that_works_is_not_refused() -> None:
    for gather in (False, True):
        cfg = ComputeConfig(overlap_grad_reduce=True, overlap_param_gather=gather)
        check_overlap(cfg, ParallelLayout(data=2), OptimConfig(), "optim")
    check_overlap(ComputeConfig(overlap_grad_reduce=True), ParallelLayout(data=2), OptimConfig(distributed=False), "")
    check_overlap(ComputeConfig(), ParallelLayout(), OptimConfig(distributed=False), "optim")
    both = ComputeConfig(overlap_grad_reduce=True, overlap_param_gather=True)
    with pytest.raises(ConfigError, match=r"or compute\.overlap_grad_reduce=false and compute\.overlap_param_gather=f"):
        check_overlap(both, ParallelLayout(), OptimConfig(), "optim")


@pytest.mark.parametrize("recompute", ["some", 0, True, 1.5])
def test_recompute_is_a_word_or_a_number_of_layers(recompute: Any) -> None:
    with pytest.raises(ValidationError, match="recompute"):
        ComputeConfig(recompute=recompute)


@pytest.mark.parametrize(
    ("optim", "run", "message"),
    [
        (
            {"offload_fraction": 0.5, "precision_aware": True},
            {"offload": "none"},
            "with optim.precision_aware=true: on the host",
        ),
        (
            {"offload_fraction": 0.5, "distributed": False},
            {"offload": "none"},
            "but optim.distributed=false; set optim.distributed",
        ),
        ({"precision_aware": True, "distributed": False}, {}, "but optim.distributed=false; set optim.distributed"),
        (
            {"precision_aware": True},
            {"compute": {"dtype": "float32"}},
            "weights are their own masters; set compute",
        ),
        ({"offload_fraction": 1.0}, {}, "offload=none or optim.offload_fraction=0."),
    ],
)
def test_state_on_a_gpu(optim: Any, run: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, stays = RanksConfig.model_validate(run), RanksConfig(offload="none")
    monkeypatch.setattr(learning.importlib.util, "find_spec", lambda _: object())
    with pytest.raises(ConfigError) as caught:
        check_state(OptimConfig(**optim), "optim", cfg, on_gpu=True)
    assert message in str(caught.value)
    check_state(OptimConfig(offload_fraction=0.5), "optim", stays, on_gpu=True)
    check_state(OptimConfig(precision_aware=True, exp_avg_dtype="bfloat16"), "optim", RanksConfig(), on_gpu=True)
    check_state(OptimConfig(), "optim", RanksConfig(), on_gpu=False)


def test_what_is_done_in_one_kernel_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = ComputeConfig(gradient_accumulation_fusion=True)
    with pytest.raises(ConfigError, match=r"needs a GPU, and Transformer Engine layers or .*_fusion=false"):
        resolve(fused, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"tp_comm_overlap=true .* one size, .* set compute.tp_comm_overlap=false"):
        resolve(ComputeConfig(tp_comm_overlap=True), torch.device("cpu"))
    installed = {"fused_weight_gradient_mlp_cuda": object()}
    monkeypatch.setattr(compute_module.importlib.util, "find_spec", installed.get)
    monkeypatch.setattr(compute_module, "_choices", lambda *_: ())
    for name in ATTENTION_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert resolve(fused, torch.device("cuda", 0)).gradient_accumulation_fusion  # Apex, with local layers
    installed.clear()
    with pytest.raises(ConfigError, match="but there are neither"):
        resolve(fused, torch.device("cuda", 0))
    installed["transformer_engine"] = object()
    assert resolve(fused, torch.device("cuda", 0)).gradient_accumulation_fusion


@pytest.mark.parametrize(
    ("optim", "fp8_recipe", "built"),
    [
        (
            {"offload_fraction": 0.25},
            None,
            {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.25},
        ),
        (
            {"precision_aware": True, "exp_avg_dtype": "bfloat16"},
            "tensorwise",
            {
                "use_precision_aware_optimizer": True,
                "optimizer_cpu_offload": False,
                "exp_avg_dtype": torch.bfloat16,
                "exp_avg_sq_dtype": torch.float32,
                "fp8_recipe": "tensorwise",
            },
        ),
        ({}, None, {"use_precision_aware_optimizer": False, "optimizer_cpu_offload": False, "fp8_recipe": None}),
    ],
)
def test_megatron_s_optimiser_is_told(
    optim: Any, fp8_recipe: str | None, built: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(optim_module, "OptimizerConfig", lambda **settings: told.update(settings))
    optim_module.megatron_optimizer(OptimConfig(**optim), torch.bfloat16, fp8_recipe)
    assert {name: told[name] for name in built} == built
    assert set(FORMATS) == {"float32", "bfloat16"}
