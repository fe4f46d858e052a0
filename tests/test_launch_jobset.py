"""examples/launch/jobset.yaml: what JobSet knows by its own types, and two pods' commands run as they stand there."""

from __future__ import annotations

import copy
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from megarlhf import cli
from megarlhf.config import load_config
from tests.helpers.slurm import wait_for

ROOT = Path(__file__).resolve().parents[1]
MANIFEST: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "launch" / "jobset.yaml").read_text(encoding="utf-8"))
JOB: dict[str, Any] = MANIFEST["spec"]["replicatedJobs"][0]["template"]["spec"]
POD: dict[str, Any] = JOB["template"]["spec"]
RANKS: dict[str, Any] = POD["containers"][0]
SFT = (
    *("sft", "run_dir=run", "model=tiny-xs", "tokenizer=arithmetic", "data.source=arithmetic", "data.template=plain"),
    *("data.arithmetic.rows=256", "global_batch=8", "micro_batch=4", "epochs=2", "save_every=10", "layout.data=2"),
)


def known(manifest: dict[str, Any]) -> dict[str, Any]:
    """What JobSet's types keep of a manifest: a field that they do not know is dropped."""
    read = JobsetV1alpha2JobSet.from_dict(manifest)
    assert read is not None
    return read.to_dict()


def test_every_field_is_one_of_jobset_s() -> None:
    assert known(MANIFEST) == MANIFEST
    misspelt = copy.deepcopy(MANIFEST)
    misspelt["spec"]["replicatedJobs"][0]["template"]["spec"]["completion_mode"] = "Indexed"
    assert known(misspelt) != misspelt
    wrong = copy.deepcopy(MANIFEST)
    wrong["spec"]["failurePolicy"]["maxRestarts"] = "often"
    with pytest.raises(ValueError, match="maxRestarts"):
        known(wrong)


def option(name: str) -> str:
    (value,) = [word.partition("=")[2] for word in RANKS["args"] if word.startswith(f"--{name}=")]
    return value


def test_its_numbers_are_those_of_the_run() -> None:
    nodes, gpus = int(option("nnodes")), int(option("nproc-per-node"))
    assert nodes == JOB["parallelism"] == JOB["completions"]
    assert gpus == RANKS["resources"]["limits"]["nvidia.com/gpu"]
    command, config = RANKS["args"][-2], option("config")
    cfg: Any = load_config(cli.program(cli.commands()[command])[0], ROOT / config, [])
    assert cfg.layout.world_size == nodes * gpus
    for toleration in POD["tolerations"][:2]:
        assert toleration["tolerationSeconds"] < cfg.timeout_s
    name, group = MANIFEST["metadata"]["name"], MANIFEST["spec"]["replicatedJobs"][0]["name"]
    assert option("master-addr") == f"{name}-{group}-0-0.{name}"
    assert option("master-port") == str(RANKS["ports"][0]["containerPort"])


def test_only_a_run_that_is_to_go_on_is_started_again() -> None:
    """A job whose pod policy matched ends with the reason PodFailurePolicy, another with BackoffLimitExceeded."""
    matched = [rule for rule in JOB["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    (codes,) = [rule["onExitCodes"] for rule in matched]
    assert (codes["containerName"], codes["values"]) == (RANKS["name"], [75])
    assert JOB["backoffLimit"] == 0
    rules = {rule["onJobFailureReasons"][0]: rule["action"] for rule in MANIFEST["spec"]["failurePolicy"]["rules"]}
    assert rules == {"PodFailurePolicy": "RestartJobSet", "BackoffLimitExceeded": "FailJobSet"}


def pods(folder: Path, port: int) -> list[subprocess.Popen[bytes]]:
    """The containers' own words on this machine: another host and port, a rank a pod, and a run that is small."""
    words: list[str] = [*RANKS["command"], *RANKS["args"][: RANKS["args"].index("megarlhf.cli") + 1], *SFT]
    here = {
        "python": sys.executable,
        f"--master-addr={option('master-addr')}": "--master-addr=127.0.0.1",
        f"--master-port={option('master-port')}": f"--master-port={port}",
        f"--nproc-per-node={option('nproc-per-node')}": "--nproc-per-node=1",
    }
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "SLURM_"))}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    started = []
    for index in range(JOB["parallelism"]):
        told = [here.get(word, word).replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in words]
        with (folder / f"pod_{index}.log").open("ab") as log:
            started.append(subprocess.Popen(told, cwd=folder, env={**own, "PYTHONPATH": paths}, stdout=log, stderr=log))
    return started


def test_two_pods_are_one_run_which_a_lost_node_s_notice_stops_and_the_next_start_ends(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    metrics = tmp_path / "run" / "metrics.jsonl"
    first = pods(tmp_path, port)
    said = "the first steps"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, said, 180)
    for pod in first:
        pod.send_signal(signal.SIGTERM)  # as where a pod is taken away, with its grace period
    assert [pod.wait(120) for pod in first] == [75, 75], (tmp_path / "pod_0.log").read_text()
    assert [pod.wait(240) for pod in pods(tmp_path, port)] == [0, 0], (tmp_path / "pod_0.log").read_text()
    assert (tmp_path / "run" / "model" / "model.json").is_file()
    assert len(metrics.read_text().splitlines()) == 64
    logs = [path.read_text() for path in sorted((tmp_path / "logs").rglob("std*.log"))]
    assert any("stopped by SIGTERM after step" in log for log in logs)
    assert "stopped by SIGTERM after step" in (tmp_path / "pod_0.log").read_text()
