"""`megarlhf report A B`: one page of several runs, where it goes, and what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from megarlhf import cli
from megarlhf.observe.about import Setting
from tests.helpers.pages import ABOUT, policy_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs in the working directory, of which one has other settings."""
    changed = {"actor.optim.lr": "0.0001", "seed": "2"}
    of_b = tuple(replace(each, value=changed.get(each.name, each.value)) for each in ABOUT.settings)
    own = (Setting("critic.init", "runs/reward", '""', differs=True), Setting("gamma", "1", "1", differs=False))
    policy_run(tmp_path / "a")
    policy_run(tmp_path / "b", lr=1e-4, iterations=12, about=replace(ABOUT, settings=(*of_b, *own)))
    for name, commit in (("a", "abc"), ("b", "def")):
        (tmp_path / name / "versions.json").write_text(json.dumps({"commit": commit, "torch": "2.13.0"}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_runs_are_compared_where_the_reader_stands(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "a", "b"]) == 0
    assert capsys.readouterr().out == "a_vs_b.html\n"
    page = (runs / "a_vs_b.html").read_text(encoding="utf-8").replace("<wbr>", "")
    differing = page.partition("Settings that differ</h2>")[2].partition("<h2")[0]
    assert re.findall(r"<tr><td>(.*?)<td>(.*?)<td>(.*?)</tr>", differing) == [
        ("seed", "1", "2"),
        ("actor.optim.lr", "0.0002", "0.0001"),
        ("critic.init", "–", "runs/reward"),
        ("version of commit", "abc", "def"),
    ]
    # Of step 20 and of step 12, 1.5 (1 - exp(-step / 8))^2.
    assert "<tr><td>kl/reference_mean<td>1.264<td>0.9053<td>−0.3586<td>nats</tr>" in page
    # Score, reward, two judges, accuracy, equal groups, KL, length, truncated; rate, norm, loss; speed, memory, times.
    assert page.count("<figure") == 17
    assert page.count("<ul class=legend><li><i class=s1></i>a<li><i class=s2></i>b</ul>") == 17
    assert "Stopped after 12 of 20 iterations" in page


def test_such_a_page_is_made_again_and_no_other_file_is_replaced(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", "a", "b"]) == 0
    first = (runs / "a_vs_b.html").read_bytes()
    assert cli.main(["report", "a", "b"]) == 0
    assert (runs / "a_vs_b.html").read_bytes() == first
    for other in ("<p>mine</p>", (runs / "a" / "metrics.jsonl").read_text()):
        (runs / "a_vs_b.html").write_text(other)
        assert cli.main(["report", "a", "b"]) == 2
        assert (runs / "a_vs_b.html").read_text() == other
    (runs / "a_vs_b.html").unlink()
    (runs / "a_vs_b.html").symlink_to("a/metrics.jsonl")
    assert cli.main(["report", "a", "b"]) == 2
    problem = "a_vs_b.html is there, and no page of this command; name another file with output=FILE.html.\n"
    assert capsys.readouterr().err == 3 * problem
    assert cli.main(["report", "run_dir=[a, b]", "output=c.html"]) == 0
    assert (runs / "c.html").read_bytes() == first


def test_one_run_goes_by_its_place_too(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "a"]) == 0
    assert capsys.readouterr().out == "a/report.html\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["a", "a"], "the same run is named twice: a, a; name each once."),
        (["a", "a/../a"], "the same run is named twice: a, a/../a; name each once."),
        (["a", "nowhere"], "run_dir nowhere: no metrics.jsonl there; give the directory of a run."),
        (["a", "."], "run_dir .: no metrics.jsonl there; did you mean a or b?"),
        (["a", "run_dir=b"], "a: run_dir is given too; give one of the two."),
        (["a", "output=c.html"], "output=c.html: the page of one run goes into its directory; leave output out."),
        (["a", "b", "output=no/c.html"], "output=no/c.html: there is no directory no; make it, or choose another."),
        (["run_dir=[]"], "run_dir: 0 runs; name one, or 2 to 6 to compare."),
        ([*"abcdefg"], "run_dir: 7 runs; name one, or 2 to 6 to compare."),
    ],
)
def test_what_cannot_be_compared_is_said(
    words: list[str], problem: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", *words]) == 2
    assert capsys.readouterr().err == f"{problem}\n"
    assert not list(runs.glob("*.html"))


def test_runs_of_one_name_are_told_apart_by_where_they_are(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy_run(runs / "x" / "grpo")
    policy_run(runs / "y" / "grpo")
    assert cli.main(["report", "x/grpo", "y/grpo"]) == 0
    assert capsys.readouterr().out == "x-grpo_vs_y-grpo.html\n"
    assert "<h1>x/grpo vs y/grpo</h1>" in (runs / "x-grpo_vs_y-grpo.html").read_text(encoding="utf-8")


def test_a_word_alone_is_for_report_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sft", "runs/a"]) == 2
    assert capsys.readouterr().err.startswith("argument 'runs/a': not a setting; write name=value")
