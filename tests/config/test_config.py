"""Settings: precedence, strictness, and error messages that name the setting, the value and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pydantic
import pytest

from megarlhf.config import Config, describe, describe_groups, dump_config, load_config
from megarlhf.config.base import FreeToChange
from megarlhf.errors import ConfigError


class Optim(Config):
    lr: Annotated[float, pydantic.Field(gt=0)] = 3e-6
    """Peak learning rate, 1/step. Source: Huang et al. 2024."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments."""


class Run(Config):
    run_dir: Path = Path("runs/x")
    """Where everything is written."""
    kind: Literal["pairwise", "pointwise"] = "pairwise"
    """Loss."""
    batch: Annotated[int, pydantic.Field(ge=1, le=4096)] = 512
    """Rollouts per
    iteration."""
    resume: bool = False
    """Go on from the last checkpoint."""
    name: str
    """Required text."""
    optim: Optim = Optim(lr=1e-4)
    """Actor's optimiser."""
    critic: Optim | None = None
    """Critic's optimiser; null shares the actor's."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> Run:
        if self.batch % 2:
            raise ValueError(f"batch must be even: {self.batch}; give {self.batch + 1}.")
        return self


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path, overrides)
    return str(caught.value)


def test_command_line_beats_file_beats_default(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\nbatch: 64\noptim:\n  betas: [0.8, 0.9]\n")
    cfg = load_config(Run, path, ["batch=32", "optim.lr=1e-5", "batch=16"])
    assert (cfg.name, cfg.batch, cfg.optim.betas, cfg.optim.lr) == ("a", 16, (0.8, 0.9), 1e-5)
    assert cfg.run_dir == Path("runs/x")


def test_nested_overrides_keep_their_siblings(tmp_path: Path) -> None:
    path = write(tmp_path, "name: a\noptim: {lr: 0.5}\noptim.betas: [0.1, 0.2]\n")
    assert load_config(Run, path, ["optim={lr: 0.25}"]).optim == Optim(lr=0.25, betas=(0.1, 0.2))


class Learner(Config):
    optim: Optim = Optim(lr=7e-6, betas=(0.5, 0.6))
    """Its optimiser."""
    init: str = ""
    """Where it starts."""


class Both(Config):
    actor: Learner = Learner(init="sft")
    """The policy."""
    critic: Learner = Learner(optim=Optim(lr=2e-6))
    """The value model."""


def test_a_partly_given_group_keeps_the_defaults_of_its_owner() -> None:
    assert load_config(Run, None, ["name=a", "optim.betas=[0.1, 0.2]"]).optim == Optim(lr=1e-4, betas=(0.1, 0.2))
    both = load_config(Both, None, ["actor.optim.lr=1.0", "critic.optim.betas=[0.1, 0.2]", "critic.init=x"])
    assert both.actor == Learner(init="sft", optim=Optim(lr=1.0, betas=(0.5, 0.6)))
    # The critic's owner gives it an Optim of its own, which replaces Learner's as a whole, in --help too.
    assert {row.name: row.default for row in describe(Both)}["critic.optim.betas"] == "[0.9, 0.95]"
    assert both.critic == Learner(init="x", optim=Optim(lr=2e-6, betas=(0.1, 0.2)))
    assert load_config(Both, None, ["critic.init=x"]).critic.optim == Optim(lr=2e-6)


def test_values_are_yaml_1_2() -> None:
    cfg = load_config(Run, None, ["name=no", "optim.lr=1e-5", "resume=true", "batch=010"])
    assert (cfg.name, cfg.optim.lr, cfg.resume, cfg.batch) == ("no", 1e-5, True, 10)
    assert load_config(Run, None, ["name='1e-5'"]).name == "1e-5"
    assert load_config(Run, None, ["name=a", "critic={}"]).critic == Optim()


@pytest.mark.parametrize("lr", [1e-5, 3e-06, 0.1, 12345678.9, 1e12])
@pytest.mark.parametrize("name", ["no", "1e-5", "null", "0x1F", "a: b", "", "2024-01-01", "ü"])
def test_dump_then_load_is_the_identity(tmp_path: Path, lr: float, name: str) -> None:
    cfg = Run(name=name, optim=Optim(lr=lr), critic=Optim(betas=(0.0, 1.0)))
    dump_config(cfg, tmp_path / "config.yaml")
    assert load_config(Run, tmp_path / "config.yaml", []) == cfg


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("batch=abc", ["batch", "'abc'", "valid integer", "int >= 1, <= 4096"]),
        ("batch=2.0", ["batch", "2.0", "int >= 1, <= 4096"]),
        ("batch=true", ["batch", "true"]),
        ("batch=0", ["batch", "= 0", "greater than or equal to 1"]),
        ("batch='2'", ["batch", "'2'"]),
        ("optim.lr=-1", ["optim.lr", "-1", "float > 0"]),
        ("optim.betas=[1]", ["optim.betas", "list of float"]),
        ("kind=both", ["kind", "'both'", "pairwise | pointwise"]),
        ("resume=1", ["resume", "true | false"]),
        ("optim=3", ["optim", "3"]),
        ("bach=8", ["unknown setting bach = 8", "did you mean batch?"]),
        ("optim.lrr=8", ["unknown setting optim.lrr", "did you mean optim.lr?"]),
        ("betas=[0,0]", ["unknown setting betas", "did you mean optim.betas?"]),
        ("zzzzzz=8", ["unknown setting zzzzzz", "--help"]),
        ("batch", ["argument 'batch'", "name=value"]),
        ("=3", ["argument '=3'", "name=value"]),
        ("name.x=1", ["name.x", "already 'a'"]),
        ("name=[", ["name=[", "not a YAML value"]),
    ],
)
def test_mistakes_name_setting_value_and_remedy(override: str, parts: list[str]) -> None:
    text = message(None, "name=a", override)
    assert all(part in text for part in parts), text


def test_a_validator_speaks_for_itself() -> None:
    assert message(None, "name=a", "batch=3") == "batch must be even: 3; give 4."


def test_missing_setting_and_every_mistake_reported_at_once() -> None:
    lines = message(None, "bach=3", "optim.lr=x").splitlines()
    assert len(lines) == 3
    assert "missing setting name (text)" in "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("name: [", "not YAML"),
        ("- a\n", "`name: value`"),
        ("just words\n", "`name: value`"),
        ("batch: 2\nbatch: 4\n", "batch is given twice"),
        ("optim: {lr: 1, lr: 2}\n", "lr is given twice"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, part: str) -> None:
    text = message(write(tmp_path, text))
    assert part in text
    assert "run.yaml" in text


def test_missing_file_is_named(tmp_path: Path) -> None:
    assert "absent.yaml: No such file" in message(tmp_path / "absent.yaml")


def test_an_empty_file_means_defaults(tmp_path: Path) -> None:
    assert load_config(Run, write(tmp_path, "# nothing\n"), ["name=a"]) == Run(name="a")


def test_frozen() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Run(name="a").batch = 3


def test_groups_are_described_too() -> None:
    optim = "Its optimiser."
    assert describe_groups(Both) == {
        "actor": "The policy.",
        "actor.optim": optim,
        "critic": "The value model.",
        "critic.optim": optim,
    }


def test_describe_lists_every_setting_with_type_default_and_text() -> None:
    rows = {row.name: row for row in describe(Run)}
    assert list(rows) == [
        *("run_dir", "kind", "batch", "resume", "name", "optim.lr", "optim.betas", "critic.lr", "critic.betas"),
    ]
    assert rows["batch"] == ("batch", "int >= 1, <= 4096", "512", "Rollouts per iteration.")
    assert rows["name"].default == "required"
    assert rows["optim.lr"] == (
        "optim.lr",
        "float > 0",
        "0.0001",
        "Peak learning rate, 1/step. Source: Huang et al. 2024.",
    )
    assert rows["optim.betas"].type == "list of float"
    assert rows["optim.betas"].default == "[0.9, 0.95]"
    assert rows["resume"].type == "true | false"
    assert rows["kind"].type == "pairwise | pointwise"


class Inner(Config):
    """A group."""

    rate: Annotated[float, FreeToChange(said=True)] = 1.0
    """A rate."""
    size: int = 1
    """A size."""


class Outer(Config):
    """Settings of which some may change."""

    cadence: Annotated[int, FreeToChange()] = 1
    """A cadence."""
    seed: int = 1
    """A seed."""
    group: Annotated[Inner, FreeToChange()] = Inner()
    """A group that is free as a whole."""
    other: Inner = Inner()
    """A group with a free setting."""


def test_marks_of_settings_that_may_change_are_found_by_dotted_name() -> None:
    free, said = FreeToChange(), FreeToChange(said=True)
    assert Outer.free_to_change() == {"cadence": free, "group": free, "other.rate": said}
