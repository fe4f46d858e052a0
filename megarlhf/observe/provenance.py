"""How a run was made: its settings, its command line, the versions of what decides its numbers, and the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from megarlhf.observe.files import write_whole, writing
from megarlhf.observe.run_files import COMMAND, CONFIG, TRAINER, VERSIONS

_PACKAGES = (
    *("torch", "megatron-core", "transformers", "tokenizers", "datasets", "pydantic", "numpy", "safetensors"),
    *("triton", "transformer-engine", "flash-attn"),
)


class Settings(Protocol):
    """What a Config is from here: this package and `config` are siblings and do not import each other."""

    def to_yaml(self) -> str:
        """Return every setting as YAML."""
        ...


def write_provenance(run_dir: Path, config: Settings, argv: Sequence[str]) -> None:
    """Write what is needed to run this again: resolved config, command line, package versions, commit.

    Ranks:    rank 0 only. `argv` is the command line without the program's name.
    """
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / CONFIG, config.to_yaml())
    write_whole(run_dir / TRAINER, type(config).__module__ + "\n")
    write_whole(run_dir / COMMAND, shlex.join(["megarlhf", *argv]) + "\n")
    write_whole(run_dir / VERSIONS, json.dumps(versions(), indent=2) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """What a measurement was taken on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
    }


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers, and the git commit (with + when changed)."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "commit": _commit()}
    for package in ("megarlhf", *_PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "not a git checkout"
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
