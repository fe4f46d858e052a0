"""The example settings load, fit together, and pass the checks of their command as far as files allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megarlhf import cli
from megarlhf.config import load_config
from megarlhf.models.spec import preset
from megarlhf.runtime.checks import check_batch
from megarlhf.runtime.settings import RanksConfig

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))


def settings(path: Path) -> tuple[str, RanksConfig]:
    """The command that the first line of an example names, and what its settings class makes of the file."""
    first = path.read_text(encoding="utf-8").splitlines()[0].split()
    command = first[first.index("megarlhf") + 1]
    assert f"examples/{path.name}" in first
    settings_class: Any = cli.program(cli.commands()[command])[0]
    return command, load_config(settings_class, path, [])


def test_there_are_examples() -> None:
    assert {path.name for path in FILES} >= {"sft_tiny.yaml", "reward_tiny.yaml", "ppo_tiny.yaml", "llama3_8b_ppo.yaml"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_example_loads_and_its_numbers_fit(path: Path) -> None:
    command, cfg = settings(path)
    cfg.layout.check()
    values = dict(cfg)
    batches = {
        "sft": [values.get("global_batch")],
        "reward": [values.get("pairs_batch", 0) + values.get("labelled_batch", 0) // 2],
    }
    rolled_out = [values.get("global_batch"), values.get("rollout_batch")]
    for batch in batches.get(command, rolled_out):
        check_batch("batch", batch, cfg.layout, cfg.micro_batch)
    for name in ("llama3-8b", "tiny-xs"):
        if name.replace("-", "_") in path.stem or (name == "tiny-xs" and "tiny" in path.stem):
            preset(name).check_layout(cfg.layout)


def test_the_tiny_examples_hand_models_to_each_other() -> None:
    runs = {
        command: dict(cfg) for command, cfg in (settings(EXAMPLES / f"{c}_tiny.yaml") for c in ("sft", "reward", "ppo"))
    }
    sft, reward = f"{runs['sft']['run_dir']}/model", f"{runs['reward']['run_dir']}/model"
    assert runs["reward"]["model"] == sft
    assert runs["ppo"]["actor"].init == sft
    assert runs["ppo"]["reward"].init == reward
