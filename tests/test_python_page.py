"""docs/python.md: every block runs as it stands, and what it imports keeps its name, its fields and its signature."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megarlhf import api
from megarlhf.config import Config, load_config
from megarlhf.runtime.models_named import with_models

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
TIMEOUT_S = 550
pytestmark = pytest.mark.timeout(600)


def python(*words: str, directory: Path, said: str = "") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words],
        cwd=directory,
        env=environment,
        input=said,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the whole page was run as one program, in one process but for its last block; and what it printed."""
    folder: Path = tmp_path_factory.mktemp("page")
    (folder / "page.py").write_text("\n".join(BLOCKS))
    done = python("page.py", directory=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout


def test_every_stage_leaves_what_the_page_says(ran: tuple[Path, str]) -> None:
    folder, said = ran
    for run in ("sft", "reward", "ppo", "grpo", "dpo", "process", "again", "two"):
        assert (folder / "runs" / run / "model" / "model.json").is_file(), run
    assert said.splitlines()[0] == "runs/sft/model"
    for file, rows in (("judged.jsonl", 32), ("said.jsonl", 16), ("scored.jsonl", 16)):
        assert len((folder / file).read_text().splitlines()) == rows
    assert (folder / "ppo-hf" / "model.safetensors").is_file()
    assert "verify: largest gap" in said
    assert json.loads((folder / "worth.json").read_text())["steps"]["f1"].keys() >= {"mean", "low", "high"}
    assert {point["way"] for point in json.loads((folder / "best.json").read_text())["points"]} >= {"steps (min)"}


def test_the_command_line_that_is_kept_makes_the_same_settings(
    ran: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run from Python says how the command line would have made it."""
    monkeypatch.chdir(ran[0])
    for run, settings in (("ppo", api.PPOConfig), ("grpo", api.GRPOConfig), ("two", api.SftConfig)):
        program, command, *words = shlex.split(Path("runs", run, "command.txt").read_text())
        assert (program, command) == ("megarlhf", {"two": "sft"}.get(run, run))
        asked = with_models(load_config(settings, None, words))
        assert asked == load_config(settings, Path("runs", run, "config.yaml"), [])


def test_a_stage_takes_about_ten_lines() -> None:
    assert len(BLOCKS) == 12
    lines = [sum(bool(line) for line in block.splitlines()) for block in BLOCKS]
    assert max(lines) <= 14  # with a function of one's own
    assert sum(lines) / len(lines) <= 10


def test_two_ranks_start_from_a_prompt_too(tmp_path: Path) -> None:
    """As in a notebook there is no program to start again: Python reads this from its standard input."""
    done = python(directory=tmp_path, said=BLOCKS[-1] + 'print("went on")\n')
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "went on"
    assert (tmp_path / "runs/two/model/model.json").is_file()


AFTER = """
from megarlhf.api import *
data = SftData(source="arithmetic", template="plain", arithmetic={"rows": 32})
cfg = {"run_dir": "run", "model": "tiny-xs", "tokenizer": "arithmetic", "data": data, "global_batch": 16}
for changes in CHANGES:
    try:
        run(SftConfig(**{**cfg, **changes}))
        print("done")
    except MegarlhfError as error:
        print(type(error).__name__, error)
"""


DIVERGING = '"optim": OptimConfig(lr=1e12, max_grad_norm=1e12), "epochs": 20, "max_skipped_steps": 0'


def test_an_error_is_raised_and_what_comes_after_it_works(tmp_path: Path) -> None:
    """One before anything is built, one in the middle of a run, a run, and the same again."""
    changes = ('{"model": "nowhere"}', f"{{{DIVERGING}}}", '{"run_dir": "done"}', '{"run_dir": "done"}')
    done = python("-c", AFTER.replace("CHANGES", f"[{', '.join(changes)}]"), directory=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    model, diverged, *rest = done.stdout.splitlines()
    assert model.startswith("CheckpointError model 'nowhere' is neither a directory nor a preset")
    assert diverged.startswith("TrainingError "), diverged
    assert rest == ["done", "done"]
    assert "run_dir=done: this run is done; its model is in done/model." in done.stderr


def test_ranks_that_fail_raise(tmp_path: Path) -> None:
    changes = f'{{"layout": ParallelLayout(data=2), {DIVERGING}}}'
    done = python("-c", AFTER.replace("CHANGES", f"[{changes}]"), directory=tmp_path)
    assert done.stdout.startswith("TrainingError megarlhf sft ended with exit code 1;"), done.stderr[-4000:]
    assert "optimiser steps in a row were skipped" in done.stderr


def imported() -> list[str]:
    """What the page imports of this package."""
    found: set[str] = set()
    for block in BLOCKS:
        for node in ast.parse(block).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megarlhf"):
                assert node.module == "megarlhf.api"
                found |= {alias.name for alias in node.names}
    return sorted(found)


SIGNATURES = {
    "ConvertConfig": "*model *output *to base dtype verify max_shard_size",
    "DPOConfig": (
        "seed layout compute micro_batch offload date timeout_s *run_dir resume save_every keep_last keep_every "
        "keep_best save_before max_skipped_steps tensorboard wandb model reference tokenizer pairs heldout beta "
        "label_smoothing optim epochs global_batch"
    ),
    "DataConfig": (
        "source subset split columns template max_tokens control_tokens overlong bad_rows arithmetic programs "
        "reasoning_gym"
    ),
    "EvalConfig": (
        "seed layout compute micro_batch offload date timeout_s model reward tokenizer prompts sampling rollout "
        "verifier code_tests output"
    ),
    "EvalPoolConfig": "*pool *gold proxy output seed",
    "EvalRewardConfig": (
        "seed layout compute micro_batch offload date timeout_s *model tokenizer pairs labelled steps separator output"
    ),
    "FrozenConfig": "init",
    "FunctionConfig": "weight *kind *function",
    "GRPOConfig": (
        "seed layout compute micro_batch offload date timeout_s *run_dir resume save_every keep_last keep_every "
        "keep_best save_before max_skipped_steps tensorboard wandb actor reference reward judges tokenizer prompts "
        "sampling rollout iterations rollout_batch group_size global_batch batch_unit clip_range clip_range_high "
        "dual_clip loss_mean old_logprobs sampler_correction entropy_coef policy_loss shaping verifier kl_bound "
        "stop_when_over_optimised samples_every samples gates kl_coef kl_target_per_response kl_horizon "
        "exact_kl_every epochs kl_in kl_estimator surrogate ratio group_std"
    ),
    "GenerateConfig": (
        "seed layout compute micro_batch offload date timeout_s *model tokenizer prompt prompts sampling rollout "
        "n output pool"
    ),
    "LabelStepsConfig": (
        "seed layout compute micro_batch offload date timeout_s *model tokenizer solutions separator completions "
        "sampling rollout verifier *output"
    ),
    "LabelledData": (
        "source subset split columns template max_tokens control_tokens overlong bad_rows arithmetic programs "
        "reasoning_gym scale"
    ),
    "LearnerConfig": "init optim",
    "LoraConfig": "rank alpha targets",
    "OptimConfig": "lr min_lr schedule warmup_steps weight_decay beta1 beta2 eps max_grad_norm distributed",
    "PPOConfig": (
        "seed layout compute micro_batch offload date timeout_s *run_dir resume save_every keep_last keep_every "
        "keep_best save_before max_skipped_steps tensorboard wandb actor reference reward judges tokenizer prompts "
        "sampling rollout iterations rollout_batch group_size global_batch batch_unit clip_range clip_range_high "
        "dual_clip loss_mean old_logprobs sampler_correction entropy_coef policy_loss shaping verifier kl_bound "
        "stop_when_over_optimised samples_every samples gates kl_coef kl_target_per_response kl_horizon "
        "exact_kl_every critic ppo_epochs value_warmup_iterations gamma gae_lambda value_clip_range"
    ),
    "ParallelLayout": "tensor pipeline data sequence_parallel virtual_pipeline",
    "PoolJudgesConfig": "seed layout compute micro_batch offload date timeout_s *pool judges",
    "ProcessJudgeConfig": "weight *init *kind separator value reward",
    "ProcessRewardConfig": (
        "seed layout compute micro_batch offload date timeout_s *run_dir resume save_every keep_last keep_every "
        "keep_best save_before max_skipped_steps tensorboard wandb model tokenizer pairs labelled heldout "
        "pointwise_weight pairs_batch labelled_batch normalise optim epochs steps heldout_steps steps_batch step_weight"
    ),
    "RewardConfig": (
        "seed layout compute micro_batch offload date timeout_s *run_dir resume save_every keep_last keep_every "
        "keep_best save_before max_skipped_steps tensorboard wandb model tokenizer pairs labelled heldout "
        "pointwise_weight pairs_batch labelled_batch normalise optim epochs"
    ),
    "RowsConfig": "*pool *kind *by steps *output prompts responses most margin seed",
    "RuleConfig": "weight right wrong *kind *rule ignore_case pattern least most unit",
    "SamplingConfig": "temperature top_k top_p max_new_tokens",
    "ScoreConfig": (
        "seed layout compute micro_batch offload date timeout_s *model tokenizer *input *output prompts sampling"
    ),
    "SftConfig": (
        "seed layout compute micro_batch offload date timeout_s *run_dir resume save_every keep_last keep_every "
        "keep_best save_before max_skipped_steps tensorboard wandb model tokenizer data optim epochs global_batch"
    ),
    "SftData": (
        "source subset split columns template max_tokens control_tokens overlong bad_rows arithmetic programs "
        "reasoning_gym supervise"
    ),
    "StepData": (
        "source subset split columns template max_tokens control_tokens overlong bad_rows arithmetic programs "
        "reasoning_gym separator labels threshold until neutral"
    ),
    "load_config": "(cls: 'type[C]', path: 'Path | None', overrides: 'Sequence[str]') -> 'C'",
    "run": "(cfg: 'Config') -> 'None'",
}
"""Of a function its signature; of settings their names, a star before those that must be given."""


@pytest.mark.parametrize("name", SIGNATURES)
def test_what_users_import_keeps_its_names(name: str) -> None:
    """A setting may be added; one that is renamed, removed or newly required breaks programs."""
    imported: Any = vars(api)[name]
    parameters = inspect.signature(imported).parameters
    if not inspect.isclass(imported):
        assert str(inspect.signature(imported)) == SIGNATURES[name]
        return
    pinned = SIGNATURES[name].split()
    assert issubclass(imported, Config)
    assert {word.lstrip("*") for word in pinned} <= parameters.keys()
    required = {name for name, each in parameters.items() if each.default is inspect.Parameter.empty}
    assert required == {word[1:] for word in pinned if word.startswith("*")}


def test_all_that_the_page_imports_is_pinned() -> None:
    assert set(imported()) <= set(api.__all__)
    assert {*SIGNATURES, "MegarlhfError"} == set(api.__all__)
