"""`megarlhf judge`, `eval pool` and `rows`: distinct responses are judged once, and all else follows from that."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stderr
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megarlhf import cli
from megarlhf.commands import generate, judge
from megarlhf.commands.generate import GenerateConfig
from megarlhf.commands.judge import PoolJudgesConfig
from megarlhf.commands.row_file import RowFile
from megarlhf.data.arithmetic import is_correct, prompt_rows, words
from megarlhf.data.preferences import load_labelled, load_preferences
from megarlhf.data.row import Row
from megarlhf.data.rows import DataConfig
from megarlhf.data.sft import load_sft
from megarlhf.data.tokenizer import build_tiny_tokenizer
from megarlhf.errors import CheckpointError, ConfigError, DataError
from megarlhf.eval.intervals import mean
from megarlhf.eval.pool import open_pool, score_file
from megarlhf.eval.pool_scores import ADDED, read_scores
from megarlhf.judges.judge import Verdict
from megarlhf.judges.panel import Court, build_panel
from megarlhf.judges.texts import Reader
from megarlhf.parallel.layout import ParallelLayout
from megarlhf.parallel.mesh import start
from tests.helpers.pools import DATA, said, write_pool
from tests.helpers.ranks import run_ranks

CLOSE = 2e-5
"""fp32, in batches of another width."""
SAMPLES, PART = 8, 4
ANSWERS = [row["answer"] for row in prompt_rows(DATA.arithmetic, "train")]
RIGHT = np.array([[is_correct(text, answer) for text in of] for of, answer in zip(said(SAMPLES), ANSWERS, strict=True)])
LENGTHS = np.array([[float(len(text)) for text in of] for of in said(SAMPLES)])
DISTINCT = sum(len(set(of)) for of in said(SAMPLES))
OWN = """
from pathlib import Path

def length(prompt, response, answer, columns):
    with Path(__file__).with_name("asked.txt").open("a") as file:
        file.write(response + "\\n")
    return float(len(response))
"""
RULE = {"kind": "rule", "rule": "arithmetic"}


def config(pool: Path, judges: dict[str, Any], **changes: Any) -> PoolJudgesConfig:
    return PoolJudgesConfig.model_validate({"pool": pool, "judges": judges, **changes})


def asked(cfg: PoolJudgesConfig) -> str:
    """Run the command on this rank, with parts of a few responses; what it said."""
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(io.StringIO()) as text:
        patch.setattr(judge, "PART_ROWS", PART)
        judge.run(cfg, judge.prepare(cfg), start(cfg.layout, seed=cfg.seed))
    return text.getvalue()


def run(pool: Path, judges: dict[str, Any], **changes: Any) -> str:
    cfg = config(pool, judges, **changes)
    return run_ranks(asked, cfg.layout.world_size, cfg)[0]


def draw(cfg: GenerateConfig) -> None:
    generate.run(cfg, generate.prepare(cfg), start(cfg.layout, seed=cfg.seed))


def own(pool: Path) -> dict[str, Any]:
    (pool / "own.py").write_text(OWN)
    return {"kind": "function", "function": f"{pool / 'own.py'}:length"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judged by what is right and by length; one sample of each prompt did not end."""
    directory = tmp_path_factory.mktemp("judged") / "pool"
    write_pool(directory, SAMPLES, cut=(5,))
    run(directory, {"answer": RULE, "length": own(directory)})
    return directory


def test_there_is_something_to_choose_from() -> None:
    assert 0.1 < RIGHT.mean() < 0.9
    assert RIGHT.size - 6 > DISTINCT
    assert (RIGHT.any(1) & ~RIGHT.all(1)).sum() >= 4


def test_equal_responses_are_judged_once_and_share_what_is_said(pool: Path) -> None:
    opened = open_pool(pool)
    # Sample 5 has no end, so that it is another response than one of the same text that has.
    distinct = sum(len({(text, sample == 5) for sample, text in enumerate(of)}) for of in said(SAMPLES))
    heard = (pool / "asked.txt").read_text().splitlines()
    assert len(heard) == len(opened.distinct) == distinct
    answer, length = (read_scores(opened, name) for name in ("answer", "length"))
    np.testing.assert_array_equal(answer.right(), RIGHT)
    np.testing.assert_array_equal(answer.scores(), RIGHT)
    np.testing.assert_array_equal(length.scores(), LENGTHS)
    assert (answer.knows, length.knows, length.has_steps) == (True, False, False)
    widths = [len(each.ids) + len(opened.prompts.tokens[each.place.prompt]) for each in opened.distinct]
    assert widths == sorted(widths), "short ones first: little padding"


