"""What README offers to install is what setup.py has, what constraints.txt pins, and what CI resolves from PyPI."""

from __future__ import annotations

import re
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
