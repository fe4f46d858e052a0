"""`megarlhf generate` writes as it goes, and goes on where it stopped; no command overwrites an output."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest

from megarlhf import cli
from megarlhf.commands import generate
from megarlhf.commands.generate import GenerateConfig
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from megarlhf.rollout.engine import RolloutEngine
from tests.helpers.ranks import run_ranks

PART = 4
"""Responses of a part: of two prompts."""
GIVEN: dict[str, Any] = {
    "model": "tiny-xs",
    "tokenizer": "arithmetic",
    "n": 2,
    "prompts": {"source": "arithmetic", "template": "plain", "arithmetic": {"rows": 5}},
    "sampling": {"temperature": 1.0, "max_new_tokens": 6},
}
WORDS = (
    *("model=tiny-xs", "tokenizer=arithmetic", "prompts.source=arithmetic", "prompts.template=plain"),
    *("prompts.arithmetic.rows=5", "sampling.max_new_tokens=6"),
)


def drawn(layout: ParallelLayout, output: Path, changes: dict[str, Any]) -> tuple[str, int]:
    """Run the command on this rank with parts of a few rows; what it said, and how often it drew."""
    rollout = {"rows": PART // layout.data}
    cfg = GenerateConfig.model_validate({**GIVEN, "layout": layout, "rollout": rollout, "output": output, **changes})
    calls: list[int] = []
    draw = RolloutEngine.generate

    def counted(self: RolloutEngine, *args: Any, **options: Any) -> Any:
        calls.append(1)
        return draw(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as said:
        patch.setattr(RolloutEngine, "generate", counted)
        generate.run(cfg, generate.prepare(cfg), start(cfg.layout, seed=cfg.seed))
    return said.getvalue(), len(calls)


def run(layout: ParallelLayout, output: Path, **changes: Any) -> tuple[str, int]:
    return run_ranks(drawn, layout.world_size, layout, output, changes)[0]


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(data=2)], ids=["alone", "data2"])
def test_an_interrupted_output_becomes_the_whole_one(layout: ParallelLayout, tmp_path: Path) -> None:
    """Cut inside the first row, between parts, and inside one."""
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    assert run(layout, whole)[1] == 3  # parts of 2, 2 and 1 prompts
    lines = whole.read_bytes().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 10
    assert [row["prompt"] for row in rows[::2]] == [row["prompt"] for row in rows[1::2]]
    assert rows[0].keys() == {"prompt", "response", "logprob", "tokens", "terminated"}
    torn.with_name("torn.jsonl.settings.json").write_bytes(whole.with_name("whole.jsonl.settings.json").read_bytes())
    for kept, cut, parts in ((0, 1, 3), (4, 0, 2), (7, 9, 2), (10, 0, 0)):
        torn.write_bytes(b"".join(lines[:kept]) + (lines[kept][:cut] if cut else b""))
        said, calls = run(layout, torn)
        assert torn.read_bytes() == whole.read_bytes()
        assert calls == parts
        left = f"{10 - kept} left" if kept < 10 else "nothing is left"
        assert (f"{kept} of 10 rows are there, {left} to do" in said) == (kept > 0)


def refused(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 2
    said = capfd.readouterr()
    assert said.out == ""
    return said.err


def test_only_what_was_begun_alike_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(ParallelLayout(), tmp_path / "out.jsonl")
    before = Path("out.jsonl").read_bytes()
    command = ("generate", *WORDS, "n=2", "output=out.jsonl", "sampling.temperature=1")
    for words, said in (
        (["seed=2"], "output=out.jsonl was begun with other settings (seed 1 -> 2); put them back to go on with it"),
        (["sampling.top_k=3"], "(sampling.top_k 0 -> 3); put them back to go on with it, or choose another output"),
        (["n=1"], "(n 2 -> 1); put them back"),
        (["prompts.arithmetic.seed=9"], "out.jsonl, row 1: other prompt than in row 1 of arithmetic; put the input"),
        (["prompts.arithmetic.rows=3"], "output=out.jsonl has more rows than the 6 of arithmetic; put the input back"),
        (["output=out.jsonl.settings.json"], "out.jsonl.settings.json exists and out.jsonl.settings.json.settings"),
    ):
        assert said in refused(capfd, *command, *words)
    assert Path("out.jsonl").read_bytes() == before


@pytest.mark.parametrize("command", ["generate", "eval", "score"])
def test_an_output_of_somebody_else_is_never_overwritten(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"tokens": [1, 2, 3]}\n')
    Path("mine.txt").write_text("mine")
    words = ("model=tiny-xs", "input=rows.jsonl") if command == "score" else WORDS
    said = refused(capfd, command, *words, "output=mine.txt")
    assert said.startswith("output=mine.txt exists")
    assert said.endswith("; choose another file, or remove it.\n")
    assert Path("mine.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "rows.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("eval model=tiny-xs max_new_tokens=6", "did you mean sampling.max_new_tokens?"),
        ("eval model=tiny-xs temperature=0.5", "did you mean sampling.temperature?"),
        ("eval model=tiny-xs template=plain", "did you mean prompts.template?"),
        ("generate model=tiny-xs temperature=0.5", "did you mean sampling.temperature?"),
        ("score model=tiny-xs input=a output=b temperature=0.5", "did you mean sampling.temperature?"),
        ("score model=tiny-xs input=a output=b control_tokens=text", "did you mean prompts.control_tokens?"),
    ],
)
def test_a_name_is_the_same_everywhere_and_another_is_answered_by_it(
    words: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capfd, *words.split())


def test_greedy_sampling_is_measured_anyway(capfd: pytest.CaptureFixture[str]) -> None:
    said = refused(capfd, "eval", *WORDS, "sampling.temperature=0")
    assert (
        said == "sampling.temperature=0: greedy responses are measured anyway, beside sampled ones; set it above 0.\n"
    )
