"""`megarlhf examples` lists the run files and copies them, and never overwrites one that differs."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from megarlhf import cli
from megarlhf.commands.examples import directory
from megarlhf.commands.table import commands, program
from megarlhf.config import load_config

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAUNCH = [str(path.relative_to(EXAMPLES)) for path in sorted((EXAMPLES / "launch").iterdir())]
THERE = [*sorted(path.name for path in EXAMPLES.glob("*.[yp]*")), *LAUNCH]


def out(capfd: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(["examples", *words]) == 0
    return capfd.readouterr().out.splitlines()


def test_they_are_listed_each_with_what_it_says_of_itself(capfd: pytest.CaptureFixture[str]) -> None:
    lines = out(capfd)
    assert [line.split()[0] for line in lines if line.startswith(tuple(THERE))] == THERE
    said = " ".join(" ".join(lines).split())
    assert "rloo_tiny.yaml Each answer against the three others to its prompt. sft_tiny.yaml A tiny Llama 3" in said
    assert "launch/slurm_srun.sh One task a GPU, which srun starts: a task is a rank." in said
    assert "launch/jobset.yaml A run on several nodes of Kubernetes" in said
    assert "launch/README.md From a fresh account on a Slurm cluster" in said
    assert out(capfd, "name=ppo_tiny")[0].startswith("ppo_tiny.yaml   Four colocated models")


def test_copies_are_the_same_and_the_commands_that_are_said_take_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = out(capfd, "output=mine/first")
    copied = [path for path in Path("mine/first").rglob("*") if path.is_file()]
    assert {str(path.relative_to("mine/first")) for path in copied} == set(THERE)
    assert all(os.access(path, os.X_OK) for path in copied if path.suffix == ".sh")
    for name in THERE:
        assert (Path("mine/first") / name).read_bytes() == (directory() / name).read_bytes()
    assert sum(line.startswith("python mine/first/0") for line in said) == 2
    runs = [line.partition("   ")[0] for line in said if line.startswith("megarlhf ")]
    assert len(runs) == sum(name.endswith(".yaml") and "/" not in name for name in THERE)
    assert "sbatch --nodes=2 mine/first/launch/slurm_srun.sh ppo --config run.yaml [name=value ...]" in said
    assert any(line.startswith("kubectl apply -f mine/first/launch/jobset.yaml") for line in said)
    assert any(line.startswith('HOSTS="node1 node2" mine/first/launch/torchrun_hosts.sh ppo') for line in said)
    for line in runs:
        _, command, _, file, *overrides = shlex.split(line)
        load_config(program(commands()[command])[0], Path(file), overrides)


def test_a_file_that_is_there_and_differs_is_left_and_nothing_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x").mkdir()
    Path("x/sft_tiny.yaml").write_text("mine: true\n")
    assert cli.main(["examples", "output=x"]) == 2
    assert capfd.readouterr().err == "output=x: x/sft_tiny.yaml exists and differs; choose another, or remove it.\n"
    assert [path.name for path in Path("x").iterdir()] == ["sft_tiny.yaml"]
    assert Path("x/sft_tiny.yaml").read_text() == "mine: true\n"
    # Another one goes beside it, twice.
    for _ in range(2):
        assert out(capfd, "output=x", "name=ppo_tiny.yaml") == ["megarlhf ppo --config x/ppo_tiny.yaml layout.data=2"]


def test_a_name_that_is_none_is_answered_by_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["examples", "name=ppo_tny"]) == 2
    assert capfd.readouterr().err == "name=ppo_tny: there is no such example; did you mean ppo_tiny?\n"
