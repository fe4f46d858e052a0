"""The example settings load, fit together, and pass the checks of their command as far as files allow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megarlhf import cli
from megarlhf.config import load_config
from megarlhf.models.spec import preset
from megarlhf.runtime.checks import check_batch, check_room
from megarlhf.runtime.settings import RanksConfig
from megarlhf.trainers.policy_config import PolicyConfig
from megarlhf.trainers.ppo import PPOConfig

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
ON_H100 = sorted(EXAMPLES.glob("llama3_8b_*.yaml"))
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
    assert {path.stem for path in ON_H100} == {f"llama3_8b_{name}" for name in ("ppo", "grpo", "dapo")}


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
        check_batch("batch", batch, cfg.layout, cfg.micro_batch)
    for name in ("llama3-8b", "tiny-xs"):
        if name.replace("-", "_") in path.stem or (name == "tiny-xs" and "tiny" in path.stem):
            preset(name).check_layout(cfg.layout)


def policy_settings(path: Path) -> PolicyConfig:
    cfg = settings(path)[1]
    assert isinstance(cfg, PolicyConfig)
    return cfg


@pytest.mark.parametrize("path", ON_H100, ids=lambda path: path.stem)
def test_a_large_example_says_what_its_models_take_of_the_host(path: Path) -> None:
    """bf16 weights on each data rank; fp32 weights and two moments of what learns once, which data ranks share."""
    cfg, spec = policy_settings(path), preset("llama3-8b")
    cfg.check_sizes()
    check_room(cfg.prompts.max_tokens, cfg.sampling.max_new_tokens, spec, "actor")
    learners = 2 if isinstance(cfg, PPOConfig) else 1
    models = len(cfg.inits)
    weights, states = 2 * spec.parameters * cfg.layout.data, 12 * spec.parameters
    comment = " ".join(line.lstrip("# ") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#")
    (said,) = re.findall(r"host (?:holds )?(\d+) GiB", comment)
    assert int(said) == pytest.approx((models * weights + learners * states) / GIB, rel=0.005)


@pytest.mark.parametrize("path", ON_H100, ids=lambda path: path.stem)
def test_a_large_example_takes_no_more_of_a_gpu_than_ppo_s(path: Path) -> None:
    """Of weights, gradients and states it has as much, on the same layout; the rest is of a micro-batch's tokens."""
    cfg, ppo = policy_settings(path), policy_settings(EXAMPLES / "llama3_8b_ppo.yaml")
    assert (cfg.layout, cfg.compute, cfg.offload) == (ppo.layout, ppo.compute, ppo.offload)
    tokens = [each.micro_batch * (each.prompts.max_tokens + each.sampling.max_new_tokens) for each in (cfg, ppo)]
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
