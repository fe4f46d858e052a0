"""Whether installed packages are known not to work with each other, which pip --no-deps does not look at."""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megarlhf.gates.gate import Gate

DRIVER = Path("/proc/driver/nvidia/version")
"""There where a machine has a GPU of NVIDIA, whatever Python's packages make of it."""
DECLARE = ("megarlhf", "torch")
"""Whose requirements are looked at: ours, and those of torch, which wants one Triton and one of each CUDA library."""
THEIR_APEX = Version("0.9")
"""NVIDIA's Apex has older versions than PyPI's package of that name, which is another project."""


def packages_gate() -> Gate:
    """Holds where no mismatch is known."""
    found = mismatches(installed(), torch.version.cuda, gpu=torch.cuda.is_available(), driver=DRIVER.exists())
    measure = "packages that are missing, or known not to work with another one"
    return Gate("packages", len(found), 0, measure, " And: ".join(found))


def installed() -> dict[str, str]:
    """The version of every package that Python finds here, by its canonical name; the first where there are several."""
    found: dict[str, str] = {}
    for each in metadata.distributions():
        found.setdefault(canonicalize_name(each.metadata["Name"]), each.version)
    return found


def mismatches(versions: Mapping[str, str], cuda: str | None, *, gpu: bool, driver: bool) -> list[str]:
    """What does not go together, each with its remedy.

    cuda: that torch was built for. gpu: whether torch sees one. driver: whether the machine has NVIDIA's.
    """
    return [
        *(wrong for name in DECLARE for wrong in _unmet(name, versions)),
        *_device(cuda, gpu=gpu, driver=driver, torch=versions.get("torch", "")),
        *_transformer_engine(versions, cuda, gpu=gpu),
        *_apex(versions),
    ]


def _unmet(name: str, versions: Mapping[str, str]) -> Iterator[str]:
    """Requirements of an installed package that are not met; pre-releases count, for images carry them."""
    if name not in versions:  # a checkout that was not installed
        return
    for text in metadata.requires(name) or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = versions.get(canonicalize_name(requirement.name))
        if version is None:
            yield f"{name} needs {requirement.name}, which is not installed; pip install '{text}'."
        elif not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            yield f"{name} needs {wanted} and {version} is installed; pip install '{wanted}', or another {name}."


def _device(cuda: str | None, *, gpu: bool, driver: bool, torch: str) -> Iterator[str]:
    """A machine whose GPU torch does not see would quietly run on its CPU."""
    if driver and cuda is None:
        yield f"torch {torch} is built without CUDA and this machine has a GPU; install the build with CUDA."
    elif driver and not gpu:
        yield (
            f"torch {torch} for CUDA {cuda} sees no GPU of this machine: its driver may be older than CUDA {cuda}, or "
            "CUDA_VISIBLE_DEVICES hides them; compare with nvidia-smi."
        )


def _transformer_engine(versions: Mapping[str, str], cuda: str | None, *, gpu: bool) -> Iterator[str]:
    """Three packages that must be of one version, for torch's CUDA, and compiled for this torch."""
    if "transformer-engine" not in versions:
        return
    version = versions["transformer-engine"]
    parts = [name for name in versions if name.startswith("transformer-engine-")]
    for name in parts:
        if Version(versions[name]).base_version != Version(version).base_version:
            yield f"{name} {versions[name]} beside transformer-engine {version}; install both of one version."
    cores = [name.rpartition("-cu")[2] for name in parts if "-cu" in name]
    major = (cuda or "").partition(".")[0]
    if major and cores and major not in cores:
        wanted = f"transformer-engine[core-cu{major}]"
        yield f"transformer-engine-cu{cores[0]} beside torch for CUDA {cuda}; install {wanted}."
    if gpu:
        try:
            importlib.import_module("transformer_engine.pytorch")
        except (ImportError, OSError) as error:
            yield (
                f"transformer-engine {version} cannot be imported ({error}); it is compiled for one torch: build it "
                "again as docs/install.md says, or remove it, and Megatron-Core's own layers are used."
            )


def _apex(versions: Mapping[str, str]) -> Iterator[str]:
    if "apex" in versions and Version(versions["apex"]) >= THEIR_APEX:
        yield f"apex {versions['apex']} is PyPI's, which is not NVIDIA's Apex; pip uninstall apex."
