"""What README offers to install is what setup.py has, what constraints.txt pins, and what CI resolves from PyPI; and a
wheel, installed away from the checkout, has all that its commands need."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.helpers.setup_py import declared

ROOT = Path(__file__).resolve().parents[1]
PINS = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
REQUIRES, EXTRAS = declared(ROOT / "setup.py")


def offered() -> set[str]:
    """Every set that a page names."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    return set(re.findall(r"\.\[(\w+)\]", "\n".join(page.read_text(encoding="utf-8") for page in pages)))


def test_pages_offer_every_set_that_there_is() -> None:
    assert offered() == set(EXTRAS)


def test_ci_resolves_every_set() -> None:
    (sets,) = re.findall(r"^SETS := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(sets.split(",")) == set(EXTRAS)
    assert "make resolve" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("text", sorted({*REQUIRES, *(line for lines in EXTRAS.values() for line in lines)}))
def test_every_requirement_is_pinned_within_its_bounds(text: str) -> None:
    requirement = Requirement(text)
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of a fresh environment that has a wheel of this tree; its dependencies are those of this one."""
    folder: Path = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for part in ("megarlhf", "kernels", "examples"):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    alone = ["--no-deps", "--no-index"]
    subprocess.run([*pip, "wheel", *alone, "--no-build-isolation", "-w", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(source)
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv" / "lib").glob("*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([*pip, "--python", str(python), "install", *alone, str(wheel)], check=True)
    return python.with_name("megarlhf")


def below(folder: Path) -> set[str]:
    """Every file below it, save what Python leaves."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if "__pycache__" not in path.parts}


def test_a_wheel_has_the_run_files_and_runs_them(installed: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK")}

    def run(*words: str) -> str:
        command = [str(installed), *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    said = run("examples", "output=x").splitlines()
    assert below(tmp_path / "x") == below(ROOT / "examples")
    assert os.access(tmp_path / "x" / "launch" / "torchrun_hosts.sh", os.X_OK)
    assert "megarlhf sft --config x/sft_tiny.yaml layout.data=2" in said
    sizes = ("model=tiny-xs", "data.arithmetic.rows=128", "epochs=1", "optim.warmup_steps=0")
    run("sft", "--config", "x/sft_tiny.yaml", *sizes)
    assert (tmp_path / "runs/tiny/sft/report.html").is_file()
    assert (tmp_path / "runs/tiny/sft/model/model.json").is_file()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that sees a torch as NVIDIA's images name theirs, and this one's packages besides."""
    folder: Path = tmp_path_factory.mktemp("image")
    venv.create(folder, with_pip=False)
    (packages,) = (folder / "lib").glob("*/site-packages")
    (packages / "torch-2.10.0a0+b4e4ee81d3.nv25.12.dist-info").mkdir()
    said = "Metadata-Version: 2.1\nName: torch\nVersion: 2.10.0a0+b4e4ee81d3.nv25.12\n"
    (packages / "torch-2.10.0a0+b4e4ee81d3.nv25.12.dist-info" / "METADATA").write_text(said)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def test_pip_keeps_a_pre_release_of_torch_that_an_image_carries(image: Path, tmp_path: Path) -> None:
    """No index: whatever pip wanted instead, it would not find, and would end with an error."""
    only = tmp_path / "only" / "setup.py"
    only.parent.mkdir()
    only.write_text(f"from setuptools import setup\nsetup(name='wants', version='1', install_requires={REQUIRES!r})\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(image), "install"]
    done = subprocess.run(
        [*pip, "--dry-run", "--no-index", "--no-build-isolation", str(only.parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "Would install wants-1"


def test_the_dockerfile_copies_what_there_is() -> None:
    words = [line.split()[1:-1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY")]
    for name in (name for line in words for name in line):
        assert (ROOT / name).exists()
