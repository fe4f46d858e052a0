"""Every command of README and of docs/ runs, in the order in which a reader meets it, on inputs that are small.

Those of docs/data.md are read row by row in tests/data/test_shapes.py, those of docs/python.md in test_python_page.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.bytes_tokenizer import of_bytes
from tests.helpers.documents import blocks
from tests.helpers.models import language_model
from tests.helpers.peft_directory import adapters
from tests.test_cli_runs import PPO, RANKED, REWARD, ROOT, SFT

DOCUMENTS = ("README.md", "docs/algorithms.md", "docs/judges.md", "docs/install.md", "docs/lora.md")
FILE = re.compile(r"`(\w+\.(?:jsonl|py))`[^`]*(?:`[^`]+`[^`]*)*?\n\n```(?:json|python)\n(.*?)\n```", re.DOTALL)
TIMEOUT_S = 250

LITTLE = ("rollout_batch=8", "group_size=4", "global_batch=8", "micro_batch=4", "iterations=1")
SHORT = (*LITTLE, "sampling.max_new_tokens=6", "tensorboard=false", "gates=off")
TINY_TASK = ("prompts.arithmetic.rows=64", "heldout.arithmetic.rows=16", "sampling.max_new_tokens=12", "iterations=2")
FEW = (*TINY_TASK, "rollout_batch=16", "group_size=4", "global_batch=16", "micro_batch=8")
OWN_SFT = ("global_batch=4", "micro_batch=2", "tensorboard=false", "max_skipped_steps=0")
SMALLER: dict[str, tuple[str, ...]] = {
    "sft --config": SFT,
    "reward --config": REWARD,
    "ppo --config examples": PPO[1:],
    "ppo --config run.yaml": (*PPO[1:], "layout.data=2", "iterations=3"),
    "grpo --config": FEW,
    "dpo --config": ("pairs.arithmetic.rows=96", "heldout.arithmetic.rows=32", "optim.warmup_steps=0"),
    "doctor --config": ("layout.data=1",),
    "sft model": OWN_SFT,
    "grpo actor": SHORT,
    "reward model": ("pairs_batch=4", "micro_batch=2", "tensorboard=false"),
    "ppo actor": tuple(each for each in SHORT if "group" not in each),
    "sft ... data": (*OWN_SFT, "model=DIR", "run_dir=runs/judges/sft"),
    "grpo ... prompts": (*SHORT, "actor.init=DIR", "run_dir=runs/judges/grpo"),
    "ppo ... prompts": (*SHORT[:1], *SHORT[2:], "actor.init=DIR", "critic.init=DIR", "run_dir=runs/judges/ppo"),
    "grpo ... actor": (
        *(*SHORT, "prompts.source=train.jsonl", "judges.a.kind=rule", "judges.a.rule=gsm8k"),
        "run_dir=runs/lora/grpo",
    ),
    "eval ... prompts": ("model=DIR", "sampling.max_new_tokens=6"),
}
"""What is added to a command that begins so, for it to take seconds; no setting that the reader was told is changed."""


class Shown(NamedTuple):
    """A command of a document."""

    document: str
    line: str

    @property
    def words(self) -> list[str]:
        """Without comments, what a shell does with it, and dots that stand for more."""
        return shlex.split(self.line, comments=True)


def shown() -> list[Shown]:
    found = []
    for document in DOCUMENTS:
        typed = blocks((ROOT / document).read_text(encoding="utf-8"))
        lines = [line for block in typed for line in block.replace("\\\n", " ").splitlines()]
        found += [Shown(document, line) for line in lines if re.match(r"megarlhf \w|python tools/", line)]
    return found


LINES = shown()
NOT_HERE = {
    "demo seed=S": "takes minutes: tests/commands/test_demo.py",
    "llama3_8b": "eight billion weights",
    "runs/demo/grpo": "what a demo left: its settings are those of grpo_tiny.yaml",
}
NEEDS_TASKS = "reasoning_gym:"


def tiny(words: list[str]) -> list[str]:
    """The command, made small."""
    kept = [word for word in words if word != "..."]
    said = " ".join(words)
    more = next((extra for begins, extra in SMALLER.items() if said.startswith(f"megarlhf {begins}")), ())
    return [*kept, *more]


def place(directory: Path) -> None:
    """What the documents take as there: models, data, the reader's own files, a run that failed."""
    (directory / "examples").symlink_to(ROOT / "examples")
    (directory / "tools").symlink_to(ROOT / "tools")
    tokenizer = of_bytes()
    for name in ("Llama-3.2-1B-Instruct", "Llama-3.1-8B", "DIR"):
        language_model(directory / name, seed=4, vocab_size=tokenizer.vocab_size, max_position_embeddings=1024)
        tokenizer.save(directory / name)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, text in FILE.findall(readme):
        (directory / name).write_text(f"{text}\n" * (1 if name.endswith(".py") else 8))
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(directory / "gsm8k.jsonl", directory / name)
    adapters(directory / "ADAPTERS", directory / "DIR")
    row = {"prompt": "What is 2 + 2?", "response": "4"}
    (directory / "X.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    settings = (ROOT / "examples" / "ppo_tiny.yaml").read_text().replace("runs/tiny/ppo", "runs/ppo")
    (directory / "run.yaml").write_text(settings)


def before(words: list[str], directory: Path) -> None:
    """What a reader would have by then, where no command shown before has made it."""
    runs = directory / "runs"
    if words[1:] == ["report", "run_dir=runs/demo"]:
        shutil.copytree(runs / "tiny" / "ppo", runs / "demo")
    if "RUN_A" in words:
        for name in ("RUN_A", "RUN_B"):
            shutil.copytree(runs / "tiny" / "grpo", directory / name)
    if words[1] == "replay":
        burnt = ["sft", "--config", "examples/sft_tiny.yaml", *SFT, "run_dir=burnt", "optim.lr=1e12", "optim.min_lr=0"]
        done = command(["megarlhf", *burnt, "max_skipped_steps=0", "eval_every=0"], directory)
        assert done.returncode == 1, done.stderr
        (capsule,) = (directory / "burnt" / "capsules").iterdir()
        shutil.copytree(capsule, directory / "RUN" / "capsules" / "step_00000012")


def command(words: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "megarlhf.cli"]
    environment = {name: value for name, value in os.environ.items() if name not in RANKED}
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [*program, *words[1:]],
        cwd=directory,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def skipped(line: str) -> str:
    """Why a command is not run here; "" where it is."""
    if NEEDS_TASKS in line and importlib.util.find_spec("reasoning_gym") is None:
        return "needs the set tasks"
    return next((why for part, why in NOT_HERE.items() if part in line), "")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("reader")
    place(found)
    return found


def test_there_is_something_to_run() -> None:
    names = [line.words[1] for line in LINES if line.words[0] == "megarlhf"]
    assert len(LINES) >= 25
    assert set(names) >= {"sft", "reward", "ppo", "grpo", "dpo", "eval", "score", "convert", "report", "replay"}
    assert sum(bool(skipped(line.line)) for line in LINES) <= 6


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line.document}: {' '.join(line.words)[:70]}")
def test_it_runs(line: Shown, directory: Path) -> None:
    if why := skipped(line.line):
        pytest.skip(why)
    before(line.words, directory)
    done = command(tiny(line.words), directory)
    # A step that failed fails again.
    assert done.returncode == int(line.words[1] == "replay"), done.stderr[-3000:] + done.stdout[-1000:]
    assert "Traceback" not in done.stderr
