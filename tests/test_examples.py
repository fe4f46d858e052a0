"""The example settings load, fit together, and pass the checks of their command as far as files allow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megarlhf import cli
from megarlhf.config import load_config
from megarlhf.models.spec import ModelSpec, preset
from megarlhf.runtime.checks import check_batch, check_room
from megarlhf.runtime.settings import RanksConfig
from megarlhf.trainers.policy_config import PolicyConfig
from megarlhf.trainers.ppo import PPOConfig

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
ON_H100 = sorted(EXAMPLES.glob("llama3_*.yaml"))
SIZES = {"8b": "llama3-8b", "70b": "llama3-70b", "405b": "llama3.1-405b"}
GPUS = {"llama3_8b": 8, "llama3_8b_16gpus": 16, "llama3_70b": 64, "llama3_405b": 512}
"""Of the run files of a size, by what is left of their names without the algorithm."""
GIB = 2**30


def settings(path: Path) -> tuple[str, RanksConfig]:
    """The command that the first line of an example names, and what its settings class makes of the file."""
    first = path.read_text(encoding="utf-8").splitlines()[0].split()
    command = first[first.index("megarlhf") + 1]
    assert f"examples/{path.name}" in first
    settings_class: Any = cli.program(cli.commands()[command])[0]
    return command, load_config(settings_class, path, [])


def test_there_are_examples() -> None:
    assert {path.name for path in FILES} >= {"sft_tiny.yaml", "reward_tiny.yaml", "ppo_tiny.yaml"}
    sizes = [name.replace("llama3_", "").split("_") for name in GPUS]
    both = {"_".join(["llama3", size, algorithm, *gpus]) for size, *gpus in sizes for algorithm in ("ppo", "grpo")}
    assert {path.stem for path in ON_H100} == both | {"llama3_8b_dapo"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_example_loads_and_its_numbers_fit(path: Path) -> None:
    command, cfg = settings(path)
    cfg.layout.check()
    values = dict(cfg)
    batches = {
        "sft": [values.get("global_batch")],
        "dpo": [values.get("global_batch")],
        "reward": [values.get("pairs_batch", 0) + values.get("labelled_batch", 0) // 2],
        "process_reward": [values.get("steps_batch", 0) // 2],
    }
    rolled_out = [values.get("global_batch"), values.get("rollout_batch")]
    for batch in batches.get(command, rolled_out):
        check_batch("batch", batch, cfg.layout, cfg.cut)
    if "tiny" in path.stem:
        preset("tiny-xs").check_layout(cfg.layout)


def policy_settings(path: Path) -> PolicyConfig:
    cfg = settings(path)[1]
    assert isinstance(cfg, PolicyConfig)
    return cfg


def specs(cfg: PolicyConfig) -> dict[str, ModelSpec]:
    """Of each role, by the size in the name of where its model starts."""
    return {role: preset(SIZES[re.findall(r"llama3-(\d+b)", init)[0]]) for role, init in cfg.inits.items()}


@pytest.mark.parametrize("path", ON_H100, ids=lambda path: path.stem)
def test_a_large_example_is_for_the_gpus_that_its_first_lines_name(path: Path) -> None:
    cfg = policy_settings(path)
    gpus = GPUS[re.sub("_(ppo|grpo|dapo)", "", path.stem)]
    assert cfg.layout.world_size == gpus
    counted = {8: "one node", 16: "two nodes of", 64: "eight nodes of", 512: "64 nodes of"}[gpus]
    assert f"({counted}" in path.read_text(encoding="utf-8").splitlines()[0]
    for role, spec in specs(cfg).items():
        spec.check_layout(cfg.layout, role)


@pytest.mark.parametrize("path", ON_H100, ids=lambda path: path.stem)
def test_a_large_example_says_what_its_models_take_of_a_host(path: Path) -> None:
    """bf16 weights on each data rank; fp32 weights and two moments of what learns once, which data ranks share.

    A mean over hosts; what is said is of the fullest.
    """
    cfg = policy_settings(path)
    models = specs(cfg)
    cfg.check_sizes()
    check_room(cfg.prompts.max_tokens, cfg.sampling.max_new_tokens, models["actor"], "actor")
    learners = ("actor", "critic") if isinstance(cfg, PPOConfig) else ("actor",)
    # What scores has one row where what speaks has a vocabulary.
    scalar = {
        role: (spec.vocab_size - 1) * spec.hidden_size * (role in ("reward", "critic")) for role, spec in models.items()
    }
    parameters = {role: spec.parameters - scalar[role] for role, spec in models.items()}
    weights = 2 * cfg.layout.data * sum(parameters.values())
    states = 12 * sum(parameters[role] for role in learners)
    comment = " ".join(line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
    (said,) = re.findall(r"host (?:holds )?(\d+) GiB", comment)
    assert int(said) == pytest.approx((weights + states) / GIB / (cfg.layout.world_size / 8), rel=0.01)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_an_example_of_one_node_takes_no_more_of_a_gpu_than_ppo_s(name: str) -> None:
    """Of weights, gradients and states it has as much, on the same layout; the rest is of a micro-batch's tokens."""
    cfg, ppo = (policy_settings(EXAMPLES / f"llama3_8b_{each}.yaml") for each in (name, "ppo"))
    assert (cfg.layout, cfg.compute, cfg.offload) == (ppo.layout, ppo.compute, ppo.offload)
    tokens = [each.micro_batch_tokens for each in (cfg, ppo)]
    assert tokens[0] is not None
    assert tokens[1] is not None
    assert tokens[0] <= tokens[1]


def test_the_tiny_examples_hand_models_to_each_other() -> None:
    runs = {
        command: dict(cfg)
        for command, cfg in (settings(EXAMPLES / f"{c}_tiny.yaml") for c in ("sft", "reward", "dpo", "ppo"))
    }
    sft, reward = f"{runs['sft']['run_dir']}/model", f"{runs['reward']['run_dir']}/model"
    assert runs["reward"]["model"] == runs["dpo"]["model"] == sft
    assert runs["ppo"]["actor"].init == sft
    assert runs["ppo"]["reward"].init == reward
    code_sft, code = (dict(settings(EXAMPLES / f"{name}_tiny.yaml")[1]) for name in ("code_sft", "code"))
    assert code["actor"].init == f"{code_sft['run_dir']}/model"
