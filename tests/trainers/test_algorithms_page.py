"""What docs/algorithms.md says of commands, defaults, settings and metrics is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megarlhf.config import describe
from megarlhf.observe.metrics import GLOSSARY
from megarlhf.trainers.find import trainer_named, trainers
from megarlhf.trainers.policy_config import PolicyConfig

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
NAMES = {
    "PPO": "ppo",
    "GRPO": "grpo",
    "Dr.GRPO": "dr_grpo",
    "RLOO": "rloo",
    "REINFORCE++": "reinforce",
    "DAPO": "dapo",
    "GSPO": "gspo",
    "CISPO": "cispo",
}
POLICIES = [name for name in trainers() if issubclass(trainer_named(name).config, PolicyConfig)]


def default_of(name: str, setting: str) -> Any:
    value: Any = trainer_named(name).config.model_construct()
    for part in setting.split("."):
        value = vars(value)[part]
    return value


def test_every_algorithm_has_a_row_and_a_section() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Measured")[0], re.MULTILINE)) == sorted(POLICIES)
    assert sorted(NAMES.values()) == sorted(POLICIES)
    assert NAMES.keys() <= SECTIONS.keys()


@pytest.mark.parametrize("title", [*NAMES, "DPO"])
def test_defaults_are_those_that_are_said(title: str) -> None:
    said = re.findall(r"`([a-z_.]+)`(?: is)? (?:of )?(-?\d[\d.e-]*|null)\b", SECTIONS[title])
    assert said
    for setting, value in said:
        default = default_of({**NAMES, "DPO": "dpo"}[title], setting)
        assert default == (None if value == "null" else float(value.rstrip("."))), setting


FIGURE = r"[+-]\d+\.\d \[\d+\.\d, \d+\.\d\]"
MEASURED = {
    row[0]: re.findall(FIGURE, row[1])
    for row in re.findall(r"^\| ([A-Z][^|]*?) \| (.*) \|$", SECTIONS["Measured"], re.MULTILINE)
}


def test_every_row_of_what_was_measured_has_three_seeds_whose_gain_is_in_the_middle_of_its_interval() -> None:
    assert {label.partition(",")[0] for label in MEASURED} == NAMES.keys()
    for label, figures in MEASURED.items():
        assert len(figures) == 3, label
        for gain, low, high in (map(float, re.findall(r"\d+\.\d", figure)) for figure in figures):
            assert gain == pytest.approx((low + high) / 2, abs=0.11), label


@pytest.mark.parametrize("title", NAMES)
def test_a_section_has_the_figures_of_its_first_row(title: str) -> None:
    (said,) = re.findall(r"^Measured: (.*) points\.$", SECTIONS[title], re.MULTILINE)
    assert said.split("; ") == next(MEASURED[label] for label in MEASURED if label.partition(",")[0] == title)


def test_readme_has_the_same_figures() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    labels = {"ppo": "PPO, a reward model", "grpo": "GRPO, a rule", "rloo": "RLOO"}
    for name, label in labels.items():
        (row,) = re.findall(rf"^\| `{name}_tiny\.yaml` \|.*$", readme, re.MULTILINE)
        assert re.findall(FIGURE, row) == MEASURED[label]


def test_nothing_was_left_to_fill_in() -> None:
    assert set(re.findall(r"\b[A-Z]{6,}\b", PAGE)) == {"REINFORCE", "README", "LEARNERS", "TRAINER"}


def test_settings_and_metrics_that_are_named_are_there() -> None:
    settings = {row.name for name in [*POLICIES, "dpo"] for row in describe(trainer_named(name).config)}
    settings |= {name.rpartition(".")[0] for name in settings}
    for span in re.findall(r"`([a-z_.]+)(?:=[^`]*)?`", PAGE):
        elsewhere = span.startswith(("tests", "megarlhf")) or span.endswith(".yaml") or span in trainers()
        if "_" in span and not elsewhere:
            known = span in settings or span in {"sequence_mask", "my_package.my_algorithm"}
            assert known, span
    for name in re.findall(r"`((?:rollout|draws|group|sampler|compute|dpo)/\w+)`", PAGE):
        assert name in GLOSSARY, name


def test_the_algorithm_that_is_shown_is_the_one_that_is_tested() -> None:
    shown = re.findall(r"```python\n(.*?)```", SECTIONS["Write your own"], re.DOTALL)[0]
    written = (ROOT / "tests" / "trainers" / "toy_reinforce.py").read_text(encoding="utf-8")
    lines = [line.strip() for line in shown.splitlines() if line.strip() not in ("", "...")]
    assert [line for line in lines if line not in written] == []
