"""Variables for GPUs: what a layout wants is set, what the user set stays, and `doctor` says which it is."""

from __future__ import annotations

import os
import subprocess
import sys

from megarlhf.parallel.environment import Variable, in_force, settle, wanted
from megarlhf.parallel.layout import ParallelLayout

ALWAYS = {
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "NCCL_GRAPH_REGISTER": "0",
    "NCCL_NVLS_ENABLE": "0",
}


MARGINS = {"NVTE_FWD_LAYERNORM_SM_MARGIN": "20", "NVTE_BWD_LAYERNORM_SM_MARGIN": "20"}


def settled(layout: ParallelLayout, *, overlaps: bool = False, **user: str) -> dict[str, str]:
    environment = dict(user)
    settle(layout, environment, overlaps=overlaps)
    return environment


def test_a_layout_gets_what_its_axes_want() -> None:
    assert settled(ParallelLayout(data=8)) == ALWAYS
    assert settled(ParallelLayout(tensor=2)) == ALWAYS | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert settled(ParallelLayout(context=2)) == ALWAYS | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert settled(ParallelLayout(pipeline=2)) == ALWAYS | {"NCCL_P2P_NET_CHUNKSIZE": "2097152"}


def test_norms_leave_room_for_collectives_that_run_beside_them() -> None:
    layout = ParallelLayout(data=2)
    assert settled(layout, overlaps=True) == ALWAYS | MARGINS
    theirs = settled(layout, overlaps=True, NVTE_BWD_LAYERNORM_SM_MARGIN="8")
    said = {variable.name: variable for variable in in_force(layout, theirs, overlaps=True)}
    assert said["NVTE_FWD_LAYERNORM_SM_MARGIN"].reason.startswith("norms leave 20 multiprocessors")
    assert said["NVTE_BWD_LAYERNORM_SM_MARGIN"].reason.startswith("yours; 20 otherwise")


def test_what_the_user_set_stays_and_is_said_to_be_theirs() -> None:
    layout, user = ParallelLayout(tensor=2), {"NCCL_NVLS_ENABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    environment = settled(layout, overlaps=False, **user)
    assert environment == ALWAYS | user
    said = {variable.name: variable for variable in in_force(layout, environment)}
    assert said["NCCL_GRAPH_REGISTER"] in wanted(layout)
    assert said["NCCL_NVLS_ENABLE"].value == "1"
    assert said["NCCL_NVLS_ENABLE"].reason.startswith("yours; 0 otherwise: NVLink SHARP")


def test_the_allocator_s_older_name_is_the_user_s_word_too() -> None:
    """torch takes PYTORCH_CUDA_ALLOC_CONF first, and says where it is set that it is deprecated."""
    environment = settled(ParallelLayout(), PYTORCH_CUDA_ALLOC_CONF="max_split_size_mb:512")
    assert "PYTORCH_ALLOC_CONF" not in environment
    (said, *_) = in_force(ParallelLayout(), environment)
    assert (said.name, said.value) == ("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    assert said.reason.startswith("yours; expandable_segments:True otherwise")


def test_each_has_a_reason_and_none_of_them_is_said_to_be_the_user_s() -> None:
    layout = ParallelLayout(tensor=2, pipeline=2)
    variables = in_force(layout, settled(layout))
    assert variables == wanted(layout)
    assert all(isinstance(variable, Variable) and variable.reason for variable in variables)


def test_ranks_that_are_started_have_them_before_torch_reads_them() -> None:
    """Of a run in a process of its own: the first line of the table comes from the rank, the user's value stays."""
    done = subprocess.run(
        [sys.executable, "-m", "megarlhf.cli", "doctor", "layout.tensor=2"],
        env={**os.environ, "NCCL_NVLS_ENABLE": "1", "COLUMNS": "140"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[1]: " ".join(line.split()[3:]) for line in done.stdout.splitlines() if line.startswith("│ ")}
    assert rows["CUDA_DEVICE_MAX_CONNECTIONS"].startswith("1 (kernels start as launched")
    assert rows["NCCL_NVLS_ENABLE"].startswith("1 (yours; 0 otherwise")
