"""examples/launch on a real Slurm: a controller and two nodes on this machine, the scripts as they are shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.helpers.slurm import NODES, Cluster, cluster, missing, wait_for
from tests.test_cli_runs import ROOT, megarlhf

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(missing()), reason=missing() or "there"),
]
SCRIPTS = {"srun": ("--ntasks-per-node=1",), "torchrun": ()}
"""Of each, what starts one rank a node."""
SFT = (
    *("sft", "model=tiny-xs", "tokenizer=arithmetic", "data.source=arithmetic", "data.template=plain", "layout.data=2"),
    *("data.arithmetic.rows=512", "global_batch=8", "micro_batch=4", "epochs=2", "optim.lr=1e-3", "save_every=10"),
)
STEPS = 128


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """The same run on ranks that the command starts itself."""
    folder: Path = tmp_path_factory.mktemp("whole")
    done = megarlhf(*SFT, "run_dir=run", directory=folder)
    assert done.returncode == 0, done.stderr
    return course(folder)


def course(folder: Path) -> list[dict[str, float]]:
    """Every loss, gradient norm and rate of every step: those of a step are of all that was learnt before it."""
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name.startswith(("step", "sft/"))} for row in rows]


def submit(slurm: Cluster, kind: str, folder: Path, *changes: str, options: Sequence[str] = ()) -> str:
    """As it is shipped, on two nodes of one GPU each."""
    script = str(ROOT / "examples" / "launch" / f"slurm_{kind}.sh")
    asked = ("--nodes=2", "--gpus-per-node=1", *SCRIPTS[kind], *options)
    return slurm.submit(*asked, script, *SFT, "run_dir=run", *changes, cwd=folder)


def running(slurm: Cluster, kind: str, folder: Path, done: int) -> str:
    """A job that has done so many steps."""
    job = submit(slurm, kind, folder)
    wait_for(lambda: steps(folder) > done, lambda: f"the first steps:\n{said(folder)}", 120)
    return job


def steps(folder: Path) -> int:
    file = folder / "run" / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def said(folder: Path) -> str:
    """What the job's and the ranks' logs have."""
    logs = sorted([*folder.glob("megarlhf_*.log"), *folder.glob("logs/*/*.log")])
    return "\n".join(f"== {log}\n{log.read_text()}" for log in logs)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_that_is_stopped_and_queued_again_ends_as_one_that_never_was(
    kind: str, slurm: Cluster, tmp_path: Path, never_stopped: list[dict[str, float]]
) -> None:
    job = running(slurm, kind, tmp_path, 5)
    slurm.run("scancel", "--signal=USR1", job)
    wait_for(
        lambda: slurm.job(job).get("Restarts") == "1", lambda: f"the job to be queued again:\n{said(tmp_path)}", 120
    )
    assert slurm.ended(job, 300)["JobState"] == "COMPLETED", said(tmp_path)
    assert steps(tmp_path) == STEPS
    assert course(tmp_path) == never_stopped
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    log = (tmp_path / f"megarlhf_{job}.log").read_text()
    assert f"rank 0 on {NODES[0]}:{20000 + int(job) % 10000}" in log
    assert ", start 1: " in log
    assert ", start 2: " in log
    assert {path.name for path in (tmp_path / "logs" / job).glob("rank_*")} == {"rank_0.log", "rank_1.log"}


@pytest.mark.parametrize(("kind", "options"), [("srun", ("--ntasks-per-node=2",)), ("torchrun", ())])
def test_two_ranks_on_each_of_two_nodes_split_matrices_and_rollouts(
    kind: str, options: tuple[str, ...], slurm: Cluster, tmp_path: Path, never_stopped: list[dict[str, float]]
) -> None:
    """Ranks that share matrices are on one node; the numbers are those of two ranks, up to rounding."""
    job = submit(slurm, kind, tmp_path, "layout.tensor=2", options=("--gpus-per-node=2", *options))
    assert slurm.ended(job, 400)["JobState"] == "COMPLETED", said(tmp_path)
    logs = {path.name for path in (tmp_path / "logs" / job).glob("rank_*")}
    assert logs == {f"rank_{rank}.log" for rank in range(4)}
    for row, whole in zip(course(tmp_path), never_stopped, strict=True):
        assert row == pytest.approx(whole, rel=1e-3)


def test_before_the_limit_a_run_saves_and_is_queued_again(slurm: Cluster, tmp_path: Path) -> None:
    """Slurm counts limits in minutes, and sends the signal a minute before this one."""
    job = submit(slurm, "srun", tmp_path, "epochs=500", options=("--time=2", "--signal=USR1@60"))
    wait_for(lambda: slurm.job(job).get("Restarts") == "1", lambda: f"the limit:\n{said(tmp_path)}", 240)
    slurm.run("scancel", job)
    assert "stopped by SIGUSR1 after step" in said(tmp_path)
    assert "stopped after a saved step; queued again" in said(tmp_path)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_job_that_is_cancelled_saves_and_is_not_queued_again(kind: str, slurm: Cluster, tmp_path: Path) -> None:
    job = running(slurm, kind, tmp_path, 12)
    slurm.run("scancel", job)
    assert slurm.ended(job, 120)["JobState"] == "CANCELLED"
    wait_for(lambda: "stopped by SIGTERM after step" in said(tmp_path), lambda: f"the ranks to save:\n{said(tmp_path)}")
    assert slurm.job(job)["Restarts"] == "0"


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_job_whose_node_dies_goes_on_when_there_is_one(
    kind: str, slurm: Cluster, tmp_path: Path, never_stopped: list[dict[str, float]]
) -> None:
    job = running(slurm, kind, tmp_path, 12)
    slurm.kill_node(NODES[1])
    wait_for(lambda: slurm.job(job).get("JobState") == "PENDING", lambda: f"the job to wait:\n{said(tmp_path)}", 240)
    slurm.start_node(NODES[1])
    assert slurm.ended(job, 400)["JobState"] == "COMPLETED", said(tmp_path)
    assert course(tmp_path) == never_stopped


def test_a_script_without_a_command_says_how_it_is_used(slurm: Cluster, tmp_path: Path) -> None:
    for kind in SCRIPTS:
        job = slurm.submit("--gpus-per-node=1", str(ROOT / "examples" / "launch" / f"slurm_{kind}.sh"), cwd=tmp_path)
        assert slurm.ended(job, 60)["ExitCode"] == "2:0"
        log = (tmp_path / f"megarlhf_{job}.log").read_text()
        assert log.strip() == f"usage: sbatch [--nodes=N] slurm_{kind}.sh COMMAND --config FILE [name=value ...]"
