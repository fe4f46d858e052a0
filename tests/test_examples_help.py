"""README's own chain, word for word: it must help on held-out problems; and the one that must not is found out."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megarlhf.eval.intervals import Interval, paired_difference
from megarlhf.observe.report import write_page

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 1500
PROBLEMS = 768
OVER_OPTIMISED = ROOT / "examples" / "over_optimised_tiny.yaml"

pytestmark = pytest.mark.slow


def commands(text: str) -> list[list[str]]:
    """The lines of `text` that train from an example, as a shell would split them; comments left out."""
    lines = re.findall(r"^(?:# +)?megarlhf ((?:sft|reward|ppo|grpo|dpo) --config examples/.*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def megarlhf(arguments: list[str], directory: Path) -> str:
    """Run the command line in `directory`; what it said on both streams."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-m", "megarlhf.cli", *arguments],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}:\n{done.stdout}"
    return done.stdout


def verdicts(model: str, directory: Path) -> dict[str, torch.Tensor]:
    """Which held-out problems the model gets right, sampled and greedy."""
    output = f"{model}.jsonl"
    data = ("prompts.source=arithmetic", "prompts.template=plain", "prompts.arithmetic.level=1")
    size = (f"prompts.arithmetic.rows={PROBLEMS}", "sampling.max_new_tokens=32", "micro_batch=64")
    megarlhf(
        ["eval", f"model=runs/tiny/{model}/model", *data, *size, "verifier=arithmetic", f"output={output}"], directory
    )
    rows = [json.loads(line) for line in (directory / output).read_text().splitlines()]
    kinds = {kind: [row["correct"] for row in rows if row["decoding"] == kind] for kind in ("sampled", "greedy")}
    assert {len(correct) for correct in kinds.values()} == {PROBLEMS}
    return {kind: torch.tensor(correct) for kind, correct in kinds.items()}


@pytest.fixture(scope="module", params=[1, 2, 3], ids="seed {}".format)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Where README's chain has run with a seed, and what its commands said, by name."""
    directory = tmp_path_factory.mktemp("chain")
    (directory / "examples").symlink_to(ROOT / "examples")
    lines = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [line[0] for line in lines] == ["sft", "reward", "ppo", "grpo", "dpo"]
    return directory, {line[0]: megarlhf([*line, f"seed={request.param}"], directory) for line in lines}


def test_the_chain_raises_sampled_and_greedy_accuracy(chain: tuple[Path, dict[str, str]]) -> None:
    directory, said = chain
    verdict = {model: verdicts(model, directory) for model in ("sft", "ppo", "grpo", "dpo")}
    gains: dict[str, dict[str, Interval]] = {
        model: {kind: paired_difference(verdict["sft"][kind], verdict[model][kind]) for kind in ("sampled", "greedy")}
        for model in ("ppo", "grpo", "dpo")
    }
    # Measured for seeds 1 to 3, in README: at least 20 points sampled and 10 greedy.
    assert all(gain["sampled"].low > 0.1 and gain["greedy"].low > 0.03 for gain in gains.values()), gains
    # A rule without a critic does what a reward model and a critic do, with as many rollouts.
    assert gains["grpo"]["sampled"].mean > gains["ppo"]["sampled"].mean - 0.05, gains
    assert "warning, iteration" not in said["ppo"] + said["grpo"]
    assert re.search(r"^PPO: \d+/\d+ in .*score_mean -?\d.*accuracy 0\.", said["ppo"], re.MULTILINE), said["ppo"]
    rows = [json.loads(line) for line in (directory / "runs/tiny/ppo/metrics.jsonl").read_text().splitlines()]
    assert not any(row["warning/over_optimised"] or row["warning/kl_over_bound"] for row in rows)


def test_the_over_optimised_example_is_found_out_by_iteration_6(chain: tuple[Path, dict[str, str]]) -> None:
    directory, _ = chain
    (ppo,) = commands(OVER_OPTIMISED.read_text(encoding="utf-8"))
    said = megarlhf(ppo, directory)
    found = re.findall(r"warning, iteration (\d+): the score rose from \S+ to \S+ while accuracy fell", said)
    assert len(found) == 1, said
    assert int(found[0]) <= 6
    run_dir = directory / "runs/tiny/over_optimised"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert next(row["step"] for row in rows if row["warning/over_optimised"]) == int(found[0])
    main = write_page(run_dir).read_text(encoding="utf-8").split("<main>")[1]
    assert main.strip().startswith("<p class=warning><b>The score rises while accuracy falls")