def by_hand(pool: Path) -> torch.Tensor:
    """The reward model's scores of every response, asked for all at once."""
    opened, mesh = open_pool(pool), start(ParallelLayout(), seed=1)
    cfg = config(pool, {"rm": {"kind": "model", "init": "tiny-xs"}})
    court = Court(judge.prepare(cfg).models, Reader(opened.prompts, opened.tokenizer, mesh, 60), cfg)
    (rm,) = build_panel(cfg.judges, None, court).judges
    return rm.judge(opened.rollout(list(opened.responses()))).scores.view(len(opened.prompts), -1)


def test_a_reward_model_says_what_it_says_of_them_in_any_layout(tmp_path: Path) -> None:
    write_pool(tmp_path, SAMPLES)
    run(tmp_path, {"rm": {"kind": "model", "init": "tiny-xs"}})
    run(tmp_path, {"two": {"kind": "model", "init": "tiny-xs"}}, layout=ParallelLayout(data=2))
    expected = run_ranks(by_hand, 1, tmp_path)[0].numpy()
    opened = open_pool(tmp_path)
    for name in ("rm", "two"):
        found = read_scores(opened, name).scores()
        np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)
    assert expected.std() > 100 * CLOSE


@pytest.mark.parametrize(("kept", "torn", "again"), [(0, 9, 0), (PART, 0, PART), (PART + 2, 30, PART)])
def test_an_interrupted_judge_goes_on(kept: int, torn: int, again: int, tmp_path: Path) -> None:
    """A part of which some is there is judged whole again."""
    write_pool(tmp_path, SAMPLES)
    judges = {"length": own(tmp_path)}
    run(tmp_path, judges)
    file, heard = score_file(tmp_path, "length"), tmp_path / "asked.txt"
    whole, lines = file.read_bytes(), file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:kept]) + lines[kept][:torn])
    heard.unlink()
    run(tmp_path, judges)
    assert file.read_bytes() == whole
    assert len(heard.read_text().splitlines()) == DISTINCT - again


def test_a_judge_that_is_there_is_not_asked_again_and_another_of_its_name_is_refused(pool: Path) -> None:
    before = (pool / "asked.txt").read_text(), score_file(pool, "length").read_bytes()
    judges = {"length": {**own(pool), "weight": 0.5}}
    assert "0 to do" not in run(pool, judges)
    assert ((pool / "asked.txt").read_text(), score_file(pool, "length").read_bytes()) == before
    with pytest.raises(ConfigError, match=r"judges.answer of pool=.* was begun with other settings \(right 1.0 -> 2.0"):
        judge.prepare(config(pool, {"answer": {**RULE, "right": 2.0}}))
    (pool / "own.py").write_text(OWN.replace("len(response)", "-len(response)"))
    with pytest.raises(ConfigError, match=r"function's content '\w+' -> '\w+'\); put them back .* another name"):
        judge.prepare(config(pool, {"length": {"kind": "function", "function": f"{pool / 'own.py'}:length"}}))
    own(pool)


def test_a_pool_that_has_grown_is_judged_on(tmp_path: Path) -> None:
    write_pool(tmp_path, SAMPLES)
    run(tmp_path, {"length": own(tmp_path)})
    before = score_file(tmp_path, "length").read_bytes()
    write_pool(tmp_path, SAMPLES, 30)
    with pytest.raises(ConfigError, match=rf"length.jsonl has {DISTINCT} of \d+ rows; run the megarlhf judge"):
        read_scores(open_pool(tmp_path), "length")
    run(tmp_path, {"length": own(tmp_path)})
    grown, after = open_pool(tmp_path), score_file(tmp_path, "length").read_bytes()
    assert after.startswith(before)
    assert len(after.splitlines()) == len(grown.distinct) == sum(len(set(of)) for of in said(30)) > DISTINCT
    assert len((tmp_path / "asked.txt").read_text().splitlines()) <= len(grown.distinct) + PART
    scores = read_scores(grown, "length").scores()
    np.testing.assert_array_equal(scores, [[float(len(text)) for text in of] for of in said(30)])


