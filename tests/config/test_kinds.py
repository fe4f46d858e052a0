"""Groups of several kinds under names of the user's, as judges are: help, suggestions, and errors that name them."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from megarlhf.config import describe, dump_config, load_config
from megarlhf.errors import ConfigError
from megarlhf.judges.function import FunctionConfig
from megarlhf.judges.texts import Opinion, Response
from megarlhf.trainers.ppo import PPOConfig

RULE = ("kind", "rule", "weight", "right", "wrong", "ignore_case", "pattern", "unit")
ANSWER = ("run_dir=run", "judges.answer.kind=rule", "judges.answer.rule=maths")


def said(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(PPOConfig, file, overrides)
    return str(error.value)


def test_they_are_read_from_files_and_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "run_dir: run\njudges:\n  answer: {kind: rule, rule: maths}\n  taste: {kind: model, init: x, weight: 2}\n"
    )
    cfg = load_config(
        PPOConfig, file, ["judges.answer.weight=0.5", "judges.own.kind=function", "judges.own.function=a.py:b"]
    )
    assert [(name, judge.kind, judge.weight) for name, judge in cfg.judges.items()] == [
        *(("answer", "rule", 0.5), ("taste", "model", 2.0), ("own", "function", 1.0)),
    ]
    again = tmp_path / "again.yaml"
    again.write_text(cfg.to_yaml())
    assert load_config(PPOConfig, again, []) == cfg


def test_help_has_every_setting_of_every_kind_once() -> None:
    rows = {row.name: row for row in describe(PPOConfig) if row.name.startswith("judges")}
    assert rows["judges.NAME.kind"].type.startswith("model | rule | function")
    assert rows["judges.NAME.weight"].help.startswith("What its scores are multiplied by")
    assert rows["judges.NAME.init"].help.startswith("Of model, process. ")
    assert (
        rows["judges.NAME.rule"].type == "arithmetic | gsm8k | maths | exact | reasoning_gym | regex | format | length"
    )
    names = [row.name for row in describe(PPOConfig)]
    # What two kinds call alike and mean otherwise is there for each of them.
    assert {name for name in names if names.count(name) > 1} == {"judges.NAME.reward"}
    of = {row.help.partition(".")[0]: row.type for row in describe(PPOConfig) if row.name == "judges.NAME.reward"}
    assert of == {"Of code_tests": "share | all", "Of process": "sum | soft_min | min | product | mean | last"}


MISTAKES = {
    "judges.answer.weights=2": "unknown setting judges.answer.weights = 2 (from the command line); did you mean "
    "judges.answer.weight?",
    "judges.answer.weight=x": "setting judges.answer.weight = 'x': input should be a valid number; give float.",
    "judges.answer.rule=math": "setting judges.answer.rule = 'math': input should be 'arithmetic', 'gsm8k', ",
    "judges.answer.kind=ruel": "setting judges.answer.kind = 'ruel': there is no such kind; did you mean rule?",
    "judges.answer.kind=5": "setting judges.answer.kind = '5': there is no such kind; give model | rule | ",
    "judges.other.weight=2": "missing setting judges.other.kind (model | rule | ",
    "judges.other.kind=model": "missing setting judges.other.init (text); add it to the file or give judges.other.init",
    "judges.answer.init=x": "unknown setting judges.answer.init = 'x' (from the command line); ",
    "judges.other=5": "setting judges.other = 5: ",
    "judges=5": "setting judges = 5: ",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_mistakes_are_named_as_the_user_wrote_them(override: str) -> None:
    assert MISTAKES[override] in said(*ANSWER, override)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((), "no judge: nothing would score the responses; set reward.init"),
        (("judges.actor.kind=model", "judges.actor.init=x"), "judges.actor: a judge's name is of small letters"),
        (("judges.My-own.kind=model", "judges.My-own.init=x"), "judges.My-own: a judge's name is of small letters"),
        (
            ("reward.init=x", "judges.reward.kind=model", "judges.reward.init=y"),
            "reward.init and judges.reward are two",
        ),
        ((*ANSWER[1:], "judges.answer.weight=0"), "every judge has weight 0"),
    ],
)
def test_a_panel_that_makes_no_sense_is_refused(given: tuple[str, ...], says: str) -> None:
    cfg = load_config(PPOConfig, None, ["run_dir=run", *given])
    with pytest.raises(ConfigError) as error:
        cfg.check_sizes()
    assert str(error.value).startswith(says)


def test_the_short_form_is_a_judge_of_its_name() -> None:
    cfg = load_config(PPOConfig, None, ["run_dir=run", "reward.init=x", *ANSWER[1:]])
    assert {name: (judge.kind, judge.weight) for name, judge in cfg.panel.items()} == {
        "reward": ("model", 1.0),
        "answer": ("rule", 1.0),
    }
    cfg.check_sizes()
    load_config(PPOConfig, None, ["run_dir=run", "reward.init=x", *ANSWER[1:], "judges.answer.weight=0"]).check_sizes()
    assert cfg.inits["critic"] == cfg.inits["reward"] == "x"
    assert (cfg.setting_of("reward"), cfg.setting_of("answer")) == ("reward.init", "judges.answer.init")


def test_the_page_about_judges_is_true(tmp_path: Path) -> None:
    """Its settings load, its table of kinds is whole, and its function gives what it says."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "judges.md").read_text(encoding="utf-8")
    settings, functions = (re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("yaml", "python"))
    shown: list[dict[str, Any]] = []
    for each in settings:
        (tmp_path / "run.yaml").write_text(f"run_dir: run\n{each}")
        shown.append(load_config(PPOConfig, tmp_path / "run.yaml", []).judges)
    judges, function = shown[0], functions[0]
    kinds = next(row.type for row in describe(PPOConfig) if row.name == "judges.NAME.kind").split(" | ")
    assert sorted(judge.kind for judge in judges.values()) == sorted(kinds)
    assert re.findall(r"^\| `(\w+)` \| [^|]*\| (?:a|the|`)", page, re.MULTILINE) == [
        "model",
        "rule",
        "function",
        "remote",
        "code_tests",
        "process",
    ]
    (tmp_path / "my_reward.py").write_text(function)
    nobody: Any = None
    own = FunctionConfig(kind="function", function=f"{tmp_path / 'my_reward.py'}:brief").scorer("judges.page", nobody)
    assert own([Response("?", "The answer is 5.", "5", {}, 1)]) == [
        Opinion(1 - 0.016, {"right": 1.0, "length": -0.016}),
    ]