def test_bad_input_is_refused_before_a_model_is_built(pool: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    write_pool(bare, SAMPLES)
    prompts = bare / "prompts.jsonl"
    rows = [{**json.loads(line), "answer": "", "columns": {"prompt": "?"}} for line in prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases: list[tuple[Path, dict[str, Any], type[Exception], str]] = [
        (
            tmp_path / "none",
            {"answer": RULE},
            ConfigError,
            r"none: there is no pool.json; name a directory that megarlhf",
        ),
        (pool, {}, ConfigError, "no judge; name one, as in judges.answer.kind=rule"),
        (pool, {"My judge": RULE}, ConfigError, "judges.My judge: a judge's name is of small letters"),
        (
            bare,
            {"answer": RULE},
            DataError,
            "bare, row 1: judges.answer judges by the answer; fill the column 'answer'",
        ),
        (bare, {"tests": {"kind": "code_tests"}}, DataError, "row 1, column 'tests': no tests; judges.tests needs"),
        (pool, {"rm": {"kind": "model", "init": "nowhere"}}, CheckpointError, "'nowhere' is neither a directory nor"),
    ]
    for directory, judges, error, said_of in cases:
        with pytest.raises(error, match=said_of):
            judge.prepare(config(directory, judges))


def test_steps_are_kept_and_taken_together(tmp_path: Path) -> None:
    write_pool(tmp_path, SAMPLES)
    opened = open_pool(tmp_path)
    rng = np.random.default_rng(0)
    steps = [rng.random(int(count)).tolist() for count in rng.integers(1, 4, len(opened.distinct))]
    scores = torch.tensor([sum(each) for each in steps])[:, None]
    write_scores(tmp_path, "prm", Verdict(scores, steps=steps))
    found = read_scores(opened, "prm")
    assert found.has_steps
    np.testing.assert_allclose(found.scores("min"), np.array([min(each) for each in steps])[opened.places])
    np.testing.assert_allclose(found.scores("product"), np.array([np.prod(each) for each in steps])[opened.places])
    np.testing.assert_allclose(found.scores("mean"), np.array([np.mean(each) for each in steps])[opened.places])
    np.testing.assert_allclose(found.scores("last"), np.array([each[-1] for each in steps])[opened.places])
    rows = load_labelled_rows(tmp_path, "by=prm", "steps=product", tmp_path=tmp_path)
    assert rows == pytest.approx(found.scores("product").ravel().tolist(), abs=1e-7)


def test_steps_below_0_are_not_multiplied(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two bad steps would be worth more than two good ones: -5 x -4 > 3 x 2."""
    write_pool(tmp_path, SAMPLES)
    count = len(open_pool(tmp_path).distinct)
    for name, steps in (("signed", [[-5.0, -4.0], [3.0, 2.0]]), ("unknown", [[0.5, math.nan]])):
        said_ = [steps[at % len(steps)] for at in range(count)]
        write_scores(tmp_path, name, Verdict(torch.tensor([sum(each) for each in said_])[:, None], steps=said_))
    output = tmp_path / "numbers.json"
    run(tmp_path, {"answer": RULE})
    assert cli.main(["eval", "pool", f"pool={tmp_path}", "gold=answer", f"output={output}"]) == 0
    ways = {each["way"] for each in json.loads(output.read_text())["points"]}
    of_steps = {f"{name} ({how})" for name in ("signed", "unknown") for how in ("min", "mean", "last")}
    assert ways == {*of_steps, "pass@n", "maj@n"}
    capfd.readouterr()
    arguments = ["rows", f"pool={tmp_path}", "kind=pairs", "by=signed", f"output={tmp_path / 'o.jsonl'}"]
    for steps, remedy in (("product", "two would make a good response; set steps to "), (None, "set steps to ")):
        assert cli.main([*arguments, *([f"steps={steps}"] if steps else [])]) == 2
        assert f"{remedy}min, mean or last." in capfd.readouterr().err
    assert cli.main([*arguments, "steps=last"]) == 0


def write_scores(pool: Path, name: str, verdict: Verdict) -> None:
    """As the command writes what such a judge says."""
    opened, file = open_pool(pool), score_file(pool, name)
    file.parent.mkdir(exist_ok=True)
    rows = [
        Row("pool", number, {"row": opened.prompts.ids[each.place.prompt], "sample": each.place.sample})
        for number, each in enumerate(opened.distinct, start=1)
    ]
    output = RowFile(file, {}, ADDED, "", "")
    with output.open_after(output.done(rows)) as out:
        output.write(out, rows, judge.fields_of(verdict))


def load_labelled_rows(pool: Path, *words_: str, tmp_path: Path) -> list[float]:
    output = tmp_path / "labelled.jsonl"
    assert cli.main(["rows", f"pool={pool}", "kind=labelled", f"output={output}", *words_]) == 0
    found = load_labelled(DataConfig(source=str(output), template="plain"), build_tiny_tokenizer(words()))
    return [float(each) for each in found.correct]


def test_a_table_of_the_best_of_n(pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "numbers.json"
    assert cli.main(["eval", "pool", f"pool={pool}", "gold=answer", f"output={output}"]) == 0
    printed = capsys.readouterr().out
    points = {(each["way"], each["n"]): each for each in json.loads(output.read_text())["points"]}
    assert {way for way, _ in points} == {"length", "pass@n", "maj@n"}
    assert {n for _, n in points} == {1, 2, 4, 8}
    base = mean(torch.from_numpy(RIGHT.mean(1)))
    for way in ("length", "pass@n", "maj@n"):
        assert (points[way, 1]["mean"], points[way, 1]["low"]) == pytest.approx((base.mean, base.low), abs=1e-12)
    longest = [right[length == length.max()].mean() for right, length in zip(RIGHT, LENGTHS, strict=True)]
    assert points["length", 8]["mean"] == pytest.approx(np.mean(longest), abs=1e-12)
    assert points["pass@n", 8]["mean"] == pytest.approx(RIGHT.any(1).mean(), abs=1e-12)
    assert points["pass@n", 2]["kl"] == pytest.approx(np.log(2) - 0.5)
    assert f"{base.mean:.3f} ±{base.high - base.mean:.3f}" in printed
    assert cli.main(["eval", "pool", f"pool={pool}", "gold=length", "proxy=answer"]) == 0
    assert "length itself" in capsys.readouterr().out, "a gold that knows no right and wrong"


def test_a_judge_that_is_not_there_is_named(pool: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("eval", "pool", f"pool={pool}", "gold=gold"), "gold=gold: no such judge of pool="),
        (("eval", "pool", f"pool={pool}", "gold=answer", "proxy=rm"), "(it has answer, length); name one, or run"),
        (("rows", f"pool={pool}", "kind=sft", "by=rm", "output=out.jsonl"), "by=rm: no such judge of pool="),
        (("rows", f"pool={pool}", "kind=sft", "by=answer", "output=o.jsonl", "responses=9"), "set responses=8 or less"),
        (("rows", f"pool={pool}", "kind=sft", "by=answer", "output=o.jsonl", "margin=1"), "margin=1 is of kind=pairs"),
        (("rows", f"pool={pool}", "kind=labelled", "by=answer", "output=o.jsonl", "most=1"), "most=1 is of kind=sft"),
        (("rows", f"pool={pool}", "kind=sft", "by=answer", "output=o.jsonl", "steps=min"), "answer judges no steps"),
        (("rows", f"pool={pool}", "kind=labelled", "by=length", "output=o.jsonl"), "its scores go beyond 0 to 1"),
        (
            ("rows", f"pool={pool}", "kind=pairs", "by=length", "output=o.jsonl", "margin=999"),
            "far apart; lower margin, or use",
        ),
        (("rows", f"pool={pool}", "kind=sft", "by=length", "output=o.jsonl"), "set most, how many of the best of each"),
    ):
        assert cli.main(arguments) == 2
        assert message in capfd.readouterr().err


def test_of_wrong_responses_no_demonstration_is_made(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And none that helps is left out of what is said: there is no margin to lower."""
    write_pool(tmp_path, SAMPLES)
    count = len(open_pool(tmp_path).distinct)
    write_scores(tmp_path, "strict", Verdict(torch.zeros(count, 1), correct=[False] * count))
    assert cli.main(["rows", f"pool={tmp_path}", "kind=sft", "by=strict", f"output={tmp_path / 'o.jsonl'}"]) == 2
    told = capfd.readouterr().err
    assert "no row of kind=sft is left, for no response that has an end is right; use more prompts and" in told
    assert not (tmp_path / "o.jsonl.settings.json").exists()


def test_one_prompt_has_no_interval(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = {"model": "tiny-xs", "tokenizer": "arithmetic", "prompts": {"template": "plain"}, "n": 2, "pool": tmp_path}
    asked_ = {"prompt": "Tom has 5 apples.", "sampling": {"max_new_tokens": 4}}
    run_ranks(draw, 1, GenerateConfig.model_validate({**given, **asked_}))
    assert cli.main(["eval", "pool", f"pool={tmp_path}", "gold=answer"]) == 2
    assert "has one prompt, and intervals are over prompts; draw a pool of more" in capfd.readouterr().err


def rows_of(pool: Path, output: Path, *words_: str) -> list[dict[str, Any]]:
    assert cli.main(["rows", f"pool={pool}", f"output={output}", *words_]) == 0
    settings = json.loads(output.with_name(f"{output.name}.settings.json").read_text())
    assert (settings["pool's settings"], settings["judge's settings"]["kind"]) == ({"seed": 1}, settings_kind(words_))
    return [json.loads(line) for line in output.read_text().splitlines()]


def settings_kind(words_: tuple[str, ...]) -> str:
    return "rule" if "by=answer" in words_ else "function"


def of_prompt(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """By prompt, in the order of the pool."""
    prompts = [row["prompt"] for row in prompt_rows(DATA.arithmetic, "train")]
    return [[row for row in rows if row["prompt"] == prompt] for prompt in prompts]


def test_demonstrations_are_right_distinct_and_so_many_at_most(pool: Path, tmp_path: Path) -> None:
    rows = rows_of(pool, tmp_path / "sft.jsonl", "kind=sft", "by=answer", "most=2")
    for texts, right, of in zip(said(SAMPLES), RIGHT, of_prompt(rows), strict=True):
        fitting = [text for at, text in enumerate(texts) if right[at] and at != 5]
        assert [row["response"] for row in of] == list(dict.fromkeys(fitting))[:2]
    best = rows_of(pool, tmp_path / "best.jsonl", "kind=sft", "by=length", "most=1")
    longest = [max((text for at, text in enumerate(of) if at != 5), key=len) for of in said(SAMPLES)]
    assert [len(row["response"]) for row in best] == [len(text) for text in longest]
    data = DataConfig(source=str(tmp_path / "sft.jsonl"), template="plain")
    assert len(load_sft(data, build_tiny_tokenizer(words()))) == len(rows)


def test_pairs_are_apart_and_use_no_response_twice(pool: Path, tmp_path: Path) -> None:
    rows = rows_of(pool, tmp_path / "pairs.jsonl", "kind=pairs", "by=answer", "most=3")
    verdicts = [dict(zip(of, right, strict=True)) for of, right in zip(said(SAMPLES), RIGHT, strict=True)]
    for known, of in zip(verdicts, of_prompt(rows), strict=True):
        assert all(known[row["chosen"]] and not known[row["rejected"]] for row in of)
        used = [row[side] for row in of for side in ("chosen", "rejected")]
        assert len(set(used)) == len(used)
    assert len(rows) >= 4
    apart = rows_of(pool, tmp_path / "apart.jsonl", "kind=pairs", "by=length", "margin=6")
    assert all(len(row["chosen"]) - len(row["rejected"]) >= 6 for row in apart)
    every = rows_of(pool, tmp_path / "every.jsonl", "kind=pairs", "by=length")
    assert len(every) > len(apart) > 0
    data = DataConfig(source=str(tmp_path / "pairs.jsonl"), template="plain")
    assert len(load_preferences(data, build_tiny_tokenizer(words()))) == len(rows)


def test_fewer_prompts_and_fewer_responses_are_among_more(pool: Path, tmp_path: Path) -> None:
    """Of a grid every cell is inside of the larger ones; another seed draws another."""

    def cell(prompts: int, responses: int, seed: int = 1) -> list[str]:
        output = tmp_path / f"{prompts}_{responses}_{seed}.jsonl"
        axes = (f"prompts={prompts}", f"responses={responses}", f"seed={seed}")
        rows = rows_of(pool, output, "kind=labelled", "by=answer", *axes)
        assert len(load_labelled(DataConfig(source=str(output), template="plain"), build_tiny_tokenizer(words())))
        assert all(row["answer"].isdigit() for row in rows)  # what verifiers read stays beside the prompt
        return [json.dumps(row) for row in rows]

    def inside(small: list[str], large: list[str]) -> bool:
        left = iter(large)
        return all(row in left for row in small)

    sizes = [(2, 3), (4, 3), (4, 6), (6, 8)]
    cells = [cell(*size) for size in sizes]
    for small, large in pairwise(cells):
        assert inside(small, large)
    # Sample 5 was cut.
    assert len(cells[-1]) == 6 * 7
    assert all(
        prompts * (responses - 1) <= len(of) <= prompts * responses
        for (prompts, responses), of in zip(sizes, cells, strict=True)
    )
    assert cell(2, 3, seed=2) != cells[0]
    labels = [json.loads(row)["correct"] for row in cells[-1]]
    assert labels == np.delete(RIGHT, 5, axis=1).astype(float).ravel().tolist()