@pytest.mark.parametrize(
    ("now", "refused"),
    [
        (("judges.answer.weight=2",), {"judges.answer.weight"}),
        (("judges.other.kind=rule", "judges.other.rule=maths"), {f"judges.other.{x}" for x in RULE}),
        (("reward.init=x",), {"reward.init"}),
        (("judges.house.url=http://there/", "judges.house.timeout_s=5"), set()),
    ],
)
def test_a_run_goes_on_with_the_same_judges_wherever_a_service_is(
    now: tuple[str, ...], refused: set[str], tmp_path: Path
) -> None:
    run = (f"run_dir={tmp_path}", *ANSWER[1:], "judges.house.kind=remote", "judges.house.url=http://here/")
    dump_config(load_config(PPOConfig, None, run), tmp_path / "config.yaml")
    assert load_config(PPOConfig, None, run).changes() == {}
    with pytest.raises(ConfigError) if refused else nullcontext() as error:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
        load_config(PPOConfig, None, [*run, *now]).check_run_dir()
    for name in refused:
        assert error is not None
        assert name in str(error.value)
    # And with one judge less, which is the other way round.
    fewer = load_config(PPOConfig, None, [part for part in run if "house" not in part])
    assert {"judges.house.kind", "judges.house.weight"} <= fewer.changes().keys()


def test_a_function_is_the_same_however_its_file_is_spelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").touch()
    run = ("run_dir=run", "judges.own.kind=function")
    Path("run").mkdir()
    dump_config(load_config(PPOConfig, None, [*run, "judges.own.function=own.py:one"]), Path("run/config.yaml"))
    for spelt, changes in ((f"{tmp_path}/own.py:one", 0), ("./own.py:one", 0), ("own.py:two", 1)):
        assert len(load_config(PPOConfig, None, [*run, f"judges.own.function={spelt}"]).changes()) == changes
